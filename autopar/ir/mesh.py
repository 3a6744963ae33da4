"""Device meshes: named axes, their sizes, and the cluster level that each axis crosses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

MICRO_BATCH = "mb"
"""The axis, in front of a mesh's own, along which micro-batches count: not one of devices."""


@dataclass(frozen=True)
class Axis:
    """One mesh axis.

    `size` is the number of devices along it; `level` the index of the outermost cluster level
    that a group along this axis crosses (0: inside a host, 1: between hosts).
    """

    name: str
    size: int
    level: int = 0


@dataclass(frozen=True)
class Mesh:
    """Devices laid out as a grid with named axes, the outermost (slowest varying rank) first."""

    axes: tuple[Axis, ...]

    @staticmethod
    def of(**sizes: int) -> Mesh:
        """Build a mesh inside one host: `Mesh.of(dp=2, tp=2)`."""
        return Mesh(tuple(Axis(name, size) for name, size in sizes.items()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @property
    def size(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    def __getitem__(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(name)

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of `rank` along each axis, row-major."""
        out: dict[str, int] = {}
        for axis in reversed(self.axes):
            rank, out[axis.name] = divmod(rank, axis.size)
        return {name: out[name] for name in self.names}

    def rank(self, coordinates: dict[str, int]) -> int:
        """Rank at the given position; the inverse of `coordinates`."""
        rank = 0
        for axis in self.axes:
            rank = rank * axis.size + coordinates[axis.name]
        return rank

    def group(self, rank: int, names: tuple[str, ...]) -> tuple[int, ...]:
        """Ranks that share every coordinate of `rank` except those along `names`.

        Ordered row-major over `names`, in the order given.
        """
        ranks = [self.coordinates(rank)]
        for name in names:
            ranks = [{**c, name: i} for c in ranks for i in range(self[name].size)]
        return tuple(self.rank(c) for c in ranks)

    def __str__(self) -> str:
        return " x ".join(f"{axis.name}={axis.size}" for axis in self.axes) or "single"
