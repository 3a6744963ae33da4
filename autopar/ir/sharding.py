"""Sharding of one tensor over a mesh: which axes split each dim, and where the value is partial.

A dim is split by *axes*, outermost first. A split dim may carry a *layout*: the dim of size
`outer * n * block` is seen as `outer` repeats of `n` units of `block` elements, and the units are
what is divided. The plain case is `outer = block = 1`. `outer > 1` is a strided shard (a fused
QKV weight: three parts, each split), `block > 1` keeps runs together (batch times sequence,
flattened, split between samples). Units are divided as `torch.chunk` does: `ceil(n / parts)` each,
the last ones smaller or empty, axis by axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .mesh import MICRO_BATCH, Mesh

REDUCTIONS = ("sum", "max", "min")


@dataclass(frozen=True)
class Split:
    """How one tensor dim is divided: mesh axes (outermost first) and the layout of its units."""

    axes: tuple[str, ...] = ()
    outer: int = 1
    block: int = 1

    def __bool__(self) -> bool:
        return bool(self.axes)

    def __str__(self) -> str:
        if not self.axes:
            return "-"
        text = "&".join(self.axes)
        if self.outer != 1:
            text = f"{self.outer}:{text}"
        if self.block != 1:
            text = f"{text}*{self.block}"
        return text

    def unit_range(self, size: int, mesh: Mesh, coordinates: Mapping[str, int]) -> range:
        """Units (not elements) of a dim of `size` elements that the device at `coordinates` has."""
        start, length = 0, size // (self.outer * self.block)
        for name in self.axes:
            parts = mesh[name].size
            chunk = -(-length // parts)
            offset = min(coordinates[name] * chunk, length)
            start, length = start + offset, min(chunk, length - offset)
        return range(start, start + length)

    def runs(self, size: int, mesh: Mesh, coordinates: Mapping[str, int]) -> list[range]:
        """Element ranges of the dim that the device owns, in order; one unless strided."""
        units = self.unit_range(size, mesh, coordinates)
        stride = size // self.outer
        return [
            range(o * stride + units.start * self.block, o * stride + units.stop * self.block)
            for o in range(self.outer)
        ]

    def local_size(self, size: int, mesh: Mesh, coordinates: Mapping[str, int]) -> int:
        """Elements of the dim that the device owns."""
        return len(self.unit_range(size, mesh, coordinates)) * self.outer * self.block

    def parts(self, mesh: Mesh) -> int:
        n = 1
        for name in self.axes:
            n *= mesh[name].size
        return n

    def is_even(self, size: int, mesh: Mesh) -> bool:
        """Whether every device owns equally many elements."""
        unit = self.outer * self.block
        return size % unit == 0 and (size // unit) % self.parts(mesh) == 0


WHOLE = Split()


@dataclass(frozen=True)
class Sharding:
    """Sharding of a tensor: a `Split` per dim, and the axes on which the value is partial.

    `partial` maps axis -> reduction ('sum', 'max', 'min'), stored as sorted pairs. `varying` lists
    the axes on which the tensor is replicated but its gradient is still partial (type RV of the
    lowered language); an axis in none of them is replicated and invariant.
    Printed `[dp, -, tp] +tp ~dp`: splits, partial axes (`+` sum, `max(tp)`), varying axes.
    """

    splits: tuple[Split, ...]
    partial: tuple[tuple[str, str], ...] = field(default=())
    varying: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        # The planner looks shardings up by the hundred thousand.
        object.__setattr__(self, "_hash", hash((self.splits, self.partial, self.varying)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    @staticmethod
    def replicated(rank: int) -> Sharding:
        return Sharding((WHOLE,) * rank)

    @staticmethod
    def on(rank: int, **dim_of_axis: int) -> Sharding:
        """`Sharding.on(3, dp=0, tp=2)` prints as `[dp, -, tp]`."""
        sharding = Sharding.replicated(rank)
        for axis, dim in dim_of_axis.items():
            sharding = sharding.with_split(dim, (*sharding.splits[dim].axes, axis))
        return sharding

    @property
    def rank(self) -> int:
        return len(self.splits)

    @property
    def partial_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.partial)

    def used_axes(self) -> Iterator[str]:
        """Every axis named by a split or partial, with repeats if the sharding is illegal."""
        for split in self.splits:
            yield from split.axes
        yield from self.partial_axes

    def is_replicated(self) -> bool:
        return not self.partial and not any(self.splits)

    def dim_of(self, axis: str) -> int | None:
        """The dim that `axis` splits, or None."""
        for dim, split in enumerate(self.splits):
            if axis in split.axes:
                return dim
        return None

    def kind(self, axis: str) -> str:
        """'S', 'P', 'V' (replicated, gradient partial) or 'R' on `axis`."""
        if self.dim_of(axis) is not None:
            return "S"
        if axis in self.partial_axes:
            return "P"
        return "V" if axis in self.varying else "R"

    def with_split(
        self, dim: int, axes: tuple[str, ...], outer: int = 1, block: int = 1
    ) -> Sharding:
        splits = list(self.splits)
        splits[dim] = Split(axes, outer, block) if axes else WHOLE
        return Sharding(tuple(splits), self.partial, self.varying)

    def with_partial(self, axis: str, reduction: str | None) -> Sharding:
        """Add (or, with None, remove) a partial axis."""
        pairs = {**dict(self.partial)}
        pairs.pop(axis, None)
        if reduction is not None:
            pairs[axis] = reduction
        return Sharding(self.splits, tuple(sorted(pairs.items())), self.varying)

    def with_varying(self, *axes: str) -> Sharding:
        return Sharding(self.splits, self.partial, tuple(sorted({*self.varying, *axes})))

    def without_varying(self, *axes: str) -> Sharding:
        """Drop the given varying axes (all of them if none is given)."""
        keep = tuple(a for a in self.varying if axes and a not in axes)
        return Sharding(self.splits, self.partial, keep)

    def without_axis(self, axis: str) -> Sharding:
        """The same sharding, replicated on `axis`."""
        splits = tuple(_without(split, axis) for split in self.splits)
        partial = tuple(pair for pair in self.partial if pair[0] != axis)
        return Sharding(splits, partial, self.varying)

    def local_shape(
        self, shape: tuple[int, ...], mesh: Mesh, coordinates: Mapping[str, int]
    ) -> tuple[int, ...]:
        """Shape of the tensor that the device at `coordinates` holds."""
        return tuple(
            split.local_size(size, mesh, coordinates)
            for split, size in zip(self.splits, shape, strict=True)
        )

    def parts(self, mesh: Mesh) -> int:
        """Into how many different pieces the splits divide the tensor."""
        n = 1
        for split in self.splits:
            n *= split.parts(mesh)
        return n

    def __str__(self) -> str:
        text = "[" + ", ".join(map(str, self.splits)) + "]"
        for axis, reduction in self.partial:
            text += f" +{axis}" if reduction == "sum" else f" {reduction}({axis})"
        for axis in self.varying:
            text += f" ~{axis}"
        return text


def _without(split: Split, axis: str) -> Split:
    if axis not in split.axes:
        return split
    axes = tuple(a for a in split.axes if a != axis)
    if axes == (MICRO_BATCH,) and split.outer == 1:  # micro-batches are even, whatever the units
        return Split(axes)
    return Split(axes, split.outer, split.block) if axes else WHOLE
