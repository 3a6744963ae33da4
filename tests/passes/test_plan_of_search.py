"""A plan says what it is: its step is its timeline's, its peak is within the limit, its gap is known."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.cost.cluster import parse_cluster
from autopar.passes.search import search
from autopar.plan import Plan, plan_from_json
from tests.passes.test_propose import stack


def planned(spec: str, limit: float | None = None, **how: Any) -> Plan:
    made = stack().capture
    return search(
        stack().graph,
        made.fingerprint,
        made.symbols,
        parse_cluster(spec),
        memory_limit=limit,
        **how,
    )


def free() -> Plan:
    return planned("cpu:4")


CASES: dict[str, tuple[float | None, dict[str, Any]]] = {
    "free": (None, {}),
    "recomputed": (0.8, {"recompute": ("none", "selective", "full")}),
    "in micro-batches": (0.75, {"micro_batches": (1, 2, 4)}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_says_what_it_is(name: str) -> None:
    share, how = CASES[name]
    limit = None if share is None else share * free().predicted.memory_bytes
    made = planned("cpu:4", limit, **how)
    predicted, timeline = made.predicted, made.timeline
    assert timeline is not None
    assert predicted.time_s == timeline.step_s
    assert predicted.time_s == pytest.approx(
        predicted.compute_s + predicted.comm_s + predicted.optimizer_s
    )
    assert made.memory_limit is not None
    assert predicted.memory_bytes == int(timeline.peak_bytes) <= made.memory_limit
    assert predicted.memory_bytes == pytest.approx(sum(predicted.memory_parts.values()), abs=8)
    if limit is not None:
        assert made.memory_limit == limit
        assert made.micro_batches > 1 or made.recompute or made.predicted.time_s >= predicted.time_s
    assert 0 <= made.gap < 0.5
    again = plan_from_json(made.to_json())
    assert again == made
    assert (again.timeline, again.micro_batches, again.recompute) == (
        made.timeline,
        made.micro_batches,
        made.recompute,
    )


@pytest.mark.parametrize("strategy", ["data", "zero", "tensor"])
def test_traffic_is_that_of_a_whole_step(strategy: str) -> None:
    """Of all micro-batches: by collective as much as the prediction says is sent."""
    made = planned("cpu:4", strategy=strategy, micro_batches=(4,))
    assert made.micro_batches == 4
    sent: dict[str, int] = {}
    for one in made.traffic:
        sent[one.collective] = sent.get(one.collective, 0) + one.sent_bytes
    assert sent.keys() == made.predicted.comm_bytes.keys()
    for kind, nbytes in made.predicted.comm_bytes.items():
        assert sent[kind] == pytest.approx(nbytes, rel=0.02), kind
