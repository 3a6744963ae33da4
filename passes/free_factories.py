"""Make new tensors from nothing, and not from a tensor that is read for its dtype alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph, value_of, values_of
from autopar.ir.rules.common import arguments

aten = torch.ops.aten
Node = torch.fx.Node

FREE: Mapping[Any, Any] = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}


def free_factories(graph: Graph) -> Graph:
    """Replace `new_zeros`, `new_ones` and `new_full` by `zeros`, `ones` and `full`.

    Otherwise a split tensor is gathered for nothing. A tensor that nothing else reads is erased.
    """
    new = graph.copy()
    for node in list(new.fx.nodes):
        if node.target not in FREE:
            continue
        a = arguments(node)
        args = [a["size"]] + ([a["fill_value"]] if "fill_value" in a else [])
        source = a["self"]
        with new.fx.inserting_before(node):
            made = new.fx.call_function(
                FREE[node.target], tuple(args), {"dtype": value_of(node).dtype}
            )
        made.meta = {**node.meta, "value": replace(value_of(node), requires_grad=False)}
        node.replace_all_uses_with(made)
        new.fx.erase_node(node)
        erase_unread(new, source)
    return new


def erase_unread(graph: Graph, node: Any) -> None:
    """Erase an op that nothing reads any more, and those that only it read."""
    if not isinstance(node, Node) or node.op != "call_function" or node.users:
        return
    if not values_of(node) and not isinstance(node.meta.get("value"), tuple):
        return
    sources = node.all_input_nodes
    graph.fx.erase_node(node)
    for source in sources:
        erase_unread(graph, source)
