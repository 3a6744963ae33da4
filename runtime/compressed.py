"""Reductions whose messages are int8: about a quarter of float32's bytes, at a price in accuracy.

`CompressedGroup` sums tensors as blocks of int8 (`kernels.int8`). An all-reduce quantises the
tensor in one piece per member, sends every member its piece, adds the pieces up and quantises the
sum in one pass, and gathers the sums: two roundings, and bitwise the same result on all members. A
reduce-scatter ends after the sum: one rounding. Per member, of a tensor of n elements whose group
has g members::

                     int8                            float32
    all_reduce       2 (g-1)/g (1 + 4/256) n bytes   2 (g-1)/g 4 n bytes
    reduce_scatter     (g-1)/g (1 + 4/256) n bytes     (g-1)/g 4 n bytes

CPU ranks of several hosts sum inside their host first, as they are: only what goes between hosts is
int8 (g is the number of hosts, and n what a member has of its host's sum).

What is below `SMALLEST` elements, or has one dim (norms, biases), travels as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .group import Group, InFlight
from .kernels import int8
from .kernels.support import interpreted, usable
from .two_level import Column, TwoLevelGroup

SMALLEST = 4096  # elements, of a tensor that is worth its scales and its padding

Finish = Callable[[], list[Tensor]]
Starter = Callable[..., Finish]


class CompressedGroup:
    """A group whose sums of floating point tensors travel as int8; it does all else as it was."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.size, self.rank = group.size, group.rank

    def wait(self, inflight: InFlight) -> Tensor:
        return inflight.wait()

    def all_reduce(self, x: Tensor, op: str = "sum", in_place: bool = False) -> InFlight:
        if not self._compresses(x, op):
            return self.group.all_reduce(x, op, in_place)
        flat = x.reshape(-1).contiguous()
        if isinstance(self.group, TwoLevelGroup) and x.device.type == "cpu":
            arriving = self.group.all_reduce_by(flat, _all_reduce)
        else:
            arriving = _all_reduce(self.group, flat)
        return InFlight(lambda: arriving.wait().view(x.shape))

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        return self.group.all_gather(x, sizes)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        if not self._compresses(x, "sum"):
            return self.group.reduce_scatter(x, sizes)
        lengths = [x.shape[0] // self.size] * self.size if sizes is None else list(sizes)
        inner = x.numel() // x.shape[0]
        flat, flat_sizes = x.reshape(-1).contiguous(), [n * inner for n in lengths]
        if isinstance(self.group, TwoLevelGroup) and x.device.type == "cpu":
            arriving = self.group.reduce_scatter_by(flat, flat_sizes, _reduce_scatter)
        else:
            arriving = _reduce_scatter(self.group, flat, flat_sizes)
        return InFlight(lambda: arriving.wait().view(lengths[self.rank], *x.shape[1:]))

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        return self.group.all_to_all(x, out_splits, in_splits)

    def broadcast(self, x: Tensor, source: int = 0) -> InFlight:
        return self.group.broadcast(x, source)

    def _compresses(self, x: Tensor, op: str) -> bool:
        return self.size > 1 and op == "sum" and x.is_floating_point() and x.numel() > 0


def _all_reduce(group: Group | Column, flat: Tensor) -> InFlight:
    """The sum of a flat tensor over a group, by way of the owners of its pieces."""
    arriving = _to_owners(group, flat)

    def finish() -> Tensor:
        own = _reduce(arriving.wait().view(group.size, -1))
        rows = group.all_gather(own).wait().view(group.size, -1)
        return _dequantise(rows, flat.numel(), flat.dtype)

    return InFlight(finish)


def _reduce_scatter(group: Group | Column, flat: Tensor, sizes: Sequence[int]) -> InFlight:
    """This member's piece of the sum of a flat tensor over a group."""
    arriving = _to_owners(group, _in_units(flat, sizes))
    mine = sizes[group.rank]

    def finish() -> Tensor:
        return _dequantise(arriving.wait().view(group.size, -1), mine, flat.dtype, summed=True)

    return InFlight(finish)


def _to_owners(group: Group | Column, flat: Tensor) -> InFlight:
    """Send every member its piece of a flat tensor; what arrives are the members' rows."""
    wire = _quantise(flat, group.size).view(-1)
    lengths = [wire.numel() // group.size] * group.size
    return group.all_to_all(wire, lengths, lengths)


def compressed(start: Starter) -> Starter:
    """`start` of `autopar.runtime.collectives` with sums of large tensors as int8."""

    def start_both(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Any) -> Finish:
        large = [i for i, x in enumerate(xs) if _is_large(x)]
        small = [i for i, x in enumerate(xs) if not _is_large(x)]
        flights = [
            (places, start([xs[i] for i in places], [specs[i] for i in places], among, kernel))
            for places, among in ((large, CompressedGroup(group)), (small, group))
            if places
        ]

        def finish() -> list[Tensor]:
            made = {
                i: y for places, flight in flights for i, y in zip(places, flight(), strict=True)
            }
            return [made[i] for i in range(len(xs))]

        return finish

    return start_both


def _is_large(x: Tensor) -> bool:
    return x.dim() > 1 and x.numel() >= SMALLEST and x.is_floating_point()


def _in_units(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """The pieces of `flat`, each padded to the units of the longest."""
    wanted = int8.units_of(max(lengths)) * int8.UNIT
    if all(n == wanted for n in lengths):
        return flat
    padded = flat.new_zeros(len(lengths), wanted)
    for row, piece in zip(padded, flat.split_with_sizes(list(lengths)), strict=True):
        row[: piece.numel()].copy_(piece)
    return padded.view(-1)


def _by_kernel(x: Tensor) -> bool:
    """Whether the kernel runs; on CPU the reference is no fall-back, but what is meant to run."""
    return (x.device.type != "cpu" or interpreted()) and usable(int8.NAME, x)


def _quantise(x: Tensor, pieces: int) -> Tensor:
    return (int8.quantise if _by_kernel(x) else int8.reference)(x, pieces)


def _reduce(wire: Tensor) -> Tensor:
    return (int8.reduce if _by_kernel(wire) else int8.reference_reduce)(wire)


def _dequantise(wire: Tensor, elements: int, dtype: torch.dtype, summed: bool = False) -> Tensor:
    run = int8.dequantise if _by_kernel(wire) else int8.reference_dequantise
    return run(wire, elements, dtype, summed)
