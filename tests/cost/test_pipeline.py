"""Steps cut into stages and simulated on a pipeline."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost.cluster import parse_cluster
from autopar.cost.pipeline import simulate_pipeline, simulate_stages, transfer_s
from autopar.cost.schedules import Schedule
from autopar.cost.simulate import simulate
from autopar.cost.stages import balanced, layers_of, stages_of
from autopar.cost.step import COMPUTE, Part, Segment, Step
from autopar.errors import UserError

STATE = {"parameters": 100.0, "gradients": 100.0, "optimizer state": 200.0}


def op(name: str, forward_s: float = 1.0, **more: Any) -> Part:
    """An op whose backward takes two forwards, half of it for its weights."""
    more = {"backward_s": 2 * forward_s, "weight_s": forward_s, "gradient_bytes": 10.0, **more}
    return Part(name, "", COMPUTE, forward_s, saved_bytes=5.0, **more)


def model(
    copies: int = 8,
    micro_batches: int = 8,
    embedding: float = 0.0,
    head: float = 0.0,
    reduction: float = 0.0,
) -> Step:
    gradient = Part(
        "w:dp", "", "", 0.0, reduction, "all_reduce", "dp", 0, output_bytes=2.0**25, param="w",
        once=True, gradient_bytes=10.0,
    )  # fmt: skip
    block = (op("mlp", gradient_bytes=0.0, deps=(-1,), leaves=True),)
    parts = (gradient, op("mlp", gradient_bytes=0.0, deps=(0, -1), leaves=True))
    segments = [
        Segment("embedding", (op("embedding", embedding),)),
        Segment("block", parts if reduction else block, copies, input_bytes=1e6, block="block"),
        Segment("head", (op("head", head),)),
    ]
    return Step(tuple(segments), 4.0, STATE, micro_batches)


def test_stages_are_balanced_and_complete() -> None:
    whole = model(copies=8, embedding=1.0, head=2.0)
    stages = stages_of(whole, 4)
    # Embedding 3 s, layers 3 s each, head 6 s: 33 s on four stages, at most 9 s each.
    assert [[(s.name, s.copies) for s in stage.segments] for stage in stages] == [
        [("embedding", 1), ("block", 1)],
        [("block", 3)],
        [("block", 3)],
        [("block", 1), ("head", 1)],
    ]
    for name in STATE:
        assert sum(s.state_bytes[name] for s in stages) == pytest.approx(STATE[name])
    assert sum(s.optimizer_s for s in stages) == pytest.approx(4.0)
    assert len(layers_of(whole)) == 8


def test_layers_per_stage() -> None:
    stages = stages_of(model(), 2, 2, layers_per_stage=[1, 2, 2, 3])
    assert [sum(s.copies for s in stage.segments if s.block) for stage in stages] == [1, 2, 2, 3]
    with pytest.raises(UserError, match="do not cut 8 layers into 2 pieces"):
        stages_of(model(), 2, layers_per_stage=[4, 3])
    with pytest.raises(UserError, match="need 16 layers, the model has 8"):
        stages_of(model(), 8, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4))
def test_no_cut_is_better(times: list[int], pieces: int) -> None:
    pieces = min(pieces, len(times))

    def cuts(left: list[int], k: int) -> list[list[int]]:
        if k == 1:
            return [[len(left)]]
        return [[i, *rest] for i in range(1, len(left) - k + 2) for rest in cuts(left[i:], k - 1)]

    def score(sizes: list[int]) -> tuple[int, int]:
        sums, at = [], 0
        for size in sizes:
            sums.append(sum(times[at : at + size]))
            at += size
        return max(sums), sum(s * s for s in sums)

    best = min(score(c) for c in cuts(times, pieces))
    assert score(balanced(times, pieces)) == best


def test_a_pipeline_of_equal_stages() -> None:
    """Eight layers of 3 s on four stages, eight micro-batches: a bubble of (4 - 1) * 6 s."""
    for kind, chunks, bubble in (
        ("gpipe", 1, 18.0), ("1f1b", 1, 18.0), ("interleaved", 2, 9.0), ("zero_bubble", 1, 6.0)
    ):  # fmt: skip
        made = simulate(model(), schedule=Schedule(4, chunks, kind))
        assert made.bubble_s == pytest.approx(bubble), kind
        assert made.compute_s == pytest.approx(8 * 6.0)
        assert made.step_s == pytest.approx(48.0 + bubble + made.optimizer_s)
        assert len(made.stages) == 4
        assert all(use.compute_s == pytest.approx(48.0) for use in made.stages)


def test_memory_of_stages() -> None:
    """Two layers of 5 saved bytes per stage: GPipe holds 8 micro-batches of them, 1F1B up to 4."""
    gpipe = simulate(model(), schedule=Schedule(4, 1, "gpipe"))
    onefb = simulate(model(), schedule=Schedule(4, 1, "1f1b"))
    assert [use.in_flight for use in gpipe.stages] == [8.0] * 4
    assert [use.in_flight for use in onefb.stages[1:3]] == [3.0, 2.0]
    inner = gpipe.stages[1].peak_bytes - onefb.stages[1].peak_bytes
    assert inner == pytest.approx((8 - 3) * 10.0)
    assert gpipe.peak_bytes == max(use.peak_bytes for use in gpipe.stages)
    assert gpipe.memory[:, 1].max() == pytest.approx(gpipe.peak_bytes)


def test_reductions_go_on_in_the_cooldown() -> None:
    """Reductions hide behind the last backward; the last layer's is waited for where it ends."""
    quick = simulate(model(reduction=0.5), schedule=Schedule(4))
    plain = simulate(model(), schedule=Schedule(4))
    # The first stage ends last: its own last reduction is all that is left over.
    wait = quick.step_s - quick.optimizer_s - (plain.step_s - plain.optimizer_s)
    assert wait == pytest.approx(0.5)
    assert quick.exposed_s == {"all_reduce dp": pytest.approx(0.5)}
    # The last stage ends nine seconds before: its reductions have no effect on the step.
    assert quick.stages[3].bubble_s == pytest.approx(plain.stages[3].bubble_s)


