"""Ratios of interleaved turns."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.paired import paired_ratio


def test_what_the_machine_does_meanwhile_cancels() -> None:
    slow = [1.0, 3.0, 1.5, 2.0, 1.0, 4.0]  # of each turn
    a = [[1.1 * s, 1.1 * s, 9 * s] for s in slow]
    b = [[1.0 * s, 1.0 * s, 1.0 * s] for s in slow]
    found = paired_ratio(a, b)
    assert found.median == found.low == found.high == pytest.approx(1.1)
    assert str(found) == "1.100 (1.100 to 1.100)"


def test_the_interval_leaves_out_as_many_turns_as_its_confidence_allows() -> None:
    ones = [[1.0]] * 12
    found = paired_ratio([[float(i)] for i in range(12)], ones)
    # P(at most 2 of 12 below the median) is 0.019 on either side, of 3 it is 0.073.
    assert (found.median, found.low, found.high) == (5.5, 2.0, 9.0)
    few = paired_ratio([[float(i)] for i in range(5)], ones[:5])
    assert (few.low, few.high) == (0.0, 4.0)


def test_the_interval_holds_the_true_ratio_nineteen_times_in_twenty() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(400):
        a = [[math.exp(draw.gauss(0.0, 0.2))] for _ in range(9)]
        found = paired_ratio(a, [[1.0]] * 9)
        hits += found.low <= 1.0 <= found.high
    assert hits >= 0.93 * 400


def test_turns_must_pair() -> None:
    with pytest.raises(ValueError, match="2 and 1 turns"):
        paired_ratio([[1.0], [1.0]], [[1.0]])
