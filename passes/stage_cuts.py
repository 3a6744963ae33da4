"""Cut a chain of units into pipeline stages: the slowest is as fast as can be, and all fit.

Dynamic programming over the chain: with `T[i, j]` the seconds of the units from `i` up to `j`, the
least that the slowest of the first `k` pieces takes if they end at `j` is::

    slowest[k, j] = min over i < j with memory[k, i, j] <= limit of max(slowest[k - 1, i], T[i, j])

Of all cuts with the least slowest piece, the one with the least sum of squares is taken: the most
even one. Memory depends on the number of the piece, for early stages of 1F1B hold more
micro-batches (arXiv:2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost.schedules import Schedule

from .stage_steps import Chain

Array = NDArray[np.float64]
Bytes = Callable[[int], Array]  # number of a piece -> [start, end] bytes


@dataclass(frozen=True)
class TooFull:
    """Why there is no cut: the piece that fits nowhere, and the least bytes that it needs."""

    piece: int
    needs_bytes: float


def cut_chain(
    chain: Chain, schedule: Schedule, working: Array, memory_limit: float
) -> list[int] | TooFull:
    """Where the pieces of a schedule begin (units); or which piece does not fit.

    `working` is `Chain.working`; the limit is bytes per device.
    """
    m = chain.micro_batches
    held = in_flight(schedule, m)
    chunks = schedule.chunks
    kept = chain.kept + chain.messages.kept(schedule, chain.segments)
    moment = working + chunks * chain.messages.moment(schedule)
    moment = moment + chain.staging.spans(chain.segments)
    seconds = _in_rhythm(chain)

    def memory(piece: int) -> Array:
        of_piece = chain.state + held[piece % schedule.stages] / chunks * kept
        return chunks * of_piece + moment + chain.given_bytes

    return best_cuts(seconds, schedule.stages * chunks, memory, memory_limit)


def _in_rhythm(chain: Chain) -> Array:
    """[start, end] seconds of a micro-batch, with its share of the optimizer."""
    return chain.seconds + chain.optimizer_s / chain.micro_batches


def unevenness(chain: Chain, schedule: Schedule) -> float:
    """By which share the slowest piece takes longer than the mean, cut as evenly as can be."""
    pieces = schedule.stages * schedule.chunks
    seconds = _in_rhythm(chain)
    starts = best_cuts(seconds, pieces, lambda _: np.zeros_like(seconds), np.inf)
    assert not isinstance(starts, TooFull)
    slowest = max(float(seconds[bounds]) for bounds in bounds_of(starts, len(chain)))
    whole = float(seconds[0, len(chain)])
    return slowest * pieces / whole - 1 if whole else 0.0


def best_cuts(
    seconds: Array, pieces: int, memory: Bytes, memory_limit: float
) -> list[int] | TooFull:
    """Starts of the pieces with the least maximum of seconds, then the least sum of squares.

    `seconds[i, j]` is of a piece from `i` up to `j`; every piece has at least one unit.
    """
    n = len(seconds) - 1
    if pieces > n:
        raise ValueError(f"{pieces} pieces of {n} units")
    empty = np.tri(n + 1, dtype=np.bool_)
    never = [np.where(empty | (memory(k) > memory_limit), np.inf, 0.0) for k in range(pieces)]
    slowest = np.full(n + 1, np.inf)
    slowest[0] = 0.0
    for k in range(pieces):
        reached = slowest
        slowest = (np.maximum(slowest[:, None], seconds) + never[k]).min(axis=0)
        if not np.isfinite(slowest).any():
            return _too_full(k, reached, empty, memory(k))
    if not np.isfinite(slowest[n]):
        return _too_full(pieces - 1, reached, empty | (np.arange(n + 1) < n)[None, :], memory(k))
    limit = slowest[n] * (1 + 1e-9)
    squares = np.where(seconds > limit, np.inf, seconds**2)
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    through: list[NDArray[np.int64]] = []
    for k in range(pieces):
        cost = best[:, None] + squares + never[k]
        through.append(cost.argmin(axis=0))
        best = cost.min(axis=0)
    ends = [n]
    for came in reversed(through):
        ends.append(int(came[ends[-1]]))
    return ends[::-1][:-1]


def _too_full(piece: int, reached: Array, empty: NDArray[np.bool_], memory: Array) -> TooFull:
    """Of the places where a piece can begin, the bytes of the leanest piece."""
    possible = np.isfinite(reached)[:, None] & ~empty
    return TooFull(piece, float(memory[possible].min()) if possible.any() else float("inf"))


def in_flight(schedule: Schedule, micro_batches: int) -> list[float]:
    """Micro-batches (of all chunks together) whose activations each stage holds at most."""
    p, v, m = schedule.stages, schedule.chunks, micro_batches
    if schedule.kind == "gpipe":
        return [float(m)] * p
    if schedule.kind == "zero_bubble":
        return [float(min(p, m))] * p
    if v == 1:
        return [float(min(p - stage, m)) for stage in range(p)]
    rounds = max(1, m // p)
    return [float(min(2 * (p - s - 1) + (v - 1) * (m // rounds) + 1, m * v)) for s in range(p)]


def bounds_of(starts: Sequence[int], units: int) -> list[tuple[int, int]]:
    """(start, end) of every piece."""
    return list(zip(starts, [*starts[1:], units], strict=True))
