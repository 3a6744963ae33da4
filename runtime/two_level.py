"""Collectives among CPU ranks of several hosts, which send no byte over the network twice.

A group of H hosts with g members each has g columns: the members of equal position, one per host.
What can be reduced is reduced inside the host first, so that a column sends only its part; what all
members of a host need arrives once and is handed on inside. For a tensor of W bytes, as the
members see it whole, a host sends ::

                     here             member by member      gloo's ring
    all_reduce       2 (H-1)/H W      -                     2 (gH-1)/gH W
    all_gather       (H-1)/H W / 1    g (H-1)/H W           (gH-1)/gH W
    reduce_scatter   (H-1)/H W        g (H-1)/H W           -
    broadcast        W (source)       g W                   -

and all columns send at once. Inside a host everything goes through shared memory.
The reduction inside happens when a collective is issued, and so do its sends: they are under way
while the caller computes. Results are the same on every member: hosts are added in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .group import REDUCE, Group, InFlight, ProcessGroupGroup, done, from_wire, to_wire

# Tags of the messages among a column: those sent when a collective is issued, and when it is
# waited for. Messages of one tag arrive in the order of sending.
ISSUED_TAG, WAITED_TAG = 0x6171, 0x6172
# All-reduces among more than two hosts go in one round up to so many bytes per column and host.
ONE_ROUND_BYTES = 1 << 14


class TwoLevelGroup:
    """A group of equally many members on each of several hosts, host after host.

    `first` and `last` are groups of this host's members, for what happens when a collective is
    issued and when it is waited for; None where a host has one. `flat` is the whole group, and runs
    what is not on the CPU, and all-to-alls, of which every byte is for one member alone.
    """

    def __init__(
        self,
        flat: ProcessGroupGroup,
        process_group: dist.ProcessGroup,
        first: Group | None,
        last: Group | None,
    ) -> None:
        self._flat = flat
        self._group: Any = process_group
        self._first, self._last = first, last
        self.size, self.rank = flat.size, flat.rank
        self.inside = first.size if first is not None else 1
        self.hosts = self.size // self.inside
        self._host, self._column = divmod(self.rank, self.inside)

    def wait(self, inflight: InFlight) -> Tensor:
        return inflight.wait()

    # -- collectives ----------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: str = "sum", in_place: bool = False) -> InFlight:
        if x.device.type != "cpu":
            return self._flat.all_reduce(x, op, in_place)
        if not x.numel():
            return done(x)
        sent = to_wire(x)
        if sent.dtype == torch.bool:
            sent = sent.to(torch.uint8)
        flat = sent.view(-1)
        lengths = _even(flat.numel(), self.inside)
        mine = self._reduce_inside(flat, lengths, op)
        small = self.hosts == 2 or mine.nbytes <= ONE_ROUND_BYTES
        parts = _even(mine.numel(), self.hosts)
        if small:
            arriving = self._exchange([mine] * self.hosts, mine, ISSUED_TAG)
        else:
            pieces = list(mine.split_with_sizes(parts))
            arriving = self._exchange(pieces, pieces[self._host], ISSUED_TAG)

        def finish() -> Tensor:
            total = _total(arriving.wait(), op)
            if not small:
                own = total
                places = [own.new_empty(n) for n in parts]
                total = torch.cat(self._exchange([own] * self.hosts, places, WAITED_TAG).wait())
            out = total if self._last is None else self._last.all_gather(total, lengths).wait()
            return from_wire(out.view(sent.shape), x)

        return InFlight(finish)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        if x.device.type != "cpu":
            return self._flat.all_gather(x, sizes)
        lengths = [x.shape[0]] * self.size if sizes is None else list(sizes)
        own = to_wire(x)
        columns = _columns(lengths, self.inside)
        places = [own.new_empty((n, *own.shape[1:])) for n in columns[self._column]]
        arriving = self._exchange([own] * self.hosts, places, ISSUED_TAG)

        def finish() -> Tensor:
            column = torch.cat(arriving.wait())
            if self._last is None:
                return from_wire(column, x)
            gathered = self._last.all_gather(column, [sum(c) for c in columns]).wait()
            rows = gathered.split_with_sizes([n for c in columns for n in c])
            ordered = [
                rows[i * self.hosts + h] for h in range(self.hosts) for i in range(self.inside)
            ]
            return from_wire(torch.cat(ordered), x)

        return InFlight(finish)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        if x.device.type != "cpu":
            return self._flat.reduce_scatter(x, sizes)
        lengths = [x.shape[0] // self.size] * self.size if sizes is None else list(sizes)
        sent = to_wire(x)
        mine = self._scatter_inside(sent, lengths)
        pieces = list(mine.split_with_sizes(lengths[self._column :: self.inside]))
        arriving = self._exchange(pieces, pieces[self._host], ISSUED_TAG)
        return InFlight(lambda: from_wire(_total(arriving.wait(), "sum"), x))

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        return self._flat.all_to_all(x, out_splits, in_splits)

    def broadcast(self, x: Tensor, source: int = 0) -> InFlight:
        if x.device.type != "cpu":
            return self._flat.broadcast(x, source)
        host, column = divmod(source, self.inside)
        out = to_wire(x)
        works: list[Any] = []
        if self._column == column:
            if self._host == host:
                works = [self._send(out, h, ISSUED_TAG) for h in self._others()]
            else:
                out = torch.empty_like(out)
                works = [self._receive(out, host, ISSUED_TAG)]

        def finish() -> Tensor:
            _drain(works)
            if self._last is not None:
                return from_wire(self._last.broadcast(out, column).wait(), x)
            return from_wire(out.clone() if self._host == host else out, x)

        return InFlight(finish)

    # -- what is done between hosts by others -------------------------------------------------

    def all_reduce_by(self, x: Tensor, across: Callable[[Column, Tensor], InFlight]) -> InFlight:
        """The sum of a flat tensor on the CPU; `across` sums what a column has over the hosts."""
        lengths = _even(x.numel(), self.inside)
        mine = self._reduce_inside(x, lengths, "sum")
        arriving = across(Column(self), mine) if mine.numel() else done(mine)

        def finish() -> Tensor:
            total = arriving.wait()
            return total if self._last is None else self._last.all_gather(total, lengths).wait()

        return InFlight(finish)

    def reduce_scatter_by(
        self,
        x: Tensor,
        sizes: Sequence[int],
        across: Callable[[Column, Tensor, Sequence[int]], InFlight],
    ) -> InFlight:
        """The same for a reduce-scatter of a flat tensor into pieces of `sizes`."""
        mine = self._scatter_inside(x, sizes)
        pieces = list(sizes[self._column :: self.inside])
        return across(Column(self), mine, pieces) if mine.numel() else done(mine)

    # -- inside and across ----------------------------------------------------------------------

    def _reduce_inside(self, flat: Tensor, lengths: list[int], op: str) -> Tensor:
        """This column's part of what the members of the host have together."""
        if self._first is None:
            return flat
        if op == "sum":
            return self._first.reduce_scatter(flat, lengths).wait()
        whole = self._first.all_reduce(flat, op).wait()
        return whole.split_with_sizes(lengths)[self._column]

    def _scatter_inside(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """What the members of the host have together of this column's pieces, host by host."""
        if self._first is None:
            return x
        rows = x.split_with_sizes(list(lengths))
        order = [h * self.inside + i for i in range(self.inside) for h in range(self.hosts)]
        by_column = torch.cat([rows[member] for member in order])
        parts = [sum(column) for column in _columns(lengths, self.inside)]
        return self._first.reduce_scatter(by_column, parts).wait()

    def _exchange(
        self, pieces: Sequence[Tensor], into: Tensor | Sequence[Tensor], tag: int
    ) -> _Arriving:
        """Send `pieces[h]` to host h of this column; receive what they send, by host.

        `into`: tensors to receive in, or one that is like all of them.
        """
        places = (
            [torch.empty_like(into) for _ in pieces] if isinstance(into, Tensor) else list(into)
        )
        works: list[Any] = []
        for host in self._others():
            if places[host].numel():
                works.append(self._receive(places[host], host, tag))
        for host in self._others():
            if pieces[host].numel():
                works.append(self._send(pieces[host], host, tag))
        places[self._host] = pieces[self._host]
        return _Arriving(works, places, pieces)

    def _others(self) -> list[int]:
        return [(self._host + distance) % self.hosts for distance in range(1, self.hosts)]

    def _send(self, x: Tensor, host: int, tag: int) -> Any:
        return self._group.send([x], host * self.inside + self._column, tag)

    def _receive(self, x: Tensor, host: int, tag: int) -> Any:
        return self._group.recv([x], host * self.inside + self._column, tag)


class Column:
    """The members of one column as a group, for those that do the part between hosts themselves.

    Its all-to-alls are for when a collective is issued, its gathers for when it is waited for.
    """

    def __init__(self, group: TwoLevelGroup) -> None:
        self._group = group
        self.size, self.rank = group.hosts, group._host

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        """As `Group.all_to_all`."""
        pieces = list(x.split_with_sizes(list(in_splits)))
        places = [x.new_empty((n, *x.shape[1:])) for n in out_splits]
        arriving = self._group._exchange(pieces, places, ISSUED_TAG)
        return InFlight(lambda: torch.cat(arriving.wait()))

    def all_gather(self, x: Tensor) -> InFlight:
        """As `Group.all_gather`."""
        arriving = self._group._exchange([x] * self.size, x, WAITED_TAG)
        return InFlight(lambda: torch.cat(arriving.wait()))


class _Arriving:
    """Messages under way; what is sent is kept until they have left."""

    def __init__(self, works: list[Any], places: list[Tensor], sent: Sequence[Tensor]) -> None:
        self._works, self._places, self._sent = works, places, sent

    def wait(self) -> list[Tensor]:
        _drain(self._works)
        return self._places


def _drain(works: list[Any]) -> None:
    while works:  # waiting twice for a gloo receive would block
        works.pop(0).wait()


def _even(n: int, parts: int) -> list[int]:
    """Lengths of `parts` pieces of n elements, the last ones shorter."""
    share = -(-n // parts)
    return [min(share, max(n - i * share, 0)) for i in range(parts)]


def _columns(lengths: Sequence[int], inside: int) -> list[list[int]]:
    """Members' lengths by column, then host."""
    return [list(lengths[i::inside]) for i in range(inside)]


def _total(parts: Sequence[Tensor], op: str) -> Tensor:
    """Combine the hosts' parts in their order."""
    if len(parts) == 2 and op == "sum":
        return parts[0] + parts[1]
    return REDUCE[op](torch.stack(list(parts)))
