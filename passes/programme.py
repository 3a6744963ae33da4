"""The planner's integer programme: one option per node, one flow per edge, one memory row.

Over the representatives of repeated blocks (`blocks.find_blocks`), with multiplicities::

    minimise    sum_n count_n * time(n, o) * x[n, o]
                + sum_v count_v * reshard(v, s, t) * w[v, s, t] + z
    one option  sum_o x[n, o] = 1                                   for every node n
    flow out    sum_t e[k, s, t] = sum_{o gives s} x[producer, o]   for every edge k, s
    flow in     sum_s e[k, s, t] = sum_{o wants t} x[consumer, o]   for every edge k, t
    pay once    w[v, s, t] >= e[k, s, t]                            for every edge k of v
    memory      sum_n memory(n, o) * x[n, o]
                + sum_v count_v * saved(v, t) * w[v, s, t] <= limit
    exposed     z >= parameters' reshards - overlap * compute

`x` is binary; `e` and `w` are then integral by themselves. `v` is a produced value together with
the set of edges that read it, so that a reshard which several readers share is paid once. The
reshards of parameters count in `z` alone where they overlap with compute, `columns` builds the rows
above memory, and `accounts` prices them under micro-batches and recomputation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np
import torch.fx
from numpy.typing import NDArray

from autopar.errors import PassError
from autopar.ir.graph import Graph
from autopar.ir.sharding import Sharding

from .accounts import Accounts, bill, regions_of
from .blocks import Blocks
from .columns import (
    Columns,
    Edge,
    build_columns,
    copies_of,
    edges_of,
    is_getitem,
    passes_on,
    producer_of,
    reading_patterns,
    times_read,
)
from .options import Option
from .price import Pricer

__all__ = [
    "Assignment",
    "Edge",
    "edges_of",
    "evaluate",
    "is_getitem",
    "passes_on",
    "producer_of",
    "solve",
]

Node = torch.fx.Node
Vector = NDArray[np.float64]

SMALL = 4000  # columns of a programme that is solved exactly in seconds at most


@dataclass(frozen=True)
class Assignment:
    """A solved programme: the option of every node, its cost, and what the solver says of it."""

    option: Mapping[Node, Option]
    time_s: float
    memory_bytes: float
    gap: float
    status: str


@dataclass(frozen=True)
class Rows:
    """A whole programme: cost and kind of the columns, rows in compressed form."""

    cost: Vector
    integer: NDArray[np.bool_]
    upper: Vector
    low: Vector
    high: Vector
    starts: NDArray[np.int64]
    index: NDArray[np.int64]
    value: Vector


def solve(
    graph: Graph,
    blocks: Blocks,
    options: Mapping[Node, Sequence[Option]],
    pricer: Pricer,
    memory_limit: float,
    time_limit_s: float = 60.0,
    minimise_memory: bool = False,
    better_than_s: float = float("inf"),
    accounts: Accounts | None = None,
) -> Assignment | None:
    """Best assignment within the memory limit (bytes), or None if there is none.

    `options` maps every representative node (placeholders, calls, the output) to its options.
    `minimise_memory` asks for the leanest assignment whatever the limit and the time. Options and
    flows that cannot be part of an assignment that takes less than `better_than_s` are left out;
    None then also says that there is nothing better. `accounts` default to one micro-batch, no
    recomputation and no overlap.
    """
    if any(not found for found in options.values()):
        return None
    if accounts is None:
        accounts = Accounts(pricer, regions_of(graph, blocks))
    count = copies_of(graph, blocks, options)
    options, slack = _within_reach(options, count, better_than_s, accounts)
    if slack < 0:
        return None

    patterns = reading_patterns(graph, blocks)
    times = times_read(patterns)

    def admits(edge: Edge, source: Sharding, want: Sharding, regather: bool) -> bool:
        seconds = pricer.edge_time_s(edge.producer, edge.port, source, want, regather)
        hides = accounts.overlap > 0 and edge.producer.op == "placeholder"
        return seconds < float("inf") and (hides or seconds <= slack / times[edge])

    columns = build_columns(
        patterns,
        options,
        count,
        admits,
        pricer.shrinks,
        accounts.holds,
    )
    if columns is None:
        return None
    rows = _priced(columns, accounts, memory_limit, minimise_memory)
    where = {node: range(at, at + len(options[node])) for node, at in columns.first.items()}
    bound = float("inf") if minimise_memory else better_than_s
    solved = _run(rows, where, time_limit_s, bound)
    if solved is None:
        return None
    chosen, objective, gap, status = solved
    representative = {node: options[node][i] for node, i in chosen.items()}
    stands_for = blocks.representative
    everywhere = {
        node: representative[stands_for[node]]
        for node in graph.fx.nodes
        if stands_for[node] in representative
    }
    time_s, memory_bytes = evaluate(graph, blocks, everywhere, accounts)
    recomputed = memory_bytes if minimise_memory else time_s
    if abs(recomputed - objective) > 1e-6 * max(abs(objective), 1e-12):
        raise PassError(
            "solve",
            "objective_is_cost",
            f"the programme says {objective:.9g}, its plan costs {recomputed:.9g}",
        )
    return Assignment(everywhere, time_s, memory_bytes, gap, status)


def evaluate(
    graph: Graph, blocks: Blocks, option: Mapping[Node, Option], accounts: Accounts
) -> tuple[float, float]:
    """Cost of an assignment from scratch: seconds per step and bytes."""
    paid = bill(graph, blocks, option, accounts)
    return paid.time_s(accounts.overlap), paid.memory_bytes


def _priced(
    columns: Columns, accounts: Accounts, memory_limit: float, minimise_memory: bool
) -> Rows:
    """Costs of the columns, and the rows for memory and for what overlaps."""
    cost, memory, hides, late = (np.zeros(columns.size) for _ in range(4))
    for node, found in columns.options.items():
        at, count = columns.first[node], columns.count[node]
        for i, option in enumerate(found):
            cost[at + i] = count * accounts.option_time_s(node, option)
            memory[at + i] = accounts.option_memory(node, option, count)
            if node.op != "placeholder":
                hides[at + i] = accounts.overlap * cost[at + i]
    for column, item, times in columns.time.triples():
        flow = columns.flows[item]
        seconds = times * accounts.flow_time_s(flow)
        cost[column] += times * accounts.sums_s(flow)
        if accounts.overlap and accounts.overlaps(flow):
            late[column] += seconds
        else:
            cost[column] += seconds
    for column, item, times in columns.memory.triples():
        memory[column] += accounts.flow_memory(columns.flows[item], times)
    return rows_of(columns, cost, late, hides, memory, memory_limit, minimise_memory)


def rows_of(
    columns: Columns,
    cost: Vector,
    late: Vector,
    hides: Vector,
    memory: Vector,
    memory_limit: float,
    minimise_memory: bool = False,
    legal: NDArray[np.bool_] | None = None,
) -> Rows:
    """The whole programme of priced columns; those that are not `legal` stay at zero."""
    n = columns.size + 1  # the last column is z
    integer = np.zeros(n, dtype=np.bool_)
    for node, found in columns.options.items():
        integer[columns.first[node] : columns.first[node] + len(found)] = True
    upper = np.ones(n) if legal is None else np.append(legal.astype(np.float64), 1.0)
    upper[-1] = highspy.kHighsInf
    costs = np.append(cost, 0.0)
    extra: list[tuple[float, float, Vector]] = []
    if late.any():
        costs[-1] = 1e-6  # z in microseconds: HiGHS takes numbers below 1e-9 for zeros
        extra.append((0.0, highspy.kHighsInf, np.append((hides - late) * 1e6, 1.0)))
    if minimise_memory:
        costs, extra = np.append(memory, 0.0), []
    elif memory_limit < float("inf"):
        # In MiB: very large numbers are infinite.
        row = np.append(memory / 2**20, 0.0)
        extra.append((-highspy.kHighsInf, memory_limit / 2**20, row))
    low, high = list(columns.low), list(columns.high)
    starts, index, value = list(columns.starts), [columns.index], [columns.value]
    for lowest, highest, row in extra:
        at_ = np.flatnonzero(np.abs(row) > 1e-9)
        low.append(lowest)
        high.append(highest)
        starts.append(starts[-1] + len(at_))
        index.append(at_)
        value.append(row[at_])
    return Rows(
        costs,
        integer,
        upper,
        np.array(low),
        np.array(high),
        np.array(starts, dtype=np.int64),
        np.concatenate(index),
        np.concatenate(value),
    )


def _within_reach(
    options: Mapping[Node, Sequence[Option]],
    count: Mapping[Node, int],
    better_than_s: float,
    accounts: Accounts,
) -> tuple[dict[Node, list[Option]], float]:
    """Options that an assignment faster than the bound can contain, and what it may lose on edges.

    Every node takes at least as long as its fastest option: what is left of the bound is the slack.
    """
    seconds = {
        node: [count[node] * accounts.option_time_s(node, o) for o in found]
        for node, found in options.items()
    }
    slack = better_than_s - sum(min(times) for times in seconds.values())
    kept = {
        node: [
            o for o, s in zip(found, seconds[node], strict=True) if s - min(seconds[node]) <= slack
        ]
        for node, found in options.items()
    }
    return kept, slack


def _run(
    rows: Rows,
    where: Mapping[Node, range],
    time_limit_s: float,
    better_than: float = float("inf"),
) -> tuple[dict[Node, int], float, float, str] | None:
    """Solve the programme: the index of every node's option, the objective, gap and status.

    The linear relaxation comes first. It is usually integral; where it is not, the nodes that it
    decides are fixed and the rest is solved exactly, with the relaxation as the bound of the gap;
    a small programme that this leaves a gap is solved exactly as a whole.
    None if nothing is feasible, or if the relaxation shows that nothing is below `better_than`.
    """
    relaxed = _highs(_model(rows), time_limit_s)
    if relaxed is None or float(relaxed @ rows.cost) >= better_than:
        return None
    return round_relaxed(rows, where, relaxed, time_limit_s)


def round_relaxed(
    rows: Rows, where: Mapping[Node, range], relaxed: Vector, time_limit_s: float = 60.0
) -> tuple[dict[Node, int], float, float, str] | None:
    """As `_run`, from the solution of the linear relaxation."""
    bound = float(relaxed @ rows.cost)
    values, status = relaxed, "integral relaxation"
    open_nodes = {n for n, at in where.items() if relaxed[at.start : at.stop].max() < 1 - 1e-6}
    if open_nodes:
        status = f"{len(open_nodes)} nodes solved exactly"
        lower, upper = np.zeros(len(relaxed)), rows.upper.copy()
        for node, at in where.items():
            if node not in open_nodes:
                upper[at.start : at.stop] = 0.0
                best = at.start + int(np.argmax(relaxed[at.start : at.stop]))
                lower[best] = upper[best] = 1.0
        exact = _highs(_model(rows, lower, upper, integral=True), time_limit_s)
        short = exact is not None and float(exact @ rows.cost) > bound + 1e-4 * abs(bound)
        if exact is None or (short and len(rows.cost) <= SMALL):
            whole = _highs(_model(rows, integral=True), time_limit_s)
            if whole is not None and (exact is None or whole @ rows.cost < exact @ rows.cost):
                exact, status = whole, "solved exactly"
        if exact is None:
            return None
        values = exact
    objective = float(values @ rows.cost)
    chosen = {node: int(np.argmax(values[at.start : at.stop])) for node, at in where.items()}
    gap = (objective - bound) / objective if objective > 0 else 0.0
    return chosen, objective, max(gap, 0.0), status


def _model(
    rows: Rows,
    lower: Vector | None = None,
    upper: Vector | None = None,
    integral: bool = False,
) -> highspy.HighsLp:
    """The programme as HiGHS takes it."""
    n = len(rows.cost)
    # HiGHS's tolerances are absolute: bring the objective to order one thousand.
    scale = 1e3 / max(float(np.abs(rows.cost[:-1]).max(initial=0.0)), 1e-30)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, len(rows.low)
    lp.col_cost_ = rows.cost * scale
    lp.col_lower_ = np.zeros(n) if lower is None else lower
    lp.col_upper_ = rows.upper if upper is None else upper
    lp.row_lower_ = rows.low
    lp.row_upper_ = rows.high
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = rows.starts.astype(np.int32)
    lp.a_matrix_.index_ = rows.index.astype(np.int32)
    lp.a_matrix_.value_ = rows.value
    if integral:
        kind = highspy.HighsVarType
        lp.integrality_ = [kind.kInteger if i else kind.kContinuous for i in rows.integer]
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
