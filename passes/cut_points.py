"""Where a captured graph can be cut into pipeline stages: between ops that few values cross."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.fx

from autopar.cost.families import op_name
from autopar.ir.graph import Graph, values_of

from .blocks import Blocks
from .columns import is_getitem

Node = torch.fx.Node

WINDOW = 16  # ops on either side that are not crossed by fewer values
ENOUGH = 3  # copies of blocks per piece, from which a copy is not cut inside

_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "rrelu")


@dataclass(frozen=True)
class Unit:
    """The smallest piece of a chain: consecutive ops.

    `region` is the repeated block (index in `Blocks.regions`) that all of them are in, -1 if none;
    `copy` the number of the copy. `crossing` are the values that cross the cut before the unit.
    """

    nodes: tuple[Node, ...]
    crossing: tuple[Node, ...]
    region: int = -1
    copy: int = 0

    @property
    def name(self) -> str:
        """The unit's first node: what a cut before it is called in a plan."""
        return self.nodes[0].name


def units_of(graph: Graph, blocks: Blocks, pieces: int | None = None) -> list[Unit]:
    """The chain of a graph: embedding, copies of blocks, head; parts of copies where those are few.

    Copies of blocks are not cut inside where there are enough of them for so many `pieces` (None:
    always cut). Every unit but the first can begin a piece.
    """
    calls = list(graph.calls())
    if not calls:
        return []
    crossing = crossing_values(graph)
    fine = _narrow(calls, crossing)
    bounds = _block_bounds(calls, blocks)
    coarse = [i for i in fine if i in bounds]
    enough = pieces is not None and len(coarse) + 1 >= ENOUGH * pieces
    starts = coarse if enough else _with_parameters(fine, calls, bounds)
    return _units(graph, blocks, [0, *starts], crossing)


def units_at(graph: Graph, blocks: Blocks, cuts: Sequence[str]) -> list[Unit]:
    """The chain of a graph cut at nodes (the first of every piece but the first) and at blocks.

    Raises ValueError where a cut is not the name of an op, or they are not in the graph's order.
    """
    calls = list(graph.calls())
    at = {node.name: i for i, node in enumerate(calls)}
    unknown = [name for name in cuts if name not in at]
    if unknown:
        raise ValueError(f"the model has no op {unknown[0]!r}")
    starts = [0, *(at[name] for name in cuts)]
    for name, start, before in zip(cuts, starts[1:], starts, strict=False):
        if start <= before:
            raise ValueError(f"the cut at {name} is not after the one before it")
        if is_getitem(calls[start]):
            raise ValueError(f"{name} takes one of the outputs of the op before: cut before that")
    crossing = crossing_values(graph)
    coarse = _block_bounds(calls, blocks) & set(_narrow(calls, crossing))
    return _units(graph, blocks, sorted(coarse | set(starts)), crossing)


def crossing_values(graph: Graph) -> list[tuple[Node, ...]]:
    """Per op, the values that are made before it and read by it or later.

    Not what depends on inputs, buffers and constants alone without drawing random numbers: every
    piece computes that again. Nor new values of buffers, which the piece that makes them writes.
    """
    calls = list(graph.calls())
    at = {node: i for i, node in enumerate(calls)}
    made = made_again(graph)
    given = graph.output_node.args[0]
    results = set(given[: graph.outputs]) if isinstance(given, (tuple, list)) else {given}
    last: dict[Node, int] = {}
    for node in calls:
        reads = [at[user] for user in node.users if user in at]
        last[node] = max([*reads, len(calls) if node in results else -1])
    open_: dict[Node, int] = {}
    found: list[tuple[Node, ...]] = []
    for i, node in enumerate(calls):
        open_ = {n: until for n, until in open_.items() if until >= i}
        found.append(tuple(open_))
        several = isinstance(node.meta.get("value"), tuple)
        if node not in made and not several and values_of(node) and last[node] > i:
            open_[node] = last[node]
        for source in node.all_input_nodes:  # a piece of a tuple is read where the tuple is
            if is_getitem(node) and source in at and node not in made:
                open_[node] = last[node]
    return found


def made_again(graph: Graph) -> frozenset[Node]:
    """Ops that every piece computes for itself: of inputs, buffers, constants; nothing random."""
    found: set[Node] = set()
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            if node.meta.get("role") != "param":
                found.add(node)
        elif node.op == "call_function":
            name = op_name(node.target)
            random = any(word in name for word in _RANDOM)
            if not random and all(source in found for source in node.all_input_nodes):
                found.add(node)
    return frozenset(found)


def _narrow(calls: Sequence[Node], crossing: Sequence[tuple[Node, ...]]) -> list[int]:
    """Positions that no more values cross than their neighbours', and at least one."""
    counts = [len(values) for values in crossing]
    found = []
    for i in range(1, len(calls)):
        near = [n for n in counts[max(1, i - WINDOW) : i + WINDOW + 1] if n]
        if counts[i] and counts[i] <= min(near) and not is_getitem(calls[i]):
            found.append(i)
    return found


def _block_bounds(calls: Sequence[Node], blocks: Blocks) -> set[int]:
    """Positions where copies of repeated blocks begin and end."""
    at = {node: i for i, node in enumerate(calls)}
    return {
        at[first] + copy * period
        for first, period, copies in blocks.regions
        for copy in range(copies + 1)
    }


def _with_parameters(starts: Sequence[int], calls: Sequence[Node], bounds: set[int]) -> list[int]:
    """Of the positions those between which some op reads a parameter; bounds of blocks first."""
    stored = [
        any(s.op == "placeholder" and s.meta.get("role") == "param" for s in n.all_input_nodes)
        for n in calls
    ]
    total = [0]
    for has in stored:
        total.append(total[-1] + has)
    found: list[int] = []
    for i in starts:
        before = found[-1] if found else 0
        if total[i] == total[before] and i in bounds and found and before not in bounds:
            found[-1] = i  # the same cut, where a copy ends
        elif total[i] > total[before] and total[-1] > total[i]:
            found.append(i)
    return found


def _units(
    graph: Graph, blocks: Blocks, starts: Sequence[int], crossing: Sequence[tuple[Node, ...]]
) -> list[Unit]:
    calls = list(graph.calls())
    at = {node: i for i, node in enumerate(calls)}
    spans = [(at[first], period, copies) for first, period, copies in blocks.regions]
    found = []
    for start, end in zip(starts, [*starts[1:], len(calls)], strict=True):
        region, copy = -1, 0
        for r, (first, period, copies) in enumerate(spans):
            inside = first <= start and end <= first + period * copies
            if inside and (start - first) // period == (end - 1 - first) // period:
                region, copy = r, (start - first) // period
        nodes = calls[start:end]
        if end == len(calls):
            nodes = [*nodes, graph.output_node]
        found.append(Unit(tuple(nodes), crossing[start] if start else (), region, copy))
    return found
