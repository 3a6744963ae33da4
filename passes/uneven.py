"""Where devices have so different numbers of rows that their kernels may do different things."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding, Split


def unlike_somewhere(shape: Sequence[int], sharding: Sharding, mesh: Mesh) -> bool:
    """Whether of some dim one device has nothing or one element, and another has more."""
    return any(
        len(_kinds(split, size, mesh)) > 1
        for split, size in zip(sharding.splits, shape, strict=True)
    )


def _kinds(split: Split, size: int, mesh: Mesh) -> set[int]:
    """0, 1 or 2, for any number above, of every device's elements of a dim."""
    if not split or split.is_even(size, mesh):
        return {min(size, 2)}
    places = itertools.product(*(range(mesh[axis].size) for axis in split.axes))
    return {
        min(2, split.local_size(size, mesh, dict(zip(split.axes, place, strict=True))))
        for place in places
    }
