"""What a program runs in one go: single nodes, and the regions that the backward runs again."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.fx

from autopar.cost.families import op_family, op_name
from autopar.errors import PassError
from autopar.ir.graph import Graph
from autopar.ir.lowered import CLOSE, DROPOUT, EXCHANGE, OPEN, Collective
from autopar.ir.recomputed import SELECTIVE, Recomputed, mark_of

Node = torch.fx.Node


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes that are recomputed together, in order, with what they read and what others read."""

    mark: Recomputed
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def is_random(self) -> bool:
        """Whether a node draws from torch's generator; our own dropout counts instead."""
        tag = torch.Tag.nondeterministic_seeded
        return any(tag in getattr(node.target, "tags", ()) for node in self.nodes)


Step: TypeAlias = "Node | Region"


def steps_of(graph: Graph) -> list[Step]:
    """The graph's nodes in an order of execution, each region as one step.

    A region runs where its first node was, what it needs before it. Raises PassError if a path
    leaves a region and comes back to it.
    """
    members: dict[Recomputed, list[Node]] = {}
    for node in graph.fx.nodes:
        mark = _mark(node)
        if mark is not None:
            members.setdefault(mark, []).append(node)
    step: dict[Node, Step] = {node: node for node in graph.fx.nodes}
    for mark, nodes in members.items():
        region = _region(mark, nodes)
        step.update(dict.fromkeys(nodes, region))
    done: dict[Step, bool] = {}  # False while what the step needs is on its way
    order: list[Step] = []
    for node in graph.fx.nodes:
        stack = [step[node]]
        while stack:
            top = stack[-1]
            if done.get(top):
                stack.pop()
                continue
            needs = [step[n] for n in _inputs(top) if not done.get(step[n])]
            if not needs:
                done[top] = True
                order.append(top)
            elif top in done and any(n in done for n in needs):
                name = top.name if isinstance(top, Node) else top.mark.region
                raise PassError("regions", "regions_are_convex", f"{name} needs what it gives")
            else:
                done[top] = False
                stack.extend(reversed(needs))
    return order


def kept_by(region: Region) -> dict[Node, str]:
    """Which nodes a selective region does not run again, and the method of `Kept` for each.

    What collectives and matrix work give is kept, unless no saved tensor depends on it: a product
    that only collectives read, or what only the residual stream takes up before the region ends.
    """
    if region.mark.mode != SELECTIVE:
        return {}
    found: dict[Node, str] = {}
    unsaved: set[Node] = set()  # what reads these saves nothing that depends on them
    inside = set(region.nodes)
    for node in reversed(region.nodes):
        readers = [user for user in node.users if user in inside]
        if all(user in unsaved and _saves_no_input(user) for user in readers):
            unsaved.add(node)
        family = op_family(op_name(node.target))
        if node.target in (OPEN, CLOSE, EXCHANGE):
            op: Any = node.args[0]  # of a lowered op, FX's type of arguments does not hold
            if isinstance(op, Collective) and op.forward is not None:
                received = "received_unread" if node in unsaved else "received"
                found[node] = "sent" if node.target is OPEN else received
        elif family == "attention":
            found[node] = "attention"
        elif family in ("matmul", "conv"):
            sent = bool(node.users) and all(user in found and _sends(user) for user in node.users)
            found[node] = "unread" if sent or node in unsaved else "matmul"
    return found


def _sends(node: Node) -> bool:
    return node.target in (OPEN, EXCHANGE)


def _saves_no_input(node: Node) -> bool:
    """Whether autograd keeps nothing that depends on the elements of the node's inputs."""
    if node.target in (OPEN, CLOSE, EXCHANGE, DROPOUT):
        return True
    return op_family(op_name(node.target)) == "view" or op_name(node.target) in ("add", "sub")


def _region(mark: Recomputed, nodes: list[Node]) -> Region:
    inside = set(nodes)
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    given = (node for node in nodes if any(user not in inside for user in node.users))
    return Region(mark, tuple(nodes), tuple(read), tuple(given))


def _inputs(step: Step) -> Sequence[Node]:
    return step.all_input_nodes if isinstance(step, torch.fx.Node) else step.inputs


def _mark(node: Node) -> Recomputed | None:
    """An item of an op's result is where the op is."""
    while node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        node = source
    return mark_of(node)
