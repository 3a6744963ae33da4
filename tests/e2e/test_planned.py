"""Four ranks that follow a plan made by decree equal one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autopar.ir.mesh import Mesh
from autopar.passes.blocks import find_blocks
from autopar.passes.rules_of import rules_of
from autopar.plan import Plan, Recompute
from tests.e2e.pool import RankPool
from tests.e2e.training import make_reference, train_and_compare
from tests.e2e.verify import LIMIT_FLOAT64
from tests.followed_plans import following, plan_of_decisions
from tests.simulate import concrete, plan_of, zoo_subject

pytestmark = pytest.mark.multiprocess
STEPS = 2


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.parametrize("model", ["llama", "gpt_attention_dropout"])
def test_data_and_sequence(model: str, four_ranks: RankPool, tmp_path: Path) -> None:
    subject = zoo_subject(model)
    graph = concrete(subject)
    mesh = Mesh.of(dp=2, sp=2)
    decisions = following(graph, rules_of(graph), mesh, {"dp": 0, "sp": 1})
    equals_one_device(model, plan_of_decisions(subject, decisions), four_ranks, tmp_path)


@pytest.mark.parametrize(
    ("model", "strategy", "full", "selective"),
    [
        ("gpt_attention_dropout", "data", 2, 0),
        ("gpt_attention_dropout", "zero", 1, 1),
        ("llama", "tensor", 0, 2),
    ],
)
def test_recomputed(
    model: str, strategy: str, full: int, selective: int, four_ranks: RankPool, tmp_path: Path
) -> None:
    subject = zoo_subject(model)
    ((first, _, copies),) = find_blocks(concrete(subject)).regions
    recompute = (Recompute(first.name, copies, full, selective),)
    plan = replace(plan_of(subject, 4, strategy), recompute=recompute)
    equals_one_device(model, plan, four_ranks, tmp_path)


def equals_one_device(model: str, plan: Plan, ranks: RankPool, folder: Path) -> None:
    torch.set_num_threads(1)
    file = folder / "reference"
    make_reference(model, "float64", STEPS, file)
    outcome = ranks.run(
        train_and_compare, model, "auto", "float64", STEPS, str(file), plan.to_json()
    )[0]
    assert outcome.mesh == str(plan.mesh)
    assert outcome.recomputed == sum(r.full + r.selective for r in plan.recompute)
    assert outcome.loss <= LIMIT_FLOAT64
    assert outcome.gradient <= LIMIT_FLOAT64, outcome.worst
    assert outcome.parameter <= LIMIT_FLOAT64, outcome.worst
