"""Each family of plans does what its name says, on the models of the zoo."""

from __future__ import annotations

from functools import cache

import pytest

from autopar.errors import UserError
from autopar.ir.graph import value_of
from autopar.ir.parse import parse_sharding
from autopar.ir.rule import Choice
from autopar.passes.families import Family, batch_factors
from autopar.passes.rules_of import rules_of
from autopar.plan import Plan
from tests.simulate import concrete, plan_of, zoo_subject

MODELS = ("mlp", "gpt_outside", "resnet")


@cache
def plan(name: str, strategy: str, ranks: int = 4) -> Plan:
    return plan_of(zoo_subject(name), ranks, strategy)


def stored(made: Plan) -> dict[str, str]:
    return {name: s.sharding for name, s in made.params.items()}


def on_batch(name: str, made: Plan, axis: str) -> set[bool]:
    """Whether what the ops split on an axis is the batch."""
    subject = zoo_subject(name)
    graph = concrete(subject)
    batch = batch_factors(graph, rules_of(graph), subject.graph)
    return {
        chosen[axis] in batch[node]
        for node in graph.calls()
        if node in batch
        for chosen in [made.choices.get(node.name, {})]
        if axis in chosen and not chosen[axis].startswith("linear")
    }


@pytest.mark.parametrize("name", MODELS)
def test_data(name: str) -> None:
    """The batch is split, parameters are whole, gradients are reduced."""
    made = plan(name, "data")
    assert made.mesh.names == ("dp",)
    assert all("dp" not in sharding for sharding in stored(made).values())
    assert on_batch(name, made, "dp") == {True}
    assert set(made.predicted.comm_bytes) <= {"all_reduce", "all_gather"}


@pytest.mark.parametrize("name", MODELS)
def test_zero(name: str) -> None:
    """The batch is split, parameters are stored in pieces and gathered again in the backward."""
    made = plan(name, "zero")
    graph = zoo_subject(name).graph
    for node in graph.placeholders("param"):
        sharding = made.params[node.meta["fqns"][0]]
        if max(value_of(node).int_shape()) >= 4:
            assert "dp" in sharding.sharding, (node.name, sharding)
            assert sharding.regather
    assert on_batch(name, made, "dp") == {True}
    assert made.predicted.comm_bytes["reduce_scatter"] > 0
    assert (
        made.predicted.comm_bytes["all_gather"] > 1.9 * made.predicted.comm_bytes["reduce_scatter"]
    )


@pytest.mark.parametrize("name", MODELS)
def test_tensor(name: str) -> None:
    """Matrices are split where they are, never gathered; the batch is not split."""
    made = plan(name, "tensor")
    assert made.mesh.names == ("tp",)
    graph = zoo_subject(name).graph
    for node in graph.placeholders("param"):
        if value_of(node).rank > 1:
            assert "tp" in made.params[node.meta["fqns"][0]].sharding
    assert True not in on_batch(name, made, "tp")
    gathered = [t for t in made.traffic if t.purpose.startswith("parameters")]
    assert gathered == []


@pytest.mark.parametrize("strategy", ["data+tensor", "zero+tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_two_axes(name: str, strategy: str) -> None:
    made = plan(name, strategy)
    assert made.mesh.names == ("dp", "tp")
    assert on_batch(name, made, "dp") == {True}
    assert True not in on_batch(name, made, "tp")
    shardings = [parse_sharding(text) for text in stored(made).values()]
    split = [s for s in shardings if s.dim_of("dp") is not None]
    assert bool(split) == (strategy == "zero+tensor")
    assert any(s.dim_of("tp") is not None for s in shardings)
    tied = [s for s in shardings if any({"dp", "tp"} <= set(d.axes) for d in s.splits)]
    assert tied == []


@pytest.mark.parametrize("name", ["rec", "vit"])
def test_weights_with_one_dim_to_split(name: str) -> None:
    """A [1, n] weight cannot be in pieces on both axes: what holds both would have to be gathered."""
    made = plan(name, "zero+tensor", 8)
    assert made.mesh.size == 8


@pytest.mark.parametrize("name", MODELS)
def test_auto_is_no_worse_than_any_family(name: str) -> None:
    auto = plan(name, "auto").predicted.time_s
    for strategy in ("data", "zero", "tensor", "data+tensor", "zero+tensor"):
        assert auto <= plan(name, strategy).predicted.time_s * (1 + 1e-4), strategy


def test_unknown_strategy() -> None:
    with pytest.raises(UserError, match="unknown strategy 'fast'"):
        plan_of(zoo_subject("mlp"), 4, "fast")


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_two_axes_need_a_product(ranks: int) -> None:
    with pytest.raises(UserError, match=f"a mesh of two axes, and {ranks} devices make none"):
        plan_of(zoo_subject("mlp"), ranks, "data+tensor")


@pytest.mark.parametrize("role", ["feature", "tensor"])
@pytest.mark.parametrize("name", ["rec", "moe_scatter", "gpt_outside"])
def test_no_route_splits_the_batch_of_features(name: str, role: str) -> None:
    """An axis that is not for the batch takes no route whose rows are the batch's."""
    subject = zoo_subject(name)
    graph = concrete(subject)
    rules = rules_of(graph)
    batch = batch_factors(graph, rules, subject.graph)
    family = Family("", {"tp": role}, batch)
    refused = 0
    for node, factors in batch.items():
        for route in rules[node.name].routes:
            rows = rules[node.name].parts_of(route)[0]
            allowed = family.allows(node, "tp", Choice(factor=route))
            assert allowed == (rows not in factors), (node, route)
            refused += not allowed
    assert refused


@pytest.mark.parametrize("name", ["rec", "gpt_outside"])
def test_tensor_parallelism_routes_no_batch(name: str) -> None:
    made = plan(name, "tensor")
    subject = zoo_subject(name)
    graph = concrete(subject)
    batch = batch_factors(graph, rules_of(graph), subject.graph)
    routed = {
        node.name: chosen["tp"]
        for node in graph.calls()
        for chosen in [made.choices.get(node.name, {})]
        if ">" in chosen.get("tp", "") and chosen["tp"].split(">")[0] in batch[node]
    }
    assert routed == {}
