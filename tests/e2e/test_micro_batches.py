"""Plans of several micro-batches give one device's numbers in loops written for one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from autopar.cost.cluster import parse_cluster
from autopar.passes.blocks import find_blocks
from autopar.plan import Plan, Recompute
from autopar.planning import make_plan
from tests.e2e.loops import batch, differences
from tests.e2e.micro_loops import (
    LOOPS,
    Metrics,
    Normed,
    gpt,
    limited,
    normed,
    normed_batch,
    refused_gradient,
    refused_model,
    run_micro_loop,
    single,
)
from tests.e2e.pool import RankPool
from tests.simulate import concrete, subject_of

pytestmark = pytest.mark.multiprocess
TOLERANCE = {"autocast": 2e-2, "scaled": 5e-3}
FAST = {("dropout", "zero"), ("hooked", "data+tensor")}
STRATEGIES = {
    "dropout": ("zero", "data+tensor"),
    "ignored": ("zero", "tensor"),
    "resumed": ("zero",),
    "scaled": ("zero",),
}
CASES = [
    pytest.param(name, strategy, marks=[] if (name, strategy) in FAST else [pytest.mark.slow])
    for name in LOOPS
    for strategy in STRATEGIES.get(name, ("data+tensor",))
]


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def planned(module: Any, args: Any, strategy: str, micro_batches: int = 4) -> Plan:
    """The plan of a strategy on four ranks, with more micro-batches than it was made for."""
    cluster = parse_cluster("cpu:4")
    plan = make_plan(module, args, {}, cluster, strategy=strategy, micro_batches=[1])
    return replace(plan, micro_batches=micro_batches)


@cache
def plan_for(name: str, strategy: str) -> Plan:
    model = single() if name in ("autocast", "scaled") else gpt(DROPOUT.get(name, 0.0))
    if name in ("autocast", "scaled"):
        dtype = torch.bfloat16 if name == "autocast" else torch.float16
        with torch.autocast("cpu", dtype):
            return planned(model, batch(0), strategy)
    return planned(model, batch(0), strategy)


DROPOUT = {"dropout": 0.3, "evaluated": 0.2}


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_loop_is_unchanged(name: str, strategy: str, four_ranks: RankPool) -> None:
    torch.set_num_threads(1)
    reference = run_micro_loop(name, None)
    plan = plan_for(name, strategy).to_json()
    results = four_ranks.run(run_micro_loop, name, plan, timeout_s=300)
    assert not list(differences(results[0], reference, TOLERANCE.get(name, 1e-9)))
    for other in results[1:]:
        assert not list(differences(other, results[0], 0.0))


@pytest.mark.slow
@pytest.mark.parametrize(("full", "selective"), [(1, 1), (0, 2)])
def test_recomputed(full: int, selective: int, four_ranks: RankPool) -> None:
    """Blocks are recomputed inside every micro-batch; parameters gathered again, or kept."""
    torch.set_num_threads(1)
    plan = plan_for("dropout", "zero")
    ((first, _, copies),) = find_blocks(concrete(subject_of(gpt(0.3), batch(0), {}))).regions
    kept = {n: replace(s, regather=full > 0) for n, s in plan.params.items()}
    recompute = (Recompute(first.name, copies, full, selective),)
    plan = replace(plan, recompute=recompute, params=kept)
    results = four_ranks.run(run_micro_loop, "dropout", plan.to_json(), timeout_s=300)
    assert not list(differences(results[0], run_micro_loop("dropout", None), 1e-9))


def test_statistics_of_micro_batches_are_allowed_or_refused(four_ranks: RankPool) -> None:
    torch.set_num_threads(1)
    plan = planned(Normed().double(), normed_batch(0), "data", 2).to_json()
    results = four_ranks.run(normed, plan, 2)
    assert not list(differences(results[0], normed(None, 2), 1e-9))
    for said in four_ranks.run(refused_model, plan):
        assert "takes its mean and variance over the whole batch" in said
        assert "micro_loops.py:" in said and "micro_batch_statistics=True" in said


@pytest.mark.slow
def test_a_limit_on_memory_brings_micro_batches(four_ranks: RankPool) -> None:
    torch.set_num_threads(1)
    (count, got), *_ = four_ranks.run(limited, 600_000.0, timeout_s=300)
    assert count > 1
    assert not list(differences(got, limited(None)[1], 5e-5))


def test_only_the_loss_has_a_gradient(four_ranks: RankPool) -> None:
    x = torch.zeros(8, 8, dtype=torch.float64)
    plan = planned(Metrics().double(), (x, torch.arange(8) % 4), "data", 2).to_json()
    for said in four_ranks.run(refused_gradient, plan):
        assert "a gradient arrives for a result that is not the loss" in said
