"""Issue every collective as early, and wait for it as late, as the data allow."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch.fx

from autopar.ir.graph import Graph, values_of
from autopar.ir.lowered import CLOSE, EXCHANGE, OPEN
from autopar.ir.recomputed import MARK, mark_of

from .mark_blocks import block_of

Node = torch.fx.Node


def overlap_collectives(graph: Graph, ahead: bool = True) -> Graph:
    """Split exchanges into `open` (right after their inputs) and `close` (right before first use).

    Exchanges with no op to run between the two points stay whole. The order depends on the graph
    alone, so it is the same on every rank. Parameters that are dropped after their use (ZeRO-3) are
    gathered when the block before theirs begins, or right before use unless `ahead`. In the
    backward the roles turn round: `close` issues when the last gradient is there, and `open`, being
    older, waits last.
    """
    new = graph.copy()
    for node in _worth_splitting(new):
        if ahead or not _is_dropped(node):
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


def _is_dropped(node: Node) -> bool:
    """Whether an exchange, or the `open` of one, gathers parameters that are dropped after use."""
    return all(source.meta.get("regather") for source in node.all_input_nodes)


def _one_block_ahead(starts: list[Node]) -> list[tuple[Node, Node]]:
    """Pairs (start, earlier): what `earlier` gathers must be there before `start` gathers.

    `earlier` is the first gather of the block before. Outside repeated blocks every gather is like
    a block of its own, so that one is in use and the next one on its way.
    """
    pairs: list[tuple[Node, Node]] = []
    before: Node | None = None
    first: Node | None = None
    block: tuple[int, bool] | None = None
    for start in starts:
        mine = block_of(start)
        if first is None or mine != block or not mine[1]:
            before, first, block = first, start, mine
        if before is not None:
            pairs.append((start, before))
    return pairs


def _rescheduled(graph: Graph) -> Graph:
    """The same nodes in a new order: opens as soon as their inputs are there, closes on demand."""
    nodes = list(graph.fx.nodes)
    lazy = {n for n in nodes if n.target is CLOSE}
    lazy |= {n for n in nodes if n.target is operator.getitem and n.args[0] in lazy}
    eager = [n for n in nodes if n.target is OPEN and not lazy.intersection(n.all_input_nodes)]
    lazy |= {n for n in nodes if n.target is OPEN} - set(eager)
    lazy |= {n for n in nodes if n.target is operator.getitem and n.args[0] in lazy}
    waiting = {n: set(n.all_input_nodes) for n in eager}
    for start, earlier in _one_block_ahead([n for n in eager if _is_dropped(n)]):
        waiting[start].update(_close_of(earlier))
    out = torch.fx.Graph()
    env: dict[Node, Node] = {}

    def place(node: Node) -> None:
        env[node] = out.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
        for start in [s for s, inputs in waiting.items() if node in inputs]:
            waiting[start].discard(node)

    def ready() -> list[Node]:
        found = [s for s, inputs in waiting.items() if not inputs]
        for start in found:
            del waiting[start]
        return found[::-1]

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
                    if top.target is CLOSE:  # before its reader: it runs beside what is sent next
                        stack.extend(ready())

    for node in nodes:
        if node in lazy or node in env:
            continue
        if node.op != "placeholder":
            for start in reversed(ready()):
                emit(start)
        if node not in env:
            emit(node)
    return replace(graph, fx=out)
