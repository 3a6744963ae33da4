"""Reductions whose messages are int8: about a quarter of float32's bytes, at a price in accuracy.

`CompressedGroup` sums tensors as blocks of int8 (`kernels.int8`). An all-reduce quantises the
tensor in one piece per member, sends every member its piece, adds the pieces up and quantises the
sum in one pass, and gathers the sums: two roundings, and bitwise the same result on all members. A
reduce-scatter ends after the sum: one rounding. Per member, of a tensor of n elements whose group
has g members::

                     int8                            float32
    all_reduce       2 (g-1)/g (1 + 4/256) n bytes   2 (g-1)/g 4 n bytes
    reduce_scatter     (g-1)/g (1 + 4/256) n bytes     (g-1)/g 4 n bytes

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
        arriving = self._to_owners(x.reshape(-1))

        def finish() -> Tensor:
            own = _reduce(arriving.wait().view(self.size, -1))
            rows = self.group.all_gather(own).wait().view(self.size, -1)
            return _dequantise(rows, x.numel(), x.dtype).view(x.shape)

        return InFlight(finish)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        return self.group.all_gather(x, sizes)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        if not self._compresses(x, "sum"):
            return self.group.reduce_scatter(x, sizes)
        lengths = [x.shape[0] // self.size] * self.size if sizes is None else list(sizes)
        inner = x.numel() // x.shape[0]
        arriving = self._to_owners(_in_units(x.reshape(-1), [n * inner for n in lengths]))
        mine = lengths[self.rank]

        def finish() -> Tensor:
            rows = arriving.wait().view(self.size, -1)
            total = _dequantise(rows, mine * inner, x.dtype, summed=True)
            return total.view(mine, *x.shape[1:])

        return InFlight(finish)

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        return self.group.all_to_all(x, out_splits, in_splits)

    def broadcast(self, x: Tensor, source: int = 0) -> InFlight:
        return self.group.broadcast(x, source)

    def _compresses(self, x: Tensor, op: str) -> bool:
        return self.size > 1 and op == "sum" and x.is_floating_point() and x.numel() > 0

    def _to_owners(self, flat: Tensor) -> InFlight:
        """Send every member its piece of a flat tensor; what arrives are the members' rows."""
        wire = _quantise(flat.contiguous(), self.size).view(-1)
        lengths = [wire.numel() // self.size] * self.size
        return self.group.all_to_all(wire, lengths, lengths)


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
