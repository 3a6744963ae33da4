"""Where the better of several plans changes, along one variable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .evaluate import Array

NOBODY = -1
SAME = 1e-9  # relative: of plans that take equally long, the first one wins
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Contender:
    """A plan as a function of the variable: values -> (seconds, bytes, legal), three arrays."""

    name: str
    at: Callable[[Array], tuple[Array, Array, NDArray[np.bool_]]]


@dataclass(frozen=True)
class Span:
    """From `low` to `high` (both tried) the contender `winner` is the fastest that fits.

    `NOBODY` where none is legal and fits. `low_s` and `high_s` are the winner's seconds there.
    """

    low: float
    high: float
    winner: int
    low_s: float
    high_s: float


def winners(
    contenders: Sequence[Contender], values: Array, limit_bytes: Callable[[Array], Array]
) -> tuple[Ints, Array]:
    """The fastest legal contender that fits at every value, and its seconds (NaN for nobody)."""
    limit = limit_bytes(values)
    rows = []
    for contender in contenders:
        seconds, memory, legal = contender.at(values)
        rows.append(np.where(legal & (memory <= limit), seconds, np.inf))
    table = np.stack(rows)
    best = table.min(axis=0)
    won = (table <= best * (1 + SAME)).argmax(axis=0)
    none = ~np.isfinite(best)
    return np.where(none, NOBODY, won), np.where(none, np.nan, best)


def crossover(
    contenders: Sequence[Contender],
    values: Array,
    limit_bytes: Callable[[Array], Array],
    *,
    exact: bool = False,
    tolerance: float = 1e-4,
) -> list[Span]:
    """Who wins where, over ascending `values`.

    `exact` says that only these values may occur (batch sizes); otherwise every place where the
    winner changes is narrowed down by bisection to a relative `tolerance`.
    """
    if not exact:
        values = _refined(contenders, values, limit_bytes, tolerance)
    won, seconds = winners(contenders, values, limit_bytes)
    starts = np.flatnonzero(np.concatenate(([True], won[1:] != won[:-1])))
    ends = np.concatenate((starts[1:], [len(won)])) - 1
    return [
        Span(float(values[a]), float(values[b]), int(won[a]), float(seconds[a]), float(seconds[b]))
        for a, b in zip(starts, ends, strict=True)
    ]


def _refined(
    contenders: Sequence[Contender],
    values: Array,
    limit_bytes: Callable[[Array], Array],
    tolerance: float,
) -> Array:
    """The values with more of them (by halving, in logarithms) around every change of winner."""
    won, _ = winners(contenders, values, limit_bytes)
    change = np.flatnonzero(won[1:] != won[:-1])
    low, high = values[change].copy(), values[change + 1].copy()
    low_won = won[change]
    found = [values]
    rounds = math.ceil(math.log2(max(2.0, _widest(values) / tolerance)))
    for _ in range(rounds if len(change) else 0):
        middle = np.sqrt(low * high)
        found.append(middle)
        at, _ = winners(contenders, middle, limit_bytes)
        same = at == low_won
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return np.unique(np.concatenate(found))


def _widest(values: Array) -> float:
    """The largest relative step."""
    return float((values[1:] / values[:-1]).max() - 1) if len(values) > 1 else 1.0


def allowed_sizes(units: Sequence[int], low: int, high: int) -> Array:
    """Batch sizes (or sequence lengths) worth trying: those that divide evenly somewhere.

    Multiples of the least common multiple of `units` (the parts into which plans divide the size),
    and below it multiples of each unit.
    """
    step = math.lcm(*units)
    found = set(range(step, high + 1, step * max(1, high // step // 4096)))
    for unit in units:
        found.update(
            range(unit, min(step, high) + 1, unit * max(1, min(step, high) // unit // 512))
        )
    return np.array(sorted(n for n in found if low <= n <= high), dtype=np.float64)
