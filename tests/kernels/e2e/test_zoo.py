"""The zoo on two ranks with all of autopar's kernels, interpreted, equals one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autopar.cost.cluster import parse_cluster
from autopar.ir.mesh import Mesh
from autopar.passes.blocks import find_blocks
from autopar.passes.prepare import prepare
from autopar.passes.rules_of import rules_of
from autopar.passes.search import search
from autopar.passes.specialise import specialise
from autopar.plan import Plan, Recompute
from tests.e2e.piped_plans import piped_plan, zoo_capture
from tests.e2e.pool import RankPool
from tests.e2e.training import make_reference
from tests.e2e.verify import LIMIT_FLOAT64, LIMIT_LOSS_FLOAT32
from tests.followed_plans import plan_of_decisions
from tests.routed_plans import routing
from tests.simulate import concrete, zoo_subject
from tests.zoo import ZOO

from .zoo import Outcome, compare_with_kernels

pytestmark = pytest.mark.multiprocess
STEPS = 2
ENTROPY = {"cross_entropy", "cross_entropy_combine", "cross_entropy_backward"}
DROPOUT = {"dropout", "dropout_backward"}
PACKING = {"pack", "unpack"}

# What must have been launched; the rest of the zoo is slow.
FAST: dict[tuple[str, str], set[str]] = {
    ("gpt_attention_dropout", "zero"): {*DROPOUT, *ENTROPY, *PACKING, "adamw"},
    ("llama", "data"): {*ENTROPY, "pack", "adamw"},
    ("llama", "tensor"): {"all_reduce_norm", "adamw"},
    ("moe", "zero"): {*ENTROPY, *PACKING, "adamw"},
    ("rec", "tensor"): {"adamw"},
    ("resnet", "data"): {"pack", "adamw"},
}
SLOW = [
    (name, strategy)
    for name in ZOO
    for strategy in ("data", "zero", "tensor")
    if (name, strategy) not in FAST
]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def compared(
    model: str,
    strategy: str,
    pool: RankPool,
    file: Path,
    dtype: str = "float64",
    plan: Plan | None = None,
) -> Outcome:
    torch.set_num_threads(1)
    make_reference(model, dtype, STEPS, file)
    text = plan.to_json() if plan is not None else None
    case = (model, strategy, dtype, STEPS, str(file), text)
    outcome = pool.run(compare_with_kernels, *case, timeout_s=400)[0]
    assert isinstance(outcome, Outcome)
    assert not outcome.fallbacks
    return outcome


def check(outcome: Outcome) -> None:
    assert outcome.loss <= LIMIT_FLOAT64
    assert outcome.gradient <= LIMIT_FLOAT64, outcome.worst
    assert outcome.parameter <= LIMIT_FLOAT64, outcome.worst


@pytest.mark.parametrize(("model", "strategy"), FAST)
def test_float64_equals_one_device(
    model: str, strategy: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    outcome = compared(model, strategy, two_ranks, tmp_path / "reference")
    check(outcome)
    assert FAST[model, strategy] <= set(outcome.ran)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "strategy"), SLOW)
def test_the_rest_of_the_zoo(
    model: str, strategy: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    outcome = compared(model, strategy, two_ranks, tmp_path / "reference")
    if outcome.inapplicable:
        pytest.skip(outcome.inapplicable)
    check(outcome)
    assert outcome.ran


@pytest.mark.slow
def test_float32_losses_equal_one_device(two_ranks: RankPool, tmp_path: Path) -> None:
    model = "gpt_attention_dropout"
    outcome = compared(model, "data", two_ranks, tmp_path / "reference", "float32")
    assert outcome.loss <= LIMIT_LOSS_FLOAT32
    assert {*DROPOUT, *ENTROPY, "adamw"} <= set(outcome.ran)


def test_tokens_are_routed_to_experts_by_the_kernels(two_ranks: RankPool, tmp_path: Path) -> None:
    subject = zoo_subject("moe_scatter")
    graph = concrete(subject)
    decisions = routing(graph, rules_of(graph), Mesh.of(dp=2), "dp")
    plan = plan_of_decisions(subject, decisions)
    outcome = compared("moe_scatter", "auto", two_ranks, tmp_path / "reference", plan=plan)
    check(outcome)
    assert "permute" in outcome.ran


def test_pieces_and_micro_batches_of_a_pipeline(two_ranks: RankPool, tmp_path: Path) -> None:
    model = "gpt_attention_dropout"
    plan = piped_plan(zoo_capture(model, "float64"), 2, 2, micro_batches=2)
    outcome = compared(model, "auto", two_ranks, tmp_path / "reference", plan=plan)
    check(outcome)
    assert set(outcome.ran) >= DROPOUT


@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_blocks_that_are_computed_again(mode: str, two_ranks: RankPool, tmp_path: Path) -> None:
    model = "gpt_attention_dropout"
    plan = recomputed(model, **{mode: 2})
    outcome = compared(model, "auto", two_ranks, tmp_path / "reference", plan=plan)
    check(outcome)
    assert set(outcome.ran) >= DROPOUT


def recomputed(model: str, **counts: int) -> Plan:
    """Data parallelism on two ranks, in two micro-batches, whose blocks run again."""
    captured = zoo_capture(model, "float64")
    graph, where = prepare(captured.graph), parse_cluster("cpu:2")
    plan = search(graph, captured.fingerprint, captured.symbols, where, strategy="data")
    whole = specialise(graph, captured.symbols)
    first, _, copies = find_blocks(whole).regions[0]
    return replace(plan, micro_batches=2, recompute=(Recompute(first.name, copies, **counts),))
