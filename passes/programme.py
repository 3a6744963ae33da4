"""The planner's integer programme: one option per node, one flow per edge, one memory row.

Over the representatives of repeated blocks (`blocks.find_blocks`), with multiplicities::

    minimise    sum_n count_n * time(n, o) * x[n, o]
                + sum_v count_v * reshard(v, s, t) * w[v, s, t]
    one option  sum_o x[n, o] = 1                                   for every node n
    flow out    sum_t e[k, s, t] = sum_{o gives s} x[producer, o]   for every edge k, s
    flow in     sum_s e[k, s, t] = sum_{o wants t} x[consumer, o]   for every edge k, t
    pay once    w[v, s, t] >= e[k, s, t]                            for every edge k of v
    memory      sum_n count_n * memory(n, o) * x[n, o]
                + sum_v count_v * saved(v, t) * w[v, s, t] <= limit

`x` is binary; `e` and `w` are then integral by themselves. `v` is a produced value together with
the set of edges that read it, so that a reshard which several readers share is paid once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np
import torch.fx
from numpy.typing import NDArray

from autopar.errors import PassError
from autopar.ir.graph import Graph, Value, tensor_inputs, value_of
from autopar.ir.sharding import Sharding

from .blocks import Blocks
from .options import Option
from .price import Pricer

Node = torch.fx.Node
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Edge:
    """A value read by a node: output `port` of `producer` is tensor input `slot` of `consumer`."""

    producer: Node
    port: int
    consumer: Node
    slot: int


@dataclass(frozen=True)
class Assignment:
    """A solved programme: the option of every node, its cost, and what the solver says of it."""

    option: Mapping[Node, Option]
    time_s: float
    memory_bytes: float
    gap: float
    status: str


@dataclass
class _Columns:
    """Columns and rows of the programme while it is built (HiGHS takes them in one call)."""

    cost: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[float, float, list[int], list[float]]] = field(default_factory=list)

    def column(self, cost: float, integer: bool = False) -> int:
        self.cost.append(cost)
        self.integer.append(integer)
        return len(self.cost) - 1

    def row(self, low: float, high: float, index: list[int], value: list[float]) -> None:
        self.rows.append((low, high, index, value))


def edges_of(graph: Graph) -> list[Edge]:
    """Every read of a tensor value by an op or by the output, through `getitem` nodes."""
    found = []
    for node in graph.fx.nodes:
        if node.op == "output" or (node.op == "call_function" and not is_getitem(node)):
            for slot, source in enumerate(tensor_inputs(node)):
                found.append(Edge(*producer_of(source), node, slot))
    return found


def is_getitem(node: Node) -> bool:
    """Whether a node only picks one output of the op before it."""
    return getattr(node.target, "__name__", "") == "getitem"


def producer_of(node: Node) -> tuple[Node, int]:
    """The op behind a value and which of its tensor outputs it is."""
    if not is_getitem(node):
        return node, 0
    source, index = node.args[0], node.args[1]
    assert isinstance(source, Node) and isinstance(index, int)
    values = source.meta["value"]
    return source, sum(isinstance(v, Value) for v in values[:index])


def solve(  # noqa: C901  # one straight line through the equations above, in their order
    graph: Graph,
    blocks: Blocks,
    options: Mapping[Node, Sequence[Option]],
    pricer: Pricer,
    memory_limit: float,
    time_limit_s: float = 60.0,
    minimise_memory: bool = False,
    better_than_s: float = float("inf"),
) -> Assignment | None:
    """Best assignment within the memory limit (bytes), or None if there is none.

    `options` maps every representative node (placeholders, calls, the output) to its options.
    `minimise_memory` asks for the leanest assignment whatever the limit and the time. Options and
    flows that cannot be part of an assignment that takes less than `better_than_s` are left out;
    None then also says that there is nothing better.
    """
    if any(not found for found in options.values()):
        return None
    stands_for = blocks.representative
    count: dict[Node, int] = defaultdict(int)
    for node in graph.fx.nodes:
        if stands_for[node] in options:
            count[stands_for[node]] += 1
    options, slack = _within_reach(options, count, better_than_s)
    if slack < 0:
        return None

    columns = _Columns()
    x = {
        node: [columns.column(count[node] * o.time_s, integer=True) for o in found]
        for node, found in options.items()
    }
    for node in options:
        columns.row(1, 1, list(x[node]), [1.0] * len(x[node]))

    readers: dict[tuple[Node, int], list[Edge]] = defaultdict(list)
    for edge in edges_of(graph):
        readers[edge.producer, edge.port].append(edge)
    patterns: dict[frozenset[Edge], int] = defaultdict(int)
    for edges in readers.values():
        patterns[
            frozenset(
                Edge(stands_for[e.producer], e.port, stands_for[e.consumer], e.slot) for e in edges
            )
        ] += 1

    memory: dict[int, float] = defaultdict(float)
    for node, found in options.items():
        for column, option in zip(x[node], found, strict=True):
            if option.memory_bytes:
                memory[column] += count[node] * option.memory_bytes

    times_read: dict[Edge, int] = defaultdict(int)
    shared_value: set[Edge] = set()
    for pattern, times in patterns.items():
        for edge in pattern:
            times_read[edge] += times
            if len(pattern) > 1:
                shared_value.add(edge)
    flows: dict[Edge, dict[tuple[Sharding, Sharding, bool], int]] = {}
    for pattern, times in sorted(patterns.items(), key=lambda p: sorted(map(_edge_key, p[0]))):
        ordered = sorted(pattern, key=_edge_key)
        for edge in ordered:
            if edge not in flows:
                waits = edge not in shared_value and _may_wait(edge)
                made = _add_flow(columns, edge, options, x, pricer, slack / times_read[edge], waits)
                if made is None:
                    return None
                flows[edge] = made
        shared: dict[tuple[Sharding, Sharding, bool], list[tuple[Edge, int]]] = defaultdict(list)
        for edge in ordered:
            for key, column in flows[edge].items():
                shared[key].append((edge, column))
        for (source, want, regather), members in shared.items():
            edge = members[0][0]
            price = times * pricer.edge_time_s(edge.producer, edge.port, source, want, regather)
            saves = [c for e, c in members if pricer.saves_input(e.consumer, e.slot)]
            saved = times * pricer.saved_input_bytes(
                edge.producer, edge.port, source, want, regather
            )
            if len(members) == 1:
                columns.cost[members[0][1]] += price
                if saves and saved:
                    memory[saves[0]] += saved
                continue
            if price:
                w = columns.column(price)
                for _, column in members:
                    columns.row(0, highspy.kHighsInf, [w, column], [1.0, -1.0])
            if saves and saved:
                kept = columns.column(0.0)
                for column in saves:
                    columns.row(0, highspy.kHighsInf, [kept, column], [1.0, -1.0])
                memory[kept] += saved
    if minimise_memory:
        columns.cost = [memory.get(column, 0.0) for column in range(len(columns.cost))]
    elif memory_limit < float("inf"):
        # In MiB: HiGHS takes numbers below 1e-9 for zeros, and very large ones for infinite.
        mib = [nbytes / 2**20 for nbytes in memory.values()]
        columns.row(-highspy.kHighsInf, memory_limit / 2**20, list(memory), mib)

    solved = _run(columns, x, time_limit_s, float("inf") if minimise_memory else better_than_s)
    if solved is None:
        return None
    chosen, objective, gap, status = solved
    representative = {node: options[node][i] for node, i in chosen.items()}
    everywhere = {
        node: representative[stands_for[node]]
        for node in graph.fx.nodes
        if stands_for[node] in representative
    }
    time_s, memory_bytes = evaluate(graph, everywhere, pricer)
    recomputed = memory_bytes if minimise_memory else time_s
    if abs(recomputed - objective) > 1e-6 * max(abs(objective), 1e-12):
        raise PassError(
            "solve",
            "objective_is_cost",
            f"the programme says {objective:.9g}, its plan costs {recomputed:.9g}",
        )
    return Assignment(everywhere, time_s, memory_bytes, gap, status)


def _within_reach(
    options: Mapping[Node, Sequence[Option]], count: Mapping[Node, int], better_than_s: float
) -> tuple[dict[Node, list[Option]], float]:
    """Options that an assignment faster than the bound can contain, and what it may lose on edges.

    Every node takes at least as long as its fastest option: what is left of the bound is the slack.
    """
    least = {node: min(o.time_s for o in found) for node, found in options.items()}
    slack = better_than_s - sum(count[node] * least[node] for node in options)
    kept = {
        node: [o for o in found if count[node] * (o.time_s - least[node]) <= slack]
        for node, found in options.items()
    }
    return kept, slack


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


def _edge_key(edge: Edge) -> tuple[str, int, str, int]:
    return (edge.producer.name, edge.port, edge.consumer.name, edge.slot)


def _add_flow(
    columns: _Columns,
    edge: Edge,
    options: Mapping[Node, Sequence[Option]],
    x: Mapping[Node, list[int]],
    pricer: Pricer,
    slack: float,
    waits: bool,
) -> dict[tuple[Sharding, Sharding, bool], int] | None:
    """Flow columns of one edge between what its producer gives and what its consumer wants.

    Reshards that take longer than `slack` seconds are left out; `waits` says that a reshard which
    does not shrink the value can as well be done after the consumer, and is left to its edges.
    """
    gives: dict[tuple[Sharding, bool], list[int]] = defaultdict(list)
    for column, option in zip(x[edge.producer], options[edge.producer], strict=True):
        gives[option.gives[edge.port], option.regather].append(column)
    wants: dict[Sharding, list[int]] = defaultdict(list)
    for column, option in zip(x[edge.consumer], options[edge.consumer], strict=True):
        wants[option.wants[edge.slot]].append(column)
    flow: dict[tuple[Sharding, Sharding, bool], int] = {}
    into: dict[Sharding, list[int]] = {want: [] for want in wants}
    for (source, regather), producers in gives.items():
        out = []
        for want in wants:
            if waits and source != want and source in wants and not pricer.shrinks(source, want):
                continue
            time_s = pricer.edge_time_s(edge.producer, edge.port, source, want, regather)
            if time_s > slack or time_s == float("inf"):
                continue
            flow[source, want, regather] = column = columns.column(0.0)
            out.append(column)
            into[want].append(column)
        columns.row(0, 0, out + producers, [1.0] * len(out) + [-1.0] * len(producers))
    for want, consumers in wants.items():
        made = into[want]
        columns.row(0, 0, made + consumers, [1.0] * len(made) + [-1.0] * len(consumers))
    return flow


def _run(
    columns: _Columns,
    x: Mapping[Node, list[int]],
    time_limit_s: float,
    better_than: float = float("inf"),
) -> tuple[dict[Node, int], float, float, str] | None:
    """Solve the programme: the index of every node's option, the objective, gap and status.

    The linear relaxation comes first. It is usually integral; where it is not, the nodes that it
    decides are fixed and the rest is solved exactly, with the relaxation as the bound of the gap.
    None if nothing is feasible, or if the relaxation shows that nothing is below `better_than`.
    """
    lp = _model(columns)
    relaxed = _highs(lp, time_limit_s)
    if relaxed is None:
        return None
    bound = float(relaxed @ np.array(columns.cost))
    if bound >= better_than:
        return None
    values, status = relaxed, "integral relaxation"
    open_nodes = [n for n, index in x.items() if relaxed[index].max() < 1 - 1e-6]
    if open_nodes:
        status = f"{len(open_nodes)} nodes solved exactly"
        lower, upper = np.zeros(len(relaxed)), np.ones(len(relaxed))
        for node, index in x.items():
            if node not in open_nodes:
                upper[index] = 0.0
                best = index[int(np.argmax(relaxed[index]))]
                lower[best] = upper[best] = 1.0
        exact = _highs(_model(columns, lower, upper, integral=True), time_limit_s)
        if exact is None:
            status = "solved exactly"
            exact = _highs(_model(columns, integral=True), time_limit_s)
        if exact is None:
            return None
        values = exact
    objective = float(values @ np.array(columns.cost))
    chosen = {node: int(np.argmax(values[index])) for node, index in x.items()}
    gap = (objective - bound) / objective if objective > 0 else 0.0
    return chosen, objective, max(gap, 0.0), status


def _model(
    columns: _Columns,
    lower: Vector | None = None,
    upper: Vector | None = None,
    integral: bool = False,
) -> highspy.HighsLp:
    """The programme as HiGHS takes it."""
    n = len(columns.cost)
    cost = np.array(columns.cost)
    # HiGHS's tolerances are absolute: bring the objective to order one thousand.
    scale = 1e3 / max(float(np.abs(cost).max(initial=0.0)), 1e-30)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, len(columns.rows)
    lp.col_cost_ = cost * scale
    lp.col_lower_ = np.zeros(n) if lower is None else lower
    lp.col_upper_ = np.ones(n) if upper is None else upper
    lp.row_lower_ = np.array([row[0] for row in columns.rows])
    lp.row_upper_ = np.array([row[1] for row in columns.rows])
    starts = np.cumsum([0] + [len(row[2]) for row in columns.rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = starts.astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate([np.array(r[2], dtype=np.int32) for r in columns.rows])
    lp.a_matrix_.value_ = np.concatenate([np.array(r[3], dtype=np.float64) for r in columns.rows])
    if integral:
        kind = highspy.HighsVarType
        lp.integrality_ = [kind.kInteger if i else kind.kContinuous for i in columns.integer]
    return lp


def _highs(lp: highspy.HighsLp, time_limit_s: float) -> Vector | None:
    """Solve one model with HiGHS; the columns' values, or None if there is no solution."""
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, value in (
        ("output_flag", False),
        ("time_limit", time_limit_s),
        ("mip_rel_gap", 1e-5),
        ("threads", 1),
    ):
        solver.setOptionValue(option, value)
    if solver.passModel(lp) == highspy.HighsStatus.kError:
        raise PassError("solve", "programme_is_legal", "HiGHS does not take the programme")
    solver.run()
    feasible = int(highspy.SolutionStatus.kSolutionStatusFeasible)
    if int(solver.getInfo().primal_solution_status) != feasible:
        return None
    return np.array(solver.getSolution().col_value)


def evaluate(graph: Graph, option: Mapping[Node, Option], pricer: Pricer) -> tuple[float, float]:
    """Cost of an assignment from scratch, node by node: seconds per step and bytes."""
    time_s = sum(o.time_s for o in option.values())
    memory = sum(o.memory_bytes for o in option.values())
    paid: set[tuple[Node, int, Sharding]] = set()
    kept: set[tuple[Node, int, Sharding]] = set()
    for edge in edges_of(graph):
        producer = option[edge.producer]
        source, want = producer.gives[edge.port], option[edge.consumer].wants[edge.slot]
        key = (edge.producer, edge.port, want)
        if key not in paid:
            paid.add(key)
            time_s += pricer.edge_time_s(edge.producer, edge.port, source, want, producer.regather)
        if pricer.saves_input(edge.consumer, edge.slot) and key not in kept:
            kept.add(key)
            memory += pricer.saved_input_bytes(
                edge.producer, edge.port, source, want, producer.regather
            )
    return time_s, memory
