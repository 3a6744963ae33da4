"""Find repeated blocks: which nodes of a graph are the same op of another copy of a layer.

Repeats are found structurally, in topological order: the graph is a string of op signatures, and a
stack of layers is a tandem repeat in it. Copies share one set of decisions in the planner, so that
planning time does not grow with depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch.fx
from numpy.typing import NDArray

from autopar.ir.graph import Graph, values_of
from autopar.ir.hint import MARK

from .edges import Edge, edge_key, edges_among

Node = torch.fx.Node


@dataclass(frozen=True)
class Blocks:
    """`representative[node]` is the node of the first copy that stands for it (itself if alone).

    `regions` lists, per repeated block, (first node, ops in one copy, copies). All nodes of the
    graph are in `representative`, in its order.
    """

    representative: Mapping[Node, Node]
    regions: tuple[tuple[Node, int, int], ...]

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every read of a tensor value by an op or by the output."""
        return tuple(edges_among(self.representative))

    @cached_property
    def reads(self) -> tuple[tuple[tuple[Edge, ...], tuple[Edge, ...]], ...]:
        """Per value that is read: its edges, and the distinct ones of their representatives."""
        stands_for = self.representative
        readers: dict[tuple[Node, int], list[Edge]] = {}
        for edge in self.edges:
            readers.setdefault((edge.producer, edge.port), []).append(edge)
        found, one = [], dict[frozenset[Edge], tuple[Edge, ...]]()
        for edges in readers.values():
            ends = frozenset(
                Edge(stands_for[e.producer], e.port, stands_for[e.consumer], e.slot) for e in edges
            )
            if ends not in one:
                one[ends] = tuple(sorted(ends, key=edge_key))
            found.append((tuple(edges), one[ends]))
        return tuple(found)

    @cached_property
    def alike(self) -> Mapping[tuple[Edge, ...], int]:
        """The (representative) edges that read one value, in order, and how often they occur."""
        return Counter(ends for _, ends in self.reads)

    @cached_property
    def patterns(self) -> Mapping[frozenset[Edge], int]:
        """The same as sets."""
        return {frozenset(ends): times for ends, times in self.alike.items()}


def find_blocks(graph: Graph) -> Blocks:
    """Group the nodes of a graph by the position that they have in a repeated block.

    Parameters follow the op that first uses them; nodes outside any repeat stand for themselves.
    """
    calls = list(graph.calls())
    signature = _signatures(calls)
    representative: dict[Node, Node] = {node: node for node in graph.fx.nodes}
    regions: list[tuple[Node, int, int]] = []
    for start, period, copies in _repeats(signature):
        regions.append((calls[start], period, copies))
        for offset in range(period):
            for copy in range(copies):
                representative[calls[start + copy * period + offset]] = calls[start + offset]
    first_user: dict[tuple[Node, int], Node] = {}
    for node in graph.placeholders():
        users = [user for user in node.users if user.op == "call_function"]
        if len(users) == 1:
            user = users[0]
            key = (representative[user], user.all_input_nodes.index(node))
            if key in first_user and values_of(first_user[key]) == values_of(node):
                representative[node] = first_user[key]
            else:
                first_user.setdefault(key, node)
    return Blocks(representative, tuple(regions))


def _signatures(calls: list[Node]) -> NDArray[np.int64]:
    """A small integer per op: equal for equal target, static arguments and types."""
    ids: dict[str, int] = {}
    found = np.empty(len(calls), dtype=np.int64)
    for i, node in enumerate(calls):
        static = torch.fx.map_arg((node.args, node.kwargs), _input_text)
        text = f"{node.target} {static} {[(v.shape, v.dtype) for v in values_of(node)]}"
        text += _hints(node)
        found[i] = ids.setdefault(text, len(ids))
    return found


class _Text(str):
    __slots__ = ()


def _input_text(node: Node) -> _Text:
    types = [(v.shape, v.dtype, v.requires_grad) for v in values_of(node)]
    return _Text(f"{node.op + _hints(node) if node.op == 'placeholder' else 'call'}{types}")


def _hints(node: Node) -> str:
    """What of a node's hints copies of a block must share."""
    return "".join(str(hint.words()) for hint in node.meta.get(MARK, ()))


def _repeats(signature: NDArray[np.int64], at: int = 0) -> list[tuple[int, int, int]]:
    """Tandem repeats (start, period, copies) that do not overlap, the widest cover first."""
    n = len(signature)
    best = (0, 0, 0, 0)
    for period in range(2, n // 2 + 1):
        same = np.flatnonzero(signature[:-period] != signature[period:])
        bounds = np.concatenate(([-1], same, [n - period]))
        lengths = np.diff(bounds) - 1
        i = int(lengths.argmax())
        copies = int(lengths[i]) // period + 1
        if copies >= 2 and copies * period > best[0]:
            best = (copies * period, int(bounds[i]) + 1, period, copies)
    cover, start, period, copies = best
    if not cover:
        return []
    left = _repeats(signature[:start], at)
    right = _repeats(signature[start + cover :], at + start + cover)
    return [*left, (at + start, period, copies), *right]
