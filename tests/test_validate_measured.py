from __future__ import annotations

import pytest

from benchmarks.validate_measured import (
    Row,
    auto_over_best,
    kendall,
    ordered_rightly,
    row_of,
    summarise,
)


def row(model: str, strategy: str, predicted: float, measured: float) -> Row:
    times = ({"step": predicted}, {"step": measured})
    return Row(model, (strategy,), "dp=4", *times, steps=5, spread=0.0, foreign=0.0)


def test_kendall() -> None:
    assert kendall([(1, 1), (2, 2), (3, 3)]) == 1.0
    assert kendall([(1, 3), (2, 2), (3, 1)]) == -1.0
    assert kendall([(1, 1), (2, 3), (3, 2)]) == pytest.approx(1 / 3)
    assert kendall([(1, 1)]) == 1.0


def test_a_row_has_medians_and_what_is_neither_communication_nor_optimizer() -> None:
    measured = {
        "step": [1.0, 9.0, 1.2],
        "forward": [0.3, 0.3, 0.3],
        "backward": [0.5, 0.5, 0.5],
        "optimizer": [0.1, 0.1, 0.1],
        "comm": [0.2, 0.2, 0.2],
        "wait": [0.1, 0.1, 0.1],
    }
    plan = {
        "strategies": ["data", "auto"],
        "mesh": "dp=4",
        "predicted": {"step": 1.5},
        "measured": measured,
        "foreign": [0.0, 0.02],
    }
    made = row_of("gpt", plan)
    assert made.measured["step"] == 1.2
    assert made.error == pytest.approx(0.25)
    assert made.measured["compute"] == pytest.approx(0.6)
    assert (made.steps, made.foreign) == (3, 0.02)
    assert made.turns == ((1.0,), (9.0,), (1.2,))
    more = row_of("gpt", {**plan, "steps_per_turn": 3, "deciding": [0.9, 1.0, 1.1]})
    assert more.turns == ((1.0, 9.0, 1.2), (0.9, 1.0, 1.1))
    assert more.measured["step"] == 1.2


def test_the_summary_names_every_goal_that_is_missed() -> None:
    good = [row(f"m{i // 2}", ("auto", "data")[i % 2], 1.1 * i + 1, i + 1) for i in range(24)]
    assert summarise(good)["missed"] == []
    bad = [row("m", "auto", 2.0, 1.5), row("m", "data", 3.0, 1.0)]
    found = summarise(bad)
    ratio = auto_over_best(bad)
    assert ratio is not None
    assert ratio.median == 1.5
    assert found["pairs"] == 2
    assert len(found["missed"]) == 5


def test_the_chosen_plan_is_compared_turn_by_turn() -> None:
    """The machine was slow in every other turn, and the chosen plan's were not the same ones."""
    step = {"step": 1.0}

    def timed(strategy: str, *turns: float) -> Row:
        pairs = tuple((t, t) for t in turns)
        return Row("m", (strategy,), "tp=4", step, step, 8, 0.0, 0.0, turns=pairs)

    rows = [timed("auto", 1.0, 2.0, 1.0, 2.1), timed("tensor", 1.0, 2.0, 1.0, 2.0)]
    found = auto_over_best([*rows, timed("data", 3.0, 3.0, 3.0, 3.0)])
    assert found is not None
    assert found.median == 1.0
    assert auto_over_best(rows[1:]) is None
    assert auto_over_best(rows[:1]) is None


def test_only_plans_that_are_told_apart_are_held_against_their_order() -> None:
    def timed(predicted: float, *turns: float) -> Row:
        pairs = tuple((t, t) for t in turns)
        seconds = {"step": predicted}, {"step": turns[0]}
        return Row("m", (str(turns),), "tp=4", *seconds, 8, 0.0, 0.0, turns=pairs)

    fast, same = timed(2.0, 1.0, 1.1, 1.0), timed(1.0, 1.1, 1.0, 1.1)
    slow = timed(3.0, 4.0, 4.0, 4.0, 4.0)  # of which the last turn has no counterpart
    assert ordered_rightly([fast, same]) is None
    assert ordered_rightly([fast, same, slow]) == 1.0
    assert ordered_rightly([fast, timed(1.5, 4.0, 4.0, 4.0)]) == -1.0
