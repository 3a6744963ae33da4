"""Four real ranks that route tokens to experts and ids to rows equal one device."""

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
from tests.followed_plans import plan_of_decisions
from tests.routed_plans import routed_choices, routing
from tests.simulate import concrete, zoo_subject

pytestmark = pytest.mark.multiprocess
STEPS = 2

# What is routed: the vocabulary's rows and, in each of two layers, the ways to experts and back.
MODELS = {"moe_mask": 1, "moe_scatter": 5}


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.parametrize("model", MODELS)
def test_routed(model: str, four_ranks: RankPool, tmp_path: Path) -> None:
    subject = zoo_subject(model)
    graph = concrete(subject)
    decisions = routing(graph, rules_of(graph), Mesh.of(dp=4), "dp")
    assert len(routed_choices(decisions)) >= MODELS[model]
    plan = plan_of_decisions(subject, decisions)
    stored = {p.sharding for name, p in plan.params.items() if "inner" in name}
    assert stored == {"[dp, -, -]"}, "every rank has experts of its own"
    assert plan.params["embed.weight"].sharding == "[dp, -]"
    torch.set_num_threads(1)
    file = tmp_path / "reference"
    make_reference(model, "float64", STEPS, file)
    outcome = four_ranks.run(
        train_and_compare, model, "auto", "float64", STEPS, str(file), plan.to_json()
    )[0]
    assert outcome.mesh == "dp=4"
    assert outcome.loss <= LIMIT_FLOAT64
    assert outcome.gradient <= LIMIT_FLOAT64, outcome.worst
    assert outcome.parameter <= LIMIT_FLOAT64, outcome.worst
