"""Communication groups: the few collectives that the runtime needs, issued now, waited for later.

`ProcessGroupGroup` runs them on `torch.distributed`. Its forms for gloo were measured on 4 ranks of
one machine (one thread each, milliseconds; the best times for all_reduce, medians for the others;
the machine was busy, so compare only within an operation) ::

           all_reduce                 all_gather (gathered size)        reduce_scatter
    size    native  gather+sum  rs+ag   native  all_to_all  send/recv   native  all_to_all+sum
    16 KiB     1.9      0.8      1.9       1.5      1.4        0.9         4.1      1.0
    64 KiB     2.5      1.1      2.3       2.3      1.7        1.4         5.4      1.7
    256 KiB    2.3      1.3      3.0       4.1      2.8        4.1         4.5      1.3
    512 KiB    2.7      2.8      2.6
    1 MiB      3.3      3.4      4.8       6.6      4.7        2.6         5.1      3.4
    4 MiB      9.9        -       12       9.9      7.7        6.6          16      6.1
    16 MiB      29        -       32        82      129         20          43       23
    64 MiB     158        -      244       560      150         76         208       91

So a gather is point to point and a reduce-scatter is an all-to-all with a local sum, at every size;
only an all-reduce has a crossover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.compat import c10d_functional

T = TypeVar("T")

# On CPU, all-reduces of which all members' tensors together have at most this many bytes are an
# all-gather and a local reduction: one round instead of two, at the price of more traffic.
SMALL_ALL_REDUCE_BYTES = 1 << 20

# Tag of our point-to-point messages, which arrive in the order of sending per pair, group and tag.
# Pipelines send with other tags.
GATHER_TAG = 0x6170

REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0, dtype=x.dtype),
    "max": lambda x: x.amax(0),
    "min": lambda x: x.amin(0),
}


class InFlight:
    """A communication that has been issued; `wait` finishes it and returns its result.

    `wait` may be called again and returns the same tensor.
    """

    __slots__ = ("_finish", "_value")

    def __init__(self, finish: Callable[[], Tensor] | None, value: Tensor | None = None) -> None:
        self._finish = finish
        self._value = value

    def wait(self) -> Tensor:
        if self._finish is not None:
            self._value = self._finish()
            self._finish = None
        assert self._value is not None
        return self._value


def done(x: Tensor) -> InFlight:
    """An operation that has finished already."""
    return InFlight(None, x)


class Group(Protocol):
    """Members that communicate; every member must make the same calls in the same order.

    Inputs must not be written to before the result has been waited for. Results never alias the
    input, except in `all_reduce(..., in_place=True)` and in groups of one member.
    """

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int:
        """Position of this process in the group."""
        ...

    def all_reduce(self, x: Tensor, op: str = "sum", in_place: bool = False) -> InFlight:
        """Reduce over the members; `op` is 'sum', 'max' or 'min'."""
        ...

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        """Concatenate along dim 0; `sizes` are the members' lengths where they differ."""
        ...

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        """Sum over the members, of which each gets its piece along dim 0 (of `sizes`)."""
        ...

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        """Send the pieces of `in_splits` along dim 0 to the members in order; get `out_splits`."""
        ...

    def broadcast(self, x: Tensor, source: int = 0) -> InFlight:
        """The tensor of member `source`; `x` of the others says shape and dtype."""
        ...

    def wait(self, inflight: InFlight) -> Tensor: ...


def to_wire(x: Tensor) -> Tensor:
    """View as a dtype that every backend can send and sum, dim 0 unchanged."""
    x = x.contiguous()
    return torch.view_as_real(x) if x.is_complex() else x


def from_wire(x: Tensor, like: Tensor) -> Tensor:
    """What has been sent, with the dtype of what it was made from."""
    if like.is_complex():
        return torch.view_as_complex(x)
    return x.to(like.dtype) if x.dtype != like.dtype else x


