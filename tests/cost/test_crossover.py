"""Who wins where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cost.crossover import NOBODY, Contender, allowed_sizes, crossover, winners
from autopar.cost.evaluate import Array


def line(name: str, latency: float, slope: float, memory: float = 0.0, legal: int = 0) -> Contender:
    def at(x: Array) -> tuple[Array, Array, np.ndarray]:
        return latency + slope * x, memory * x, x >= legal

    return Contender(name, at)


def no_limit(values: Array) -> Array:
    return np.full(len(values), np.inf)


def test_the_crossing_of_two_lines_is_found() -> None:
    spans = crossover([line("a", 1, 3), line("b", 10, 1)], np.geomspace(0.01, 1000, 30), no_limit)
    assert [s.winner for s in spans] == [0, 1]
    assert spans[0].high == pytest.approx(4.5, rel=1e-3)
    assert spans[1].low == pytest.approx(4.5, rel=1e-3)
    assert spans[1].high_s == pytest.approx(1010)


def test_whole_sizes_are_not_invented() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0])
    spans = crossover([line("a", 1, 3), line("b", 10, 1)], values, no_limit, exact=True)
    assert [(s.low, s.high, s.winner) for s in spans] == [(1, 4, 0), (8, 8, 1)]


def test_memory_and_legality_take_the_fastest_out() -> None:
    fast, lean = line("fast", 1, 1, memory=2, legal=3), line("lean", 50, 1, memory=1)
    spans = crossover(
        [fast, lean], np.arange(1.0, 100), lambda v: np.full(len(v), 60.0), exact=True
    )
    assert [(s.low, s.high, s.winner) for s in spans] == [
        (1, 2, 1), (3, 30, 0), (31, 60, 1), (61, 99, NOBODY)
    ]  # fmt: skip


def test_of_equals_the_first_wins() -> None:
    won, seconds = winners([line("a", 1, 1), line("b", 1, 1)], np.array([1.0, 5.0]), no_limit)
    assert won.tolist() == [0, 0]
    assert seconds.tolist() == [2, 6]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=4))
def test_allowed_sizes_divide_somewhere(units: list[int]) -> None:
    values = allowed_sizes(units, 1, 4096)
    assert (np.diff(values) > 0).all()
    assert all(any(v % unit == 0 for unit in units) for v in values)
    assert all(unit in values for unit in units)
