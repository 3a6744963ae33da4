"""Random legal plans: every op does any of the things that its rule allows, whatever it costs."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from random import Random

from autopar.ir.graph import Graph, value_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice, ShardingRule, choices
from autopar.ir.sharding import Sharding
from autopar.passes.options import param_options, place_call
from autopar.passes.price import Pricer
from autopar.passes.programme import edges_of, is_getitem
from tests.simulate import Decisions, cpu

MESHES = (
    Mesh.of(dp=2),
    Mesh.of(dp=3),
    Mesh.of(tp=4),
    Mesh.of(dp=2, tp=2),
    Mesh.of(dp=2, tp=3),
    Mesh.of(dp=3, tp=2),
)


def random_decisions(
    graph: Graph,
    rules: Mapping[str, ShardingRule],
    mesh: Mesh,
    random: Random,
    replicate: float = 0.2,
) -> Decisions:
    """Decisions drawn uniformly from what is legal, with a share of axes left replicated.

    Parameters are stored whole, as some reader wants them, or split further; some are gathered
    again in the backward.
    """
    chosen: dict[str, dict[str, Choice]] = {}
    wanted: dict[str, list[Sharding]] = defaultdict(list)
    for node in graph.calls():
        if is_getitem(node):
            continue
        rule = rules[node.name]
        for _ in range(8):
            tried = {
                axis: random.choice(choices(rule))
                for axis in mesh.names
                if random.random() > replicate
            }
            placed = place_call(node, rule, mesh, tried, uneven=True)
            if placed is not None and not any(map(_doubled, (*placed.inputs, *placed.outputs))):
                chosen[node.name] = {a: c for a, c in tried.items() if not c.is_replicate}
                break
    for edge in edges_of(graph):
        if edge.producer.meta.get("role") == "param" and edge.consumer.op == "call_function":
            rule = rules[edge.consumer.name]
            placed = place_call(
                edge.consumer, rule, mesh, chosen.get(edge.consumer.name, {}), uneven=True
            )
            assert placed is not None
            wanted[edge.producer.name].append(placed.inputs[edge.slot])
    pricer = Pricer(cpu(mesh.size), mesh)
    storage: dict[str, Sharding] = {}
    regather: set[str] = set()
    for node in graph.placeholders("param"):
        options = param_options(node, wanted[node.name], mesh, pricer)
        option = random.choice(options) if options else None
        storage[node.name] = option.gives[0] if option else Sharding.replicated(value_of(node).rank)
        if option is not None and option.regather:
            regather.add(node.name)
    return Decisions(mesh, chosen, storage, frozenset(regather))


def _doubled(sharding: Sharding) -> bool:
    used = list(sharding.used_axes())
    return any(a == b for a, b in itertools.combinations(used, 2))