def test_transfers_between_hosts() -> None:
    cluster = parse_cluster("2x8xH100")
    near, far = transfer_s(cluster, 1e8, 0), transfer_s(cluster, 1e8, 1)
    assert 0 < near < far
    assert transfer_s(None, 1e8) == 0.0
    made = simulate_pipeline(model(), Schedule(2), cluster, level=1)
    alone = simulate_pipeline(model(), Schedule(2))
    assert made.step_s > alone.step_s
    blocking = simulate_pipeline(model(), Schedule(2), cluster, overlap_sends=False)
    assert blocking.step_s > made.step_s


def test_pieces_that_are_given() -> None:
    """Unequal pieces: the slowest is the pace, and a transfer of their own counts."""
    whole = model(copies=6, micro_batches=10)
    pieces = stages_of(whole, 2, layers_per_stage=[2, 4])
    made = simulate_stages(pieces, Schedule(2))
    # Layers of 3 s: the second stage works 10 x 12 s after 2 s of forward, 4 s of backward follow.
    assert made.step_s - made.optimizer_s == pytest.approx(120.0 + 2.0 + 4.0)
    assert made.step_s == simulate_pipeline(whole, Schedule(2), layers_per_stage=[2, 4]).step_s
    cluster = parse_cluster("2x8xH100")
    far = simulate_stages(pieces, Schedule(2), cluster, boundary_bytes=[1e11], level=1)
    sent = transfer_s(cluster, 1e11, 1)
    assert far.step_s > made.step_s + 2 * sent * 0.99


def test_sums_of_a_pipeline() -> None:
    for kind in ("gpipe", "1f1b", "zero_bubble"):
        made = simulate(
            model(embedding=0.5, head=3.0, reduction=1.0, micro_batches=6),
            parse_cluster("8xH100"),
            schedule=Schedule(4, 1, kind),
        )
        parts = made.compute_s + made.exposed_total_s + made.bubble_s + made.optimizer_s
        assert made.step_s == pytest.approx(parts)
        assert made.spans
