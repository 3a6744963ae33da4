"""When the benchmark of training fails."""

from __future__ import annotations

import math

import pytest

from benchmarks.gpu.training import DRIFT, ROUNDING, SETTINGS, Row, failed, loss_limits, worst_step


def row(speed: float, difference: float) -> Row:
    times = (8, 1.0, 1.0, speed, speed, speed, 8.0, None)
    return Row("gpt2-124m", "autocast", *times, 3, difference, 0.1)


@pytest.mark.parametrize(
    ("speed", "difference", "fails"),
    [(1.0, 0.0, False), (1.0, 0.1, False), (0.9, 0.0, True), (1.0, 0.11, True),
     (1.0, math.inf, True), (1.0, math.nan, True)],
)  # fmt: skip
def test_slow_or_other_losses_fail(speed: float, difference: float, fails: bool) -> None:
    assert failed(row(speed, difference), 0.99) == fails


def test_the_first_step_is_held_tightly_and_later_ones_by_how_far_the_loss_has_gone() -> None:
    rounding, drift = ROUNDING["autocast"], DRIFT["autocast"]
    assert loss_limits([8.0, 4.0, 6.0], "autocast") == [
        8 * rounding,
        4 * rounding + 4 * drift,
        6 * rounding + 4 * drift,
    ]


def test_the_step_farthest_beyond_its_limit_is_found() -> None:
    compiled = [8.0, 7.0, 6.0, 5.0]
    limits = loss_limits(compiled, "autocast")
    off = [0.5, 0.5, 1.5, 0.5]
    decorated = [x + share * limit for x, share, limit in zip(compiled, off, limits, strict=True)]
    step, apart, limit = worst_step(decorated, compiled, "autocast")
    assert (step, limit) == (2, limits[2]) and apart == pytest.approx(1.5 * limit)
    decorated[0] += 0.02  # what would be little later on
    assert worst_step(decorated, compiled, "autocast")[0] == 2
    decorated[2] = compiled[2]
    assert worst_step(decorated, compiled, "autocast")[0] == 0


@pytest.mark.parametrize("precision", ROUNDING)
def test_a_model_that_does_not_train_fails(precision: str) -> None:
    _, apart, limit = worst_step([8.0] * 4, [8.0, 7.5, 7.0, 6.5], precision)
    assert apart > limit


def test_losses_that_are_no_numbers_differ() -> None:
    assert worst_step([3.0, math.nan], [3.0, math.nan], "bf16") == (1, math.inf, 0.0)
    assert worst_step([3.0, 2.0], [math.inf, 2.0], "bf16") == (0, math.inf, 0.0)


def test_every_setting_has_a_limit() -> None:
    precisions = {precision for precision, _ in SETTINGS.values()}
    assert precisions == set(ROUNDING) == set(DRIFT)
