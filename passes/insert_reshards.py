"""Put a reshard wherever a value is not where its reader wants it."""

from __future__ import annotations

import torch.fx

from autopar.ir.graph import Graph, tensor_inputs, value_of
from autopar.ir.lowered import RESHARD
from autopar.ir.recomputed import MARK, common_mark
from autopar.ir.sharding import Sharding

Node = torch.fx.Node


def insert_reshards(graph: Graph) -> Graph:
    """Insert `reshard(x, sharding)` on every edge whose two ends differ.

    Readers that want the same sharding share one reshard, placed before the first of them. It is
    recomputed if producer and reader are, in one region.
    Consumes `meta["wants"]`. Establishes: what an op reads is sharded as it wants.
    """
    new = graph.copy()
    made: dict[tuple[Node, Sharding], Node] = {}
    for node in list(new.fx.nodes):
        wants = node.meta.pop("wants", None)
        if wants is None:
            continue
        replacement: list[Node] = []
        for source, want in zip(tensor_inputs(node), wants, strict=True):
            value = value_of(source)
            if value.sharding == want:
                replacement.append(source)
                continue
            if (source, want) not in made:
                with new.fx.inserting_before(node):
                    reshard = new.fx.call_function(RESHARD, (source, want))
                reshard.meta = {
                    "value": value.with_sharding(want),
                    "source": node.meta.get("source", ""),
                    MARK: common_mark(source, node),
                }
                made[source, want] = reshard
            replacement.append(made[source, want])
        _replace_inputs(node, replacement)
    return new


def _replace_inputs(node: Node, replacement: list[Node]) -> None:
    """Replace the tensor inputs of a node, one by one in argument order."""
    tensors = set(tensor_inputs(node))
    queue = iter(replacement)

    def visit(arg: Node) -> Node:
        return next(queue) if arg in tensors else arg

    node.args = torch.fx.map_arg(node.args, visit)
    node.kwargs = torch.fx.map_arg(node.kwargs, visit)
