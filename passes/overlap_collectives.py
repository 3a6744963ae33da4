"""Issue every collective as early, and wait for it as late, as the data allow."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch.fx

from autopar.ir.graph import Graph, Value, values_of
from autopar.ir.lowered import CLOSE, EXCHANGE, OPEN

Node = torch.fx.Node


def overlap_collectives(graph: Graph) -> Graph:
    """Split exchanges into `open` (right after their inputs) and `close` (right before first use).

    Exchanges with nothing to do between the two points stay whole. Opens keep their relative order
    on every rank, since it depends on the graph alone. In the backward the roles turn round: `close`
    issues when the last gradient is there, and `open`, being older, waits last.
    """
    new = graph.copy()
    nodes = list(new.fx.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    calls_before = _prefix_of_calls(nodes)
    for node in nodes:
        if node.target is not EXCHANGE:
            continue
        op, specs, group, *tensors = node.args
        ready = max(order[n] for n in node.all_input_nodes)
        readers = _readers(node)
        used = min((order[r] for r in readers), default=order[node])
        after = nodes[ready]
        if calls_before[used] - calls_before[ready + 1] - 1 <= 0:
            continue
        anchor = _after_placeholders(nodes, after)
        with new.fx.inserting_before(anchor):
            start = new.fx.call_function(OPEN, (op, specs, group, *tensors))
            parts = []
            for i in range(len(tensors) + 1):
                item = new.fx.call_function(operator.getitem, (start, i))
                item.meta = {"value": _edge_value(tensors, i)}
                parts.append(item)
        *edges, pending = parts
        start.meta = {**node.meta, "value": tuple(p.meta["value"] for p in parts)}
        with new.fx.inserting_before(node):
            end = new.fx.call_function(CLOSE, (op, specs, group, pending, *edges))
        end.meta = node.meta
        node.replace_all_uses_with(end)
        new.fx.erase_node(node)
    return _late(new)


def _prefix_of_calls(nodes: list[Node]) -> list[int]:
    """How many real ops come before each position."""
    counts = [0]
    for node in nodes:
        real = node.op == "call_function" and node.target is not operator.getitem
        counts.append(counts[-1] + real)
    return counts


def _readers(node: Node) -> list[Node]:
    found: list[Node] = []
    for user in node.users:
        found.extend(_readers(user) if user.target is operator.getitem else [user])
    return found


def _after_placeholders(nodes: list[Node], after: Node) -> Node:
    """The node before which something that needs `after` can first be placed."""
    index = nodes.index(after) + 1
    while nodes[index].op == "placeholder" or nodes[index].target is operator.getitem:
        index += 1
    return nodes[index]


def _edge_value(tensors: list[Any], i: int) -> Value | None:
    return values_of(tensors[i])[0] if i < len(tensors) else None


def _late(graph: Graph) -> Graph:
    """Move every `close`, with its `getitem`s, right before the first reader."""
    for node in [n for n in graph.fx.nodes if n.target is CLOSE]:
        items = [u for u in node.users if u.target is operator.getitem]
        readers = _readers(node)
        if not readers:
            continue
        order = {n: i for i, n in enumerate(graph.fx.nodes)}
        first = min(readers, key=order.__getitem__)
        for moved in (node, *sorted(items, key=order.__getitem__)):
            first.prepend(moved)
    graph.fx.lint()
    return replace(graph)
