"""Issue every collective as early, and wait for it as late, as the data allow."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch.fx

from autopar.ir.graph import Graph, values_of
from autopar.ir.lowered import CLOSE, EXCHANGE, OPEN
from autopar.ir.recomputed import MARK, mark_of

Node = torch.fx.Node

# Gathers of parameters that are dropped after their use (ZeRO-3) that are there or on their way at
# a time: one in use and the next. All at once would hold the whole model.
GATHERS_AHEAD = 2


def overlap_collectives(graph: Graph) -> Graph:
    """Split exchanges into `open` (right after their inputs) and `close` (right before first use).

    Exchanges with no op to run between the two points stay whole. The order depends on the graph
    alone, so it is the same on every rank. Of gathered parameters that are dropped after their use,
    only the next one is gathered ahead. In the backward the roles turn round: `close` issues
    when the last gradient is there, and `open`, being older, waits last.
    """
    new = graph.copy()
    for node in _worth_splitting(new):
        _split(new, node)
    return _rescheduled(new)


def _worth_splitting(graph: Graph) -> list[Node]:
    """Exchanges that have a real op between their last input and their first reader."""
    nodes = list(graph.fx.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    calls = [0]
    for node in nodes:
        calls.append(
            calls[-1] + (node.op == "call_function" and node.target is not operator.getitem)
        )
    found = []
    for node in nodes:
        if node.target is EXCHANGE:
            ready = max(order[n] for n in node.all_input_nodes)
            used = min((order[r] for r in _readers(node)), default=order[node])
            if calls[used] - calls[ready + 1] > 1:
                found.append(node)
    return found


def _readers(node: Node) -> list[Node]:
    found: list[Node] = []
    for user in node.users:
        found.extend(_readers(user) if user.target is operator.getitem else [user])
    return found


def _split(graph: Graph, node: Node) -> None:
    op, specs, group, *tensors = node.args
    with graph.fx.inserting_before(node):
        start = graph.fx.call_function(OPEN, (op, specs, group, *tensors))
        edges = [graph.fx.call_function(operator.getitem, (start, i)) for i in range(len(tensors))]
        pending = graph.fx.call_function(operator.getitem, (start, len(tensors)))
        end = graph.fx.call_function(CLOSE, (op, specs, group, pending, *edges))
    for edge, tensor in zip(edges, tensors, strict=True):
        assert isinstance(tensor, torch.fx.Node)
        edge.meta = {"value": values_of(tensor)[0], MARK: mark_of(node)}
    pending.meta = {"value": None, MARK: mark_of(node)}
    start.meta = {**node.meta, "value": (*(e.meta["value"] for e in edges), None)}
    end.meta = node.meta
    node.replace_all_uses_with(end)
    graph.fx.erase_node(node)


def _close_of(start: Node) -> list[Node]:
    return [n for n in _readers(start) if n.target is CLOSE]


def _rescheduled(graph: Graph) -> Graph:
    """The same nodes in a new order: opens as soon as their inputs are there, closes on demand."""
    nodes = list(graph.fx.nodes)
    lazy = {n for n in nodes if n.target is CLOSE}
    lazy |= {n for n in nodes if n.target is operator.getitem and n.args[0] in lazy}
    eager = [n for n in nodes if n.target is OPEN and not lazy.intersection(n.all_input_nodes)]
    lazy |= {n for n in nodes if n.target is OPEN} - set(eager)
    lazy |= {n for n in nodes if n.target is operator.getitem and n.args[0] in lazy}
    waiting = {n: set(n.all_input_nodes) for n in eager}
    dropped = [n for n in eager if all(s.meta.get("regather") for s in n.all_input_nodes)]
    for start, earlier in zip(dropped[GATHERS_AHEAD:], dropped, strict=False):
        waiting[start].update(_close_of(earlier))
    out = torch.fx.Graph()
    env: dict[Node, Node] = {}

    def place(node: Node) -> None:
        env[node] = out.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
        for start in [s for s, inputs in waiting.items() if node in inputs]:
            waiting[start].discard(node)

    def emit(node: Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [n for n in top.all_input_nodes if n not in env]
            stack.extend(reversed(missing))
            if not missing:
                stack.pop()
                if top not in env:
                    place(top)

    for node in nodes:
        if node in lazy or node in env:
            continue
        if node.op != "placeholder":
            for start in [s for s, inputs in waiting.items() if not inputs]:
                del waiting[start]
                emit(start)
        if node not in env:
            emit(node)
    return replace(graph, fx=out)
