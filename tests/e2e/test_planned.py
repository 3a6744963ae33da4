"""Four ranks that follow a plan made by decree equal one device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autopar.ir.mesh import Mesh
from autopar.passes.rules_of import rules_of
from tests.e2e.pool import RankPool
from tests.e2e.training import make_reference, train_and_compare
from tests.e2e.verify import LIMIT_FLOAT64
from tests.followed_plans import following, plan_of_decisions
from tests.simulate import concrete, zoo_subject

pytestmark = pytest.mark.multiprocess
STEPS = 3


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.parametrize("model", ["llama", "gpt_outside", "gpt_attention_dropout"])
def test_data_and_sequence(model: str, four_ranks: RankPool, tmp_path: Path) -> None:
    subject = zoo_subject(model)
    graph = concrete(subject)
    mesh = Mesh.of(dp=2, sp=2)
    decisions = following(graph, rules_of(graph), mesh, {"dp": 0, "sp": 1})
    plan = plan_of_decisions(subject, decisions)
    torch.set_num_threads(1)
    file = tmp_path / "reference"
    make_reference(model, "float64", STEPS, file)
    outcome = four_ranks.run(
        train_and_compare, model, "auto", "float64", STEPS, str(file), plan.to_json()
    )[0]
    assert outcome.mesh == "dp=2 x sp=2"
    assert outcome.loss <= LIMIT_FLOAT64
    assert outcome.gradient <= LIMIT_FLOAT64, outcome.worst
    assert outcome.parameter <= LIMIT_FLOAT64, outcome.worst
