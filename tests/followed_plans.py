"""Plans by decree: a mesh axis splits a dim of the user's inputs, and all that follows from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch.fx

from autopar.ir.graph import Graph, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice, ShardingRule
from autopar.ir.sharding import Sharding, Split
from autopar.passes.options import place_call
from autopar.passes.programme import is_getitem, producer_of
from autopar.plan import Plan, Prediction, Storage
from tests.simulate import Decisions, Subject, cpu

Node = torch.fx.Node


def following(
    graph: Graph, rules: Mapping[str, ShardingRule], mesh: Mesh, dims: Mapping[str, int]
) -> Decisions:
    """Split dim `dims[axis]` of all user inputs on each axis, and what the rules make of it.

    An op splits, on an axis, the first factor that its inputs are split along there; where that is
    not legal it runs replicated on the axis. Parameters are whole.
    """
    shardings: dict[tuple[Node, int], Sharding] = {}
    for node in graph.placeholders():
        for value in values_of(node):
            splits = [Split() for _ in range(value.rank)]
            for axis, dim in dims.items() if node.meta["role"] == "input" else ():
                splits[dim] = Split((*splits[dim].axes, axis))
            shardings[node, 0] = Sharding(tuple(splits))
    chosen: dict[str, dict[str, Choice]] = {}
    for node in graph.calls():
        if is_getitem(node):
            continue
        rule, mine = rules[node.name], dict[str, Choice]()
        for axis in dims:
            for factor in followed_factors(node, rule, axis, shardings):
                tried = mine | {axis: Choice(factor=factor)}
                if place_call(node, rule, mesh, tried, uneven=True) is not None:
                    mine = tried
                    break
        placed = place_call(node, rule, mesh, mine, uneven=True)
        assert placed is not None
        chosen[node.name] = mine
        shardings.update({(node, i): s for i, s in enumerate(placed.outputs)})
    whole = {n.name: Sharding.replicated(value_of(n).rank) for n in graph.placeholders("param")}
    return Decisions(mesh, chosen, whole)


def followed_factors(
    node: Node, rule: ShardingRule, axis: str, shardings: Mapping[tuple[Node, int], Sharding]
) -> list[str]:
    """Factors along which the node's inputs are split on the axis."""
    found: dict[str, None] = {}
    for i, source in enumerate(tensor_inputs(node)):
        dim = shardings[producer_of(source)].dim_of(axis)
        if dim is not None:
            found.update(dict.fromkeys(f for f in rule.inputs[i][dim] if f not in rule.whole))
    return list(found)


def plan_of_decisions(subject: Subject, decisions: Decisions, strategy: str = "auto") -> Plan:
    """The decisions as a plan that `parallelize` takes; nothing is predicted."""
    params = {
        node.meta["fqns"][0]: Storage(
            str(decisions.storage[node.name]), node.name in decisions.regather
        )
        for node in subject.graph.placeholders("param")
    }
    choices = {
        name: {axis: str(choice) for axis, choice in chosen.items()}
        for name, chosen in decisions.choices.items()
    }
    return Plan(
        subject.capture.fingerprint,
        decisions.mesh,
        cpu(decisions.mesh.size).name,
        strategy,
        choices,
        params,
        Prediction(0.0, 0.0, 0.0, 0.0, 0),
        recompute=decisions.recompute,
    )
