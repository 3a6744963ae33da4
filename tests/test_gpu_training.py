"""When the benchmark of training fails."""

from __future__ import annotations

import math

import pytest

from benchmarks.gpu.training import LOSS_TOLERANCE, SETTINGS, Row, failed, loss_difference


def row(speed: float, difference: float) -> Row:
    times = (8, 1.0, 1.0, speed, speed, speed, 8.0, None)
    return Row("gpt2-124m", "autocast", *times, difference, 0.1)


@pytest.mark.parametrize(
    ("speed", "difference", "fails"),
    [(1.0, 0.0, False), (1.0, 0.1, False), (0.9, 0.0, True), (1.0, 0.11, True),
     (1.0, math.inf, True), (1.0, math.nan, True)],
)  # fmt: skip
def test_slow_or_other_losses_fail(speed: float, difference: float, fails: bool) -> None:
    assert failed(row(speed, difference), 0.99) == fails


def test_losses_that_are_no_numbers_differ() -> None:
    assert loss_difference([3.0, 2.0], [3.0, 2.5]) == 0.5
    assert loss_difference([math.nan, 2.0], [math.nan, 2.0]) == math.inf


def test_every_setting_has_a_limit() -> None:
    assert {precision for precision, _ in SETTINGS.values()} <= set(LOSS_TOLERANCE)
