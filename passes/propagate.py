"""Give every value the sharding that the plan's choices imply, and every op what it wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.fx

from autopar.errors import PassError
from autopar.ir.graph import Graph, Value, tensor_inputs, values_of
from autopar.ir.mesh import MICRO_BATCH, Mesh
from autopar.ir.rule import REPLICATE, Choice, ShardingRule
from autopar.ir.sharding import Sharding
from autopar.ir.text import print_node
from autopar.ir.types_follow import SENDS

from .options import place_call
from .pieces import Boundary
from .programme import is_getitem, producer_of

Node = torch.fx.Node


def propagate(
    graph: Graph,
    mesh: Mesh,
    rules: Mapping[str, ShardingRule],
    choices: Mapping[str, Mapping[str, Choice]],
    storage: Mapping[str, Sharding],
    regather: frozenset[str] = frozenset(),
    sends: Boundary | None = None,
) -> Graph:
    """Type every value of the graph with a sharding, and note what each op wants of its inputs.

    `rules` and `choices` are keyed by node name, `storage` by parameter placeholder name; those in
    `regather` are marked for being gathered again in the backward. The wanted
    shardings are left in `meta["wants"]`, one per tensor input. User inputs, buffers and constants
    are replicated, and so is whatever the graph returns, unless it `sends` it to another piece of
    the model: that crosses as `Boundary` says. Axes on which a choice is not legal for
    these sizes fall back to replication.
    """
    new = graph.copy()
    for node in new.fx.nodes:
        if node.op == "placeholder":
            for value in values_of(node):
                sharding = storage.get(node.name, Sharding.replicated(value.rank))
                node.meta["value"] = value.with_sharding(sharding)
                node.meta["regather"] = node.name in regather
        elif node.op == "output":
            node.meta["wants"] = _returned(new, sends)
            node.meta[SENDS] = sends is not None
        elif is_getitem(node):
            source, port = producer_of(node)
            node.meta["value"] = values_of(source)[port]
        elif node.op == "call_function":
            _type_call(node, mesh, rules[node.name], choices.get(node.name, {}))
    return new


def _returned(graph: Graph, sends: Boundary | None) -> tuple[Sharding, ...]:
    """What is wanted of what a graph returns: all of it.

    But results of the user's code stay as they are on the axis of micro-batches, where they are put
    together later; new values of buffers are whole there, too.
    """
    node = graph.output_node
    entries: Any = node.args[0]
    user = {entry for entry in entries[: graph.outputs] if isinstance(entry, torch.fx.Node)}
    user -= set(entries[graph.outputs :])
    crossing = sum(isinstance(entry, torch.fx.Node) for entry in entries[: graph.outputs])
    found = []
    for i, source in enumerate(tensor_inputs(node)):
        (value,) = values_of(source)
        wanted = Sharding.replicated(value.rank)
        if sends is not None and i < crossing and value.sharding is not None:
            wanted = sends.sharding(value, value.sharding)
        elif source in user and value.sharding is not None:
            wanted = value.sharding.without_varying()
            for axis in {*value.sharding.used_axes()} - {MICRO_BATCH}:
                wanted = wanted.without_axis(axis)
        found.append(wanted)
    return tuple(found)


def _type_call(node: Node, mesh: Mesh, rule: ShardingRule, chosen: Mapping[str, Choice]) -> None:
    active = {axis: choice for axis, choice in chosen.items() if choice != REPLICATE}
    placed = place_call(node, rule, mesh, active, uneven=True)
    if placed is None:
        asked = " ".join(f"{axis}={choice}" for axis, choice in active.items())
        what = f"%{node.name} cannot do {asked} under {rule}"
        raise PassError("propagate", "rule_allows", what, print_node(node))
    node.meta["wants"] = placed.inputs
    node.meta["rule"] = rule
    node.meta["chosen"] = active
    shardings = iter(placed.outputs)
    value = node.meta["value"]
    if isinstance(value, Value):
        node.meta["value"] = replace(value, sharding=next(shardings))
    else:
        node.meta["value"] = tuple(
            replace(v, sharding=next(shardings)) if isinstance(v, Value) else v for v in value
        )
