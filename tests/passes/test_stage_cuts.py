"""Cuts of a chain against every cut that there is, and the memory that early stages hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cost.schedules import Schedule, Work, execute, peak_in_flight
from autopar.passes.stage_cuts import TooFull, best_cuts, bounds_of, in_flight

seconds_of_units = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def spans(each: Sequence[float]) -> np.ndarray:  # type: ignore[type-arg]
    total = np.concatenate([[0.0], np.cumsum(np.asarray(each, dtype=np.float64))])
    return np.triu(total[None, :] - total[:, None])


def all_cuts(units: int, pieces: int) -> list[list[int]]:
    return [[0, *inner] for inner in itertools.combinations(range(1, units), pieces - 1)]


@given(seconds_of_units, st.data())
def test_cuts_are_the_best_of_all_that_fit(units: list[int], data: st.DataObject) -> None:
    """The least slowest piece, then the least sum of squares; none where none fits."""
    n = len(units)
    pieces = data.draw(st.integers(1, n))
    nbytes = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    held = data.draw(st.lists(st.integers(1, 4), min_size=pieces, max_size=pieces))
    limit = data.draw(st.integers(0, 60))
    made = best_cuts(spans(units), pieces, lambda k: held[k] * spans(nbytes), limit)

    fitting = []
    for starts in all_cuts(n, pieces):
        bounds = bounds_of(starts, n)
        if all(held[k] * sum(nbytes[a:b]) <= limit for k, (a, b) in enumerate(bounds)):
            times = [sum(units[a:b]) for a, b in bounds]
            fitting.append((max(times), sum(t * t for t in times), starts))
    if not fitting:
        assert isinstance(made, TooFull)
        assert made.needs_bytes > limit
        return
    assert isinstance(made, list)
    times = [sum(units[a:b]) for a, b in bounds_of(made, n)]
    assert (max(times), sum(t * t for t in times)) == min(fitting)[:2]
    assert made in [starts for _, _, starts in fitting]


@given(seconds_of_units, st.data())
def test_more_memory_is_never_slower(units: list[int], data: st.DataObject) -> None:
    n = len(units)
    pieces = data.draw(st.integers(1, n))
    nbytes = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    slowest = []
    for limit in (5, 10, 20, 40, math.inf):
        made = best_cuts(spans(units), pieces, lambda k: (pieces - k) * spans(nbytes), limit)
        if isinstance(made, TooFull):
            slowest.append(math.inf)
        else:
            slowest.append(max(sum(units[a:b]) for a, b in bounds_of(made, n)))
    assert slowest == sorted(slowest, reverse=True)
    assert slowest[-1] < math.inf


def test_embedding_and_head_are_balanced_in() -> None:
    """A head as long as three layers leaves its stage fewer of them."""
    made = best_cuts(spans([1, 2, 2, 2, 2, 2, 2, 6]), 2, lambda _: spans([0] * 8), 0)
    assert made == [0, 5]  # 9 and 10 seconds


def test_the_first_stage_of_1f1b_has_fewer_layers_where_memory_is_short() -> None:
    layers, held = spans([1] * 12), in_flight(Schedule(4), 8)
    assert held == [4, 3, 2, 1]
    even = best_cuts(layers, 4, lambda k: held[k] * layers, 12)
    assert even == [0, 3, 6, 9]
    short = best_cuts(layers, 4, lambda k: held[k] * layers, 9)
    assert short == [0, 2, 5, 8]
    assert best_cuts(layers, 4, lambda k: held[k] * layers, 3) == TooFull(0, 4.0)


@pytest.mark.parametrize(
    ("schedule", "micro_batches"),
    [
        (Schedule(4, 1, "1f1b"), 8),
        (Schedule(4, 1, "1f1b"), 2),
        (Schedule(3, 1, "gpipe"), 5),
        (Schedule(4, 2, "interleaved"), 8),
        (Schedule(2, 4, "interleaved"), 6),
        (Schedule(4, 1, "zero_bubble"), 8),
    ],
)
def test_in_flight_is_what_the_schedule_holds(schedule: Schedule, micro_batches: int) -> None:
    pieces = schedule.stages * schedule.chunks
    work = [Work(1.0, 1.0, 1.0 if schedule.kind == "zero_bubble" else 0.0, 1.0)] * pieces
    executed = execute(schedule, work, micro_batches)
    held = peak_in_flight(schedule, executed, work)
    allowed = in_flight(schedule, micro_batches)
    assert all(h <= a for h, a in zip(held, allowed, strict=True))
    assert held[0] == allowed[0]
