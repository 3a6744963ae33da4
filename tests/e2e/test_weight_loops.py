"""What loops do with weights beside training them gives one device's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.e2e.loops import differences
from tests.e2e.pool import RankPool
from tests.e2e.weight_loops import (
    LOOPS,
    WRITES,
    refused,
    refused_then_right,
    refused_without_memory,
    run_weight_loop,
)
from tests.e2e.weight_ops import differing

pytestmark = pytest.mark.multiprocess
PLANS: dict[str, dict[str, Any]] = {
    "zero": {"strategy": "zero"},
    "tensor": {"strategy": "tensor"},
    "pipeline": {"strategy": "pipeline", "stages": 2, "schedule": "1f1b", "micro_batches": 2},
}
FAST = {
    "kept_from_before": "tensor",
    "data_is_set": "tensor",
    "drawn_again": "zero",
    "ordinary_tensors": "tensor",
    "values_change": "pipeline",
    "notes_of_rank_zero": "tensor",
    "layers_before_the_first_call": "zero",
    "copied_with_gradients": "zero",
    "wrong_indices": "zero",
    "on_one_rank": "pipeline",
    "printed": "tensor",
    "written_from_numpy": "pipeline",
}
CASES = [
    pytest.param(name, plan, marks=[] if FAST[name] == plan else [pytest.mark.slow])
    for name in LOOPS
    for plan in PLANS
]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_loop_is_unchanged(name: str, plan: str, two_ranks: RankPool) -> None:
    torch.set_num_threads(1)
    reference = run_weight_loop(name, None)
    first, second = two_ranks.run(run_weight_loop, name, PLANS[plan], timeout_s=120)
    assert not list(differences(first, reference, 1e-9))
    assert not list(differences(second, first, 0.0))


@pytest.mark.parametrize("plan", PLANS)
def test_what_a_plan_cannot_follow_is_refused(plan: str, two_ranks: RankPool) -> None:
    for shape, *values, layer in two_ranks.run(refused, PLANS[plan]):
        assert "is given data of shape (4, 8), which the plan does not know" in shape
        assert len(values) == len(WRITES)
        for said in values:
            assert "rank 1 wrote other values to the parameter up.weight (or its gradient)" in said
        assert "the parameter up.weight came into the model after its plan was made" in layer


@pytest.mark.parametrize("plan", PLANS)
def test_ops_on_weights_are_unchanged(plan: str, two_ranks: RankPool) -> None:
    assert two_ranks.run(differing, PLANS[plan]) == [[], []]


def test_what_has_no_memory_is_refused(two_ranks: RankPool) -> None:
    for said in two_ranks.run(refused_without_memory):
        assert "made of parameters before the model's first call, which has no memory" in said
        assert "model.autopar.prepare(batch)" in said


def test_models_that_differ_between_ranks_are_refused_and_survived(two_ranks: RankPool) -> None:
    torch.set_num_threads(1)
    one_device = run_weight_loop("wrong_indices", None)["losses"]
    for rank, (said, losses) in enumerate(two_ranks.run(refused_then_right, timeout_s=120)):
        assert len(said) == 3
        assert all("the captured model on rank 1 differs from rank 0's" in s for s in said[:2])
        assert "attributes, globals and hooks" in said[0]
        if rank:
            assert "could not be made on rank 0: " in said[2]
        assert "a model needs a title" in said[2]
        assert losses == pytest.approx(one_device, abs=1e-12)