class ProcessGroupGroup:
    """A group of `torch.distributed`; by default all ranks."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        group: Any = process_group if process_group is not None else dist.group.WORLD
        self._group = group
        self._name: str = group.group_name
        self._ops = c10d_functional()
        self.size: int = group.size()
        self.rank: int = group.rank()

    @property
    def process_group(self) -> dist.ProcessGroup:
        found: dist.ProcessGroup = self._group
        return found

    def wait(self, inflight: InFlight) -> Tensor:
        return inflight.wait()

    def all_reduce(self, x: Tensor, op: str = "sum", in_place: bool = False) -> InFlight:
        if self.size == 1 or not x.numel():
            return done(x)
        wire = to_wire(x)
        if wire.dtype == torch.bool:
            wire = wire.to(torch.uint8)
        if _is_cpu(x) and wire.nbytes * self.size <= SMALL_ALL_REDUCE_BYTES:
            shape, reduce = wire.shape, REDUCE[op]
            parts = self._gather(wire.reshape(1, -1), [1] * self.size)

            def finish() -> Tensor:
                return from_wire(reduce(parts.wait()).view(shape), x)

            return InFlight(finish)
        # In-place on what is ours: the caller's tensor if allowed, or a copy made on the way.
        ours = in_place or wire.data_ptr() != x.data_ptr()
        call = self._ops.all_reduce_ if ours else self._ops.all_reduce
        out = call(wire, op, self._name)
        return InFlight(lambda: from_wire(self._ops.wait_tensor(out), x))

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        if self.size == 1:
            return done(x)
        wire = to_wire(x)
        even = sizes is None or len(set(sizes)) == 1
        lengths = [wire.shape[0]] * self.size if sizes is None else list(sizes)
        if _is_cpu(x):
            gathered = self._gather(wire, lengths)
            return InFlight(lambda: from_wire(gathered.wait(), x))
        if even:
            out = self._ops.all_gather_into_tensor(wire, self.size, self._name)
            return InFlight(lambda: from_wire(self._ops.wait_tensor(out), x))
        longest = max(lengths)
        padded = wire.new_empty((longest, *wire.shape[1:]))
        padded[: wire.shape[0]].copy_(wire)
        out = self._ops.all_gather_into_tensor(padded, self.size, self._name)

        def finish() -> Tensor:
            rows = self._ops.wait_tensor(out).split_with_sizes([longest] * self.size)
            cut = [r[:n] for r, n in zip(rows, lengths, strict=True)]
            return from_wire(torch.cat(cut), x)

        return InFlight(finish)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        if self.size == 1:
            return done(x)
        wire = to_wire(x)
        even = sizes is None or len(set(sizes)) == 1
        if even and not _is_cpu(x):
            out = self._ops.reduce_scatter_tensor(wire, "sum", self.size, self._name)
            return InFlight(lambda: from_wire(self._ops.wait_tensor(out), x))
        splits = [x.shape[0] // self.size] * self.size if sizes is None else list(sizes)
        mine = splits[self.rank]
        if not x.numel():
            return done(x.new_empty((mine, *x.shape[1:])))
        out = self._all_to_all(wire, [mine] * self.size, splits)

        def finish() -> Tensor:
            parts = self._ops.wait_tensor(out).view(self.size, mine, *wire.shape[1:])
            return from_wire(parts.sum(0, dtype=parts.dtype), x)

        return InFlight(finish)

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        if self.size == 1:
            return done(x)
        out = self._all_to_all(to_wire(x), list(out_splits), list(in_splits))
        return InFlight(lambda: from_wire(self._ops.wait_tensor(out), x))

    def broadcast(self, x: Tensor, source: int = 0) -> InFlight:
        if self.size == 1:
            return done(x)
        out = self._ops.broadcast(to_wire(x), source, self._name)
        return InFlight(lambda: from_wire(self._ops.wait_tensor(out), x))

    def _all_to_all(self, x: Tensor, out_splits: list[int], in_splits: list[int]) -> Tensor:
        out: Tensor = self._ops.all_to_all_single(x, out_splits, in_splits, self._name)
        return out

    def _gather(self, x: Tensor, lengths: list[int]) -> InFlight:
        """All-gather as sends and receives straight from `x` and into the result."""
        out = x.new_empty((sum(lengths), *x.shape[1:]))
        pieces = out.split_with_sizes(lengths)
        works: list[Any] = []
        for distance in range(1, self.size):
            source = (self.rank - distance) % self.size
            if pieces[source].numel():
                works.append(self._group.recv([pieces[source]], source, GATHER_TAG))
        if x.numel():
            for distance in range(1, self.size):
                target = (self.rank + distance) % self.size
                works.append(self._group.send([x], target, GATHER_TAG))
        pieces[self.rank].copy_(x)

        def finish() -> Tensor:
            while works:  # waiting twice for a gloo receive would block
                works.pop(0).wait()
            return out

        return InFlight(finish)


def _is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"
