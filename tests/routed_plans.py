"""Plans by decree that route: tokens split on an axis, rows of tables and experts on the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch.fx

from autopar.ir.graph import Graph, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice, ShardingRule
from autopar.ir.sharding import Sharding, Split
from autopar.passes.options import place_call
from autopar.passes.programme import edges_of, is_getitem
from tests.followed_plans import followed_factors
from tests.simulate import Decisions

Node = torch.fx.Node


def routing(graph: Graph, rules: Mapping[str, ShardingRule], mesh: Mesh, axis: str) -> Decisions:
    """Split dim 0 of all user inputs on `axis`, route whatever can be, and follow.

    An op that may route does (floating values only: positions are looked up whole), one that reads
    stacked matrices splits the stack, and any other splits a factor that its inputs are split
    along, if possible no reduction, or else runs replicated. Parameters are stored as their first
    reader wants them.
    """
    shardings: dict[tuple[Node, int], Sharding] = {}
    for node in graph.placeholders():
        for value in values_of(node):
            split = node.meta["role"] == "input" and value.rank > 0
            first = (Split((axis,)),) if split else ()
            rest = (Split(),) * (value.rank - len(first))
            shardings[node, 0] = Sharding((*first, *rest))
    chosen: dict[str, dict[str, Choice]] = {}
    for node in graph.calls():
        if is_getitem(node):
            continue
        rule = rules[node.name]
        routed = rule.routes[:1] if values_of(node)[0].dtype.is_floating_point else ()
        chosen[node.name] = {}
        followed = sorted(followed_factors(node, rule, axis, shardings), key=rule.is_reduction)
        for factor in (*routed, *_stacked(node, rule), *followed):
            tried = {axis: Choice(factor=factor)}
            if place_call(node, rule, mesh, tried, uneven=True) is not None:
                chosen[node.name] = tried
                break
        placed = place_call(node, rule, mesh, chosen[node.name], uneven=True)
        assert placed is not None
        shardings.update({(node, i): s for i, s in enumerate(placed.outputs)})
    storage: dict[str, Sharding] = {}
    for edge in edges_of(graph):
        name = edge.producer.name
        if edge.producer.meta.get("role") != "param" or name in storage:
            continue
        consumer = edge.consumer
        placed = place_call(
            consumer, rules[consumer.name], mesh, chosen[consumer.name], uneven=True
        )
        assert placed is not None
        want = placed.inputs[edge.slot].without_varying()
        storage[name] = want if not want.partial else Sharding.replicated(want.rank)
    for node in graph.placeholders("param"):
        storage.setdefault(node.name, Sharding.replicated(value_of(node).rank))
    return Decisions(mesh, chosen, storage)


def _stacked(node: Node, rule: ShardingRule) -> list[str]:
    """The factor that counts the matrices of a stacked parameter: the experts."""
    return [
        rule.inputs[i][0][0]
        for i, source in enumerate(tensor_inputs(node))
        if source.meta.get("role") == "param"
        and value_of(source).rank == 3
        and not rule.whole.intersection(rule.inputs[i][0])
    ]


def routed_choices(decisions: Decisions) -> dict[str, str]:
    """Which ops route, and how."""
    return {
        name: choice.factor
        for name, chosen in decisions.choices.items()
        for choice in chosen.values()
        if ">" in choice.factor
    }
