"""From one sharding to another: the sequence of typed collectives, one mesh axis at a time.

The cost model and the lowering use the same sequence, so what is priced is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from . import lowered
from .lowered import Collective
from .mesh import MICRO_BATCH, Mesh
from .sharding import Sharding

_REDUCE = {"sum": lowered.PSUM, "max": lowered.PMAX, "min": lowered.PMIN}


@dataclass(frozen=True)
class Step:
    """One collective on one axis and the sharding that it leaves."""

    op: Collective
    axis: str
    after: Sharding


def reshard_steps(source: Sharding, target: Sharding, mesh: Mesh) -> list[Step]:
    """Collectives that turn a value at `source` into `target`.

    `target.varying` says on which axes a replicated result must have a partial gradient. Steps that
    shrink the local tensor come before steps that grow it. Raises ValueError where no sequence
    exists (a split or replicated value cannot become a partial maximum).
    """
    return list(_steps(source, target))


@lru_cache(maxsize=1 << 17)
def _steps(source: Sharding, target: Sharding) -> tuple[Step, ...]:
    """The steps do not depend on sizes: the planner asks for the same ones on every mesh."""
    current, steps = source, []
    while current != target:
        step = _next_step(current, target)
        steps.append(step)
        current = step.after
        if len(steps) > 64:
            raise ValueError(f"no way from {source} to {target}")
    return tuple(steps)


def _next_step(current: Sharding, target: Sharding) -> Step:
    surplus = {
        dim: _surplus(current, target, dim) for dim in range(current.rank) if current.splits[dim]
    }
    ready = _ready(current, target, surplus)

    for axis, reduction in current.partial:
        if reduction == "sum" and axis in ready:
            after = _split(current.with_partial(axis, None), target, ready[axis], axis)
            return Step(lowered.SCATTER_SUM, axis, after)
    for axes in surplus.values():
        if axes and axes[-1] in ready:
            after = _split(current.without_axis(axes[-1]), target, ready[axes[-1]], axes[-1])
            return Step(lowered.SWAP, axes[-1], after)
    for axis, dim in ready.items():
        kind = current.kind(axis)
        if kind in "RV":
            op = lowered.SLICE_INV if kind == "R" else lowered.SLICE_VARY
            return Step(op, axis, _split(current.without_varying(axis), target, dim, axis))
    for axis, reduction in current.partial:
        if dict(target.partial).get(axis) != reduction:
            return Step(_REDUCE[reduction], axis, current.with_partial(axis, None))
    for axes in surplus.values():
        if axes:
            axis, after = axes[-1], current.without_axis(axes[-1])
            if axis in target.varying:
                return Step(lowered.GATHER_VARY, axis, after.with_varying(axis))
            return Step(lowered.GATHER_INV, axis, after)
    for axis in target.varying:
        if current.kind(axis) == "R":
            return Step(lowered.PVARY, axis, current.with_varying(axis))
    for axis, reduction in target.partial:
        if current.kind(axis) == "R" and reduction == "sum":
            return Step(lowered.KEEP_FIRST, axis, current.with_partial(axis, "sum"))
    raise ValueError(f"no way from {current} to {target}")


def _surplus(current: Sharding, target: Sharding, dim: int) -> tuple[str, ...]:
    """Axes that must leave the dim, the innermost last: all past the common prefix."""
    have, want = current.splits[dim], target.splits[dim]
    if have.axes != want.axes[: len(have.axes)]:
        keep = 0
        while keep < min(len(have.axes), len(want.axes)) and have.axes[keep] == want.axes[keep]:
            keep += 1
    else:
        keep = len(have.axes)
    if (have.outer, have.block) != (want.outer, want.block):
        keep = int(have.outer == want.outer == 1 and have.axes[:keep][:1] == (MICRO_BATCH,))
    return have.axes[keep:]


def _ready(
    current: Sharding, target: Sharding, surplus: dict[int, tuple[str, ...]]
) -> dict[str, int]:
    """Axes that may be added to a dim now: the next one that the target wants there."""
    ready: dict[str, int] = {}
    for dim, want in enumerate(target.splits):
        have = current.splits[dim]
        if not surplus.get(dim) and len(have.axes) < len(want.axes):
            ready[want.axes[len(have.axes)]] = dim
    return ready


def _split(current: Sharding, target: Sharding, dim: int, axis: str) -> Sharding:
    want = target.splits[dim]
    return current.with_split(
        dim, (*current.splits[dim].axes, axis), outer=want.outer, block=want.block
    )
