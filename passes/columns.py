"""Columns and rows of the planner's integer programme, without prices.

The programme over the representatives of repeated blocks is, in `programme.solve`'s notation::

    one option  sum_o x[n, o] = 1                                   for every node n
    flow out    sum_t e[k, s, t] = sum_{o gives s} x[producer, o]   for every edge k, s
    flow in     sum_s e[k, s, t] = sum_{o wants t} x[consumer, o]   for every edge k, t
    pay once    w[v, s, t] >= e[k, s, t]                            for every edge k of v

and depends on the axes of a mesh, not on their sizes: one `Columns` serves every mesh with the same
axes, priced anew.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np
import torch.fx
from numpy.typing import NDArray

from autopar.ir.graph import Graph, Value, tensor_inputs, value_of
from autopar.ir.sharding import Sharding

from .blocks import Blocks
from .edges import Edge, edge_key, edges_of, is_getitem, passes_on, producer_of
from .gradient_sums import is_summed
from .options import Option

__all__ = [
    "Columns",
    "Edge",
    "Flow",
    "Terms",
    "build_columns",
    "copies_of",
    "edge_key",
    "edges_of",
    "is_getitem",
    "passes_on",
    "producer_of",
    "reading_patterns",
    "times_read",
]

Node = torch.fx.Node
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Flow:
    """A value on its way from what its producer gives to what some of its readers want.

    `readers` are all that read the value, `saved` says whether one of those holds it.
    """

    producer: Node
    port: int
    source: Sharding
    want: Sharding
    regather: bool
    readers: tuple[Edge, ...]
    saved: bool


@dataclass
class Terms:
    """Sparse terms: column costs `times * price[item]` more."""

    column: list[int] = field(default_factory=list)
    item: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, column: int, item: int, times: float) -> None:
        self.column.append(column)
        self.item.append(item)
        self.times.append(times)

    def triples(self) -> Iterator[tuple[int, int, float]]:
        return zip(self.column, self.item, self.times, strict=True)


@dataclass(frozen=True)
class Columns:
    """Structure of one programme. Columns come node by node, then edge by edge, then the rest.

    `first[node]` is the first column of a node, in the order of `options[node]`; `spans` are the
    ranges of columns of which exactly one is 1: those of every node and of every edge. `flows` are
    what the terms of `time` and `memory` price. `one_of` are the rows "one option".
    """

    options: Mapping[Node, Sequence[Option]]
    count: Mapping[Node, int]
    first: Mapping[Node, int]
    spans: tuple[tuple[int, int], ...]
    one_of: Ints
    flows: tuple[Flow, ...]
    time: Terms
    memory: Terms
    size: int
    low: Floats
    high: Floats
    starts: Ints
    index: Ints
    value: Floats


class _Builder:
    def __init__(self) -> None:
        self.size = 0
        self.low: list[float] = []
        self.high: list[float] = []
        self.length: list[int] = []
        self.index: list[int] = []
        self.value: list[float] = []

    def column(self) -> int:
        self.size += 1
        return self.size - 1

    def row(self, low: float, high: float, plus: list[int], minus: Sequence[int] = ()) -> None:
        self.low.append(low)
        self.high.append(high)
        self.length.append(len(plus) + len(minus))
        self.index += plus
        self.index += minus
        self.value += [1.0] * len(plus)
        self.value += [-1.0] * len(minus)


def copies_of(
    graph: Graph, blocks: Blocks, options: Mapping[Node, Sequence[Option]]
) -> dict[Node, int]:
    """How many nodes each representative stands for."""
    count: dict[Node, int] = defaultdict(int)
    for node in graph.fx.nodes:
        if blocks.representative[node] in options:
            count[blocks.representative[node]] += 1
    return count


def reading_patterns(graph: Graph, blocks: Blocks) -> Mapping[frozenset[Edge], int]:
    """The sets of (representative) edges that read one value, and how often each set occurs."""
    return blocks.patterns


def times_read(patterns: Mapping[frozenset[Edge], int]) -> dict[Edge, int]:
    """How many copies of every edge there are."""
    found: dict[Edge, int] = defaultdict(int)
    for pattern, times in patterns.items():
        for edge in pattern:
            found[edge] += times
    return found


Admits = Callable[[Edge, Sharding, Sharding, bool], bool]


def build_columns(  # one straight line through the equations, in their order
    patterns: Mapping[frozenset[Edge], int],
    options: Mapping[Node, Sequence[Option]],
    count: Mapping[Node, int],
    admits: Admits,
    shrinks: Callable[[Sharding, Sharding], bool],
    holds: Callable[[Edge], bool],
) -> Columns | None:
    """The programme's structure, or None where an edge has no way at all.

    `admits(edge, source, want, regather)` says whether a reshard may be considered,
    `shrinks` whether it leaves less of the value on every device, `holds(edge)` whether what
    arrives stays in memory.
    """
    made = _Builder()
    first: dict[Node, int] = {}
    spans: list[tuple[int, int]] = []
    for node, found in options.items():
        first[node] = made.size
        columns = [made.column() for _ in found]
        spans.append((columns[0], made.size))
        made.row(1, 1, columns)
    one_of = np.arange(len(options))

    shared_value = {edge for pattern in patterns if len(pattern) > 1 for edge in pattern}
    ordered = sorted(patterns.items(), key=lambda p: sorted(map(edge_key, p[0])))
    # The first copy of a block reads other values than the next ones, and does the same with them.
    ways_in = Counter((e.consumer, e.slot) for e in {e for pattern in patterns for e in pattern})
    edge_flows: dict[Edge, dict[tuple[Sharding, Sharding, bool], int]] = {}
    for pattern, _ in ordered:
        for edge in sorted(pattern, key=edge_key):
            if edge in edge_flows:
                continue
            alone = ways_in[edge.consumer, edge.slot] == 1
            waits = alone and edge not in shared_value and _may_wait(edge)
            begin = made.size
            flow = _add_edge(made, edge, options, first, admits, shrinks, waits)
            if not flow:
                return None
            edge_flows[edge] = flow
            spans.append((begin, made.size))

    flows: list[Flow] = []
    time, memory = Terms(), Terms()
    for pattern, times in ordered:
        readers = tuple(sorted(pattern, key=edge_key))
        shared: dict[tuple[Sharding, Sharding, bool], list[tuple[Edge, int]]] = defaultdict(list)
        for edge in readers:
            for key, column in edge_flows[edge].items():
                shared[key].append((edge, column))
        for (source, want, regather), members in shared.items():
            edge = members[0][0]
            saving = [c for e, c in members if holds(e)]
            item = len(flows)
            flows.append(
                Flow(edge.producer, edge.port, source, want, regather, readers, bool(saving))
            )
            if len(members) == 1:
                time.add(members[0][1], item, times)
                if saving:
                    memory.add(saving[0], item, times)
                continue
            if source != want or is_summed(edge.producer, edge.port):
                w = made.column()
                for _, column in members:
                    made.row(0, highspy.kHighsInf, [w], [column])
                time.add(w, item, times)
            if saving:
                kept = made.column()
                for column in saving:
                    made.row(0, highspy.kHighsInf, [kept], [column])
                memory.add(kept, item, times)
    return Columns(
        options,
        count,
        first,
        tuple(spans),
        one_of,
        tuple(flows),
        time,
        memory,
        made.size,
        np.array(made.low),
        np.array(made.high),
        np.concatenate(([0], np.cumsum(made.length))).astype(np.int64),
        np.array(made.index, dtype=np.int64),
        np.array(made.value),
    )


def _may_wait(edge: Edge) -> bool:
    """Whether the consumer turns its only input into as many bytes of one output."""
    node = edge.consumer
    value = node.meta.get("value")
    if node.op != "call_function" or not isinstance(value, Value):
        return False
    inputs = tensor_inputs(node)
    if len(inputs) != 1:
        return False
    given = value_of(inputs[0])
    return given.dtype == value.dtype and given.numel() == value.numel()


def _add_edge(
    made: _Builder,
    edge: Edge,
    options: Mapping[Node, Sequence[Option]],
    first: Mapping[Node, int],
    admits: Admits,
    shrinks: Callable[[Sharding, Sharding], bool],
    waits: bool,
) -> dict[tuple[Sharding, Sharding, bool], int]:
    """Flow columns of one edge between what its producer gives and what its consumer wants.

    `waits` says that a reshard which does not shrink the value can as well be done after the
    consumer, and is left to its edges.
    """
    gives: dict[tuple[Sharding, bool], list[int]] = defaultdict(list)
    for i, option in enumerate(options[edge.producer]):
        gives[option.gives[edge.port], option.regather].append(first[edge.producer] + i)
    wants: dict[Sharding, list[int]] = defaultdict(list)
    for i, option in enumerate(options[edge.consumer]):
        wants[option.wants[edge.slot]].append(first[edge.consumer] + i)
    flow: dict[tuple[Sharding, Sharding, bool], int] = {}
    into: dict[Sharding, list[int]] = {want: [] for want in wants}
    for (source, regather), producers in gives.items():
        out = []
        for want in wants:
            if waits and source != want and source in wants and not shrinks(source, want):
                continue
            if not admits(edge, source, want, regather):
                continue
            flow[source, want, regather] = column = made.column()
            out.append(column)
            into[want].append(column)
        made.row(0, 0, out, producers)
    for want, consumers in wants.items():
        made.row(0, 0, into[want], consumers)
    return flow
