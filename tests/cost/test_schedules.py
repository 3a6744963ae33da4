"""Pipeline schedules: their bubbles are those of their papers, and nothing runs before its input."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost.schedules import (
    BACKWARD,
    FORWARD,
    KINDS,
    WEIGHTS,
    Executed,
    Schedule,
    Work,
    execute,
    order,
    peak_in_flight,
)
from autopar.errors import UserError

SHAPES = [(2, 2), (2, 5), (4, 4), (4, 8), (8, 32)]


@pytest.mark.parametrize(("p", "m"), SHAPES)
def test_bubbles_are_those_of_the_papers(p: int, m: int) -> None:
    """Of an ideal time of 3 m: (p - 1) / m in GPipe and 1F1B, a third of it left by ZB-H1."""
    for kind in ("gpipe", "1f1b"):
        schedule = Schedule(p, 1, kind)
        executed = execute(schedule, [Work(1.0, 2.0)] * p, m)
        assert executed.makespan_s / (3 * m) - 1 == pytest.approx((p - 1) / m)
    forward, inputs, weights = 1.0, 1.25, 0.75
    work = [Work(forward, inputs, weights)] * p
    executed = execute(Schedule(p, 1, "zero_bubble"), work, m)
    assert executed.makespan_s - 3 * m == pytest.approx((p - 1) * (forward + inputs - weights))


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 32)])
@pytest.mark.parametrize("v", [2, 4])
def test_interleaving_divides_the_bubble(p: int, m: int, v: int) -> None:
    executed = execute(Schedule(p, v, "interleaved"), [Work(1 / v, 2 / v)] * (p * v), m)
    assert executed.makespan_s / (3 * m) - 1 == pytest.approx((p - 1) / (v * m))


def test_activations_in_flight() -> None:
    """GPipe holds all micro-batches, 1F1B as many as stages follow, ZB-H1 at most p."""
    p, m = 4, 12
    work = [Work(1.0, 1.0, 1.0, saved_bytes=5.0)] * p

    def held(kind: str) -> list[float]:
        schedule = Schedule(p, 1, kind)
        return peak_in_flight(schedule, execute(schedule, work, m), work)

    assert held("gpipe") == [60.0] * 4
    assert held("1f1b") == [20.0, 15.0, 10.0, 5.0]
    assert max(held("zero_bubble")) == 20.0


def test_the_order_of_1f1b_as_text() -> None:
    names = {FORWARD: "F", BACKWARD: "B"}
    text = [
        " ".join(f"{names[what]}{i}" for what, _, i in order(Schedule(3), stage, 4))
        for stage in range(3)
    ]
    assert text == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    interleaved = order(Schedule(2, 2, "interleaved"), 0, 4)
    made = " ".join(f"{names[what]}{i}{'ab'[c]}" for what, c, i in interleaved)
    assert made == "F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a"


def test_transfers() -> None:
    """A transfer of 0.5 s between two stages: hidden in the steady state, not at the ends."""
    work = [Work(1.0, 2.0, send_s=0.5, send_back_s=0.5), Work(1.0, 2.0, send_back_s=0.5)]
    beside = execute(Schedule(2, 1, "gpipe"), work, 6)
    assert beside.makespan_s == pytest.approx(18.0 + 3.0 + 2 * 0.5)
    blocking = execute(Schedule(2, 1, "gpipe"), work, 6, overlap_sends=False)
    # The first stage sends six times, the second gives six gradients back.
    assert blocking.makespan_s == pytest.approx(1.5 * 6 + 1.0 + 2.5 * 6 + 2.0)


def test_one_micro_batch_is_a_chain() -> None:
    for kind in KINDS:
        executed = execute(Schedule(3, 1, kind), [Work(1.0, 2.0)] * 3, 1)
        assert executed.makespan_s == 9.0


def test_bad_schedules() -> None:
    with pytest.raises(UserError, match="unknown pipeline schedule 'dapple'"):
        Schedule(2, 1, "dapple")
    with pytest.raises(UserError, match="has one chunk per stage, not 2"):
        Schedule(2, 2, "1f1b")
    with pytest.raises(UserError, match="at least one stage"):
        Schedule(0)
    with pytest.raises(UserError, match="7 micro-batches do not divide into rounds of 2 stages"):
        execute(Schedule(2, 2, "interleaved"), [Work(1.0, 1.0)] * 4, 7)


def check(schedule: Schedule, executed: Executed, work: list[Work], m: int) -> None:
    """Everything runs once, one thing at a time per stage, after what it needs."""
    p, last = schedule.stages, len(work) - 1
    when: dict[tuple[int, int, int], tuple[float, float]] = {}
    for stage in range(p):
        free = 0.0
        for (what, chunk, batch), start, end in zip(
            executed.ops[stage], executed.start[stage], executed.end[stage], strict=True
        ):
            assert start >= free - 1e-9
            free = end
            when[what, chunk * p + stage, batch] = (start, end)
    kinds = 3 if schedule.kind == "zero_bubble" else 2
    assert len(when) == kinds * m * len(work)
    for (what, piece, batch), (start, _) in when.items():
        if what == FORWARD and piece:
            assert start >= when[FORWARD, piece - 1, batch][1] + work[piece - 1].send_s - 1e-9
        if what == BACKWARD:
            assert start >= when[FORWARD, piece, batch][1] - 1e-9
            if piece < last:
                sent = when[BACKWARD, piece + 1, batch][1] + work[piece + 1].send_back_s
                assert start >= sent - 1e-9
        if what == WEIGHTS:
            assert start >= when[BACKWARD, piece, batch][1] - 1e-9


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.data())
def test_what_runs_is_possible(kind: str, p: int, v: int, rounds: int, data: st.DataObject) -> None:
    chunks = v if kind == "interleaved" else 1
    m = p * rounds if kind == "interleaved" else data.draw(st.integers(1, 9))
    seconds = st.sampled_from([0.1, 0.5, 1.0, 3.0])
    work = [
        Work(*(data.draw(seconds) for _ in range(3)), 1.0, data.draw(seconds), data.draw(seconds))
        for _ in range(p * chunks)
    ]
    schedule = Schedule(p, chunks, kind)
    executed = execute(schedule, work, m)
    check(schedule, executed, work, m)
    busy = max(
        sum(w.forward_s + w.backward_s + w.weights_s for w in work[s::p]) * m for s in range(p)
    )
    assert executed.makespan_s >= busy - 1e-9


def test_large_pipelines() -> None:
    executed = execute(Schedule(64, 2, "interleaved"), [Work(0.5, 1.0)] * 128, 128)
    assert executed.makespan_s == pytest.approx(3 * 128 + 63 * 3 / 2)
