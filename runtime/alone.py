"""Groups whose other members are not there: one rank's program without communication.

Every other member is taken to hold what this one holds: a gather repeats its piece, an all-to-all
receives what this member sends to itself. So shapes, dtypes, memory and the range of indices are
those of a real run (row counts of routed lookups, too, if the load is balanced), and values mean
nothing. What a stand-in does (fill a buffer that the collective would fill) is timed, so that it
can be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autopar.ir.graph import Graph
from autopar.ir.lowered import GroupRef
from autopar.ir.mesh import Mesh

from .group import Group, InFlight, done
from .phase_clock import PhaseClock


class AloneGroup:
    """A `Group` of `size` members of which only `rank` exists."""

    def __init__(self, size: int, rank: int, clock: PhaseClock) -> None:
        self.size = size
        self.rank = rank
        self._clock = clock

    def wait(self, inflight: InFlight) -> Tensor:
        return inflight.wait()

    def all_reduce(self, x: Tensor, op: str = "sum", in_place: bool = False) -> InFlight:
        """The tensor itself, or a copy; a sum of integers (counts of rows) is that of all alike."""
        if self.size == 1:
            return done(x)
        with self._clock.standing_in(), torch.no_grad():
            if op == "sum" and not x.is_floating_point() and not x.is_complex():
                return done(x * self.size)
            return done(x if in_place else x.clone(memory_format=torch.contiguous_format))

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        rows = self.size * x.shape[0] if sizes is None else sum(sizes)
        return done(x if self.size == 1 else self._filled(x, rows))

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        if self.size == 1:
            return done(x)
        lengths = [x.shape[0] // self.size] * self.size if sizes is None else list(sizes)
        with self._clock.standing_in(), torch.no_grad():
            mine = x.split_with_sizes(lengths)[self.rank]
            return done(mine.clone(memory_format=torch.contiguous_format))

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        if self.size == 1:
            return done(x)
        mine = x.split_with_sizes(list(in_splits))[self.rank]
        return done(self._filled(mine if mine.shape[0] else x, sum(out_splits)))

    def broadcast(self, x: Tensor, source: int = 0) -> InFlight:
        del source
        with self._clock.standing_in(), torch.no_grad():
            return done(x.clone(memory_format=torch.contiguous_format))

    def _filled(self, x: Tensor, rows: int) -> Tensor:
        """A new tensor of so many rows, those of `x` again and again; zeros if it has none."""
        with self._clock.standing_in(), torch.no_grad():
            here = x.shape[0]
            if not here:
                return x.new_zeros((rows, *x.shape[1:]))
            out = x.new_empty((rows, *x.shape[1:]))
            times, rest = divmod(rows, here)
            if times:
                whole = out[: times * here].view(times, here, *x.shape[1:])
                whole.copy_(x.unsqueeze(0).expand_as(whole))
            if rest:
                out[times * here :].copy_(x[:rest])
            return out


def alone_groups(
    graph: Graph, mesh: Mesh, rank: int, clock: PhaseClock
) -> Mapping[tuple[str, ...], Group]:
    """A stand-in for every group that a lowered program of `rank` communicates in."""
    wanted = {
        argument.axes
        for node in graph.calls()
        for argument in (*tuple[object, ...](node.args), *node.kwargs.values())
        if isinstance(argument, GroupRef)
    }
    found: dict[tuple[str, ...], Group] = {}
    for axes in sorted(wanted):
        members = mesh.group(rank, axes)
        found[axes] = AloneGroup(len(members), members.index(rank), clock)
    return found
