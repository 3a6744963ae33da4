"""The linear relaxation of a programme on many meshes: solved on one, a bound for all.

Any weights of the flow rows (`duals`), of memory and of what overlaps give a lower bound on every
mesh: of the columns of a node, or of the reshards of an edge, exactly one is used (Lagrangian
relaxation; Fisher, "The Lagrangian relaxation method for solving integer programming problems",
1981). The relaxation's own weights make the bound on its mesh tight.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from autopar.errors import PassError

from .columns import Columns
from .programme import Rows, rows_of
from .variant import ILLEGAL_S, Prices

Array = NDArray[np.float64]

# How HiGHS is asked, and the seconds that each way is given: a relaxation takes the simplex a tenth
# of a second, twice as long with presolve.
METHODS: tuple[tuple[tuple[tuple[str, str], ...], float], ...] = (
    ((("solver", "simplex"), ("presolve", "off")), 10.0),
    ((("solver", "simplex"), ("presolve", "on")), 10.0),
    ((("solver", "ipm"), ("presolve", "on")), 20.0),
)
QUIET = (("output_flag", False), ("threads", 1))
DECIDED = (
    highspy.HighsModelStatus.kOptimal,
    highspy.HighsModelStatus.kInfeasible,
    highspy.HighsModelStatus.kUnboundedOrInfeasible,
)


@dataclass(frozen=True)
class Weights:
    """Lagrange multipliers: of the rows (multiplied into the columns), of time, of memory."""

    of_columns: Array
    late: float
    memory: float
    limit: float


@dataclass(frozen=True)
class Relaxed:
    """A solved relaxation: its value in seconds, the columns, bytes, and the weights it proves.

    `serial_s` is what it would take if nothing overlapped; `whole` are the columns and what is
    exposed.
    """

    time_s: float
    whole: Array
    memory_bytes: float
    weights: Weights
    serial_s: float

    @property
    def values(self) -> Array:
        return self.whole[:-1]


class Relaxation:
    """One programme in HiGHS, solved for mesh after mesh."""

    def __init__(self, columns: Columns, prices: Prices) -> None:
        self.columns, self.prices = columns, prices
        self._fast, self._lean = _Solver(columns), _Solver(columns)

    def solve(self, at: int, memory_limit: float) -> Relaxed | None:
        """The relaxation on mesh `at` within `memory_limit` bytes; None if nothing is feasible."""
        prices = self.prices
        cost, late = prices.cost[:, at], prices.late[:, at]
        legal = cost < ILLEGAL_S
        rows: list[tuple[float, float, Array]] = []
        exposed = bool(late.any())
        if exposed:
            # In microseconds: HiGHS takes numbers below 1e-9 for zeros.
            row = np.append((prices.hides[:, at] - late) * 1e6, 1.0)
            rows.append((0.0, highspy.kHighsInf, row))
        limited = memory_limit < float("inf")
        if limited:
            row = np.append(prices.memory[:, at] / 2**20, 0.0)
            rows.append((-highspy.kHighsInf, memory_limit / 2**20, row))
        found = self._fast.run(np.append(np.where(legal, cost, 0.0), 1e-6 * exposed), legal, rows)
        if found is None:
            return None
        values, of_columns, duals = found
        late_weight = min(max(duals.pop(0) * 1e6, 0.0), 1.0) if exposed else 0.0
        memory_weight = max(-duals.pop(0) / 2**20, 0.0) if limited else 0.0
        weights = Weights(of_columns, late_weight, memory_weight, memory_limit if limited else 0.0)
        time_s = float(cost @ values[:-1]) + (1e-6 * float(values[-1]) if exposed else 0.0)
        nbytes = float(prices.memory[:, at] @ values[:-1])
        serial_s = float((cost + late) @ values[:-1])
        return Relaxed(time_s, values, nbytes, weights, serial_s)

    def rows(self, at: int, memory_limit: float) -> Rows:
        """The whole programme on mesh `at`."""
        p = self.prices
        cost, legal = p.cost[:, at], p.cost[:, at] < ILLEGAL_S
        late, hides, memory = p.late[:, at], p.hides[:, at], p.memory[:, at]
        priced = np.where(legal, cost, 0.0)
        return rows_of(self.columns, priced, late, hides, memory, memory_limit, legal=legal)

    @property
    def stalled(self) -> bool:
        """Whether the last relaxation was given up for time, and not for want of a solution."""
        return self._fast.stalled

    def least_memory(self, at: int) -> Array:
        """Bytes below which no assignment is, on every mesh; tight on mesh `at`."""
        memory = self.prices.memory
        legal = self.prices.cost[:, at] < ILLEGAL_S
        cost_of = np.append(np.where(legal, memory[:, at], 0.0), 0.0)
        found = self._lean.run(cost_of, legal, [])
        if found is None:  # what is illegal here says nothing of other meshes
            here = 0.0 if self._lean.stalled else np.inf
            return np.where(np.arange(memory.shape[1]) == at, here, 0.0)
        return self._least(memory - found[1][:, None])

    def bounds(self, weights: Weights) -> Array:
        """Seconds below which no assignment is, on every mesh."""
        left = self.prices.weighed(slice(None), weights.late, weights.memory)
        left = left - weights.of_columns[:, None]
        return self._least(left) - weights.memory * weights.limit

    def _least(self, left: Array) -> Array:
        """The least sum of one column per span, and of any of the rest, on every mesh."""
        starts = np.array([begin for begin, _ in self.columns.spans])
        end = self.columns.spans[-1][1]
        least = np.minimum.reduceat(left[:end], starts, axis=0).sum(axis=0)
        made: Array = least + np.minimum(left[end:], 0.0).sum(axis=0)
        return made

    def reduced(self, at: int, weights: Weights) -> Array:
        """How much more than the bound an assignment takes at least if it uses a column."""
        left = self.prices.weighed(slice(at, at + 1), weights.late, weights.memory)[:, 0]
        left = left - weights.of_columns
        made = np.zeros(self.columns.size)
        for begin, end in self.columns.spans:
            made[begin:end] = left[begin:end] - left[begin:end].min()
        return made + self._along_edges(made)

    def _along_edges(self, reduced: Array) -> Array:
        """What the cheapest reshards that an option allows add to its reduced cost.

        Every edge uses one reshard, and the row of an option's sharding says which it allows.
        """
        columns = self.columns
        rows = np.repeat(np.arange(len(columns.low)), np.diff(columns.starts))
        of_flow = (columns.low == 0) & (columns.high == 0)
        moves = np.where(columns.value > 0, reduced[columns.index], np.inf)
        least = np.minimum.reduceat(moves, columns.starts[:-1])
        added = np.zeros(columns.size)
        picks = (columns.value < 0) & of_flow[rows]
        np.add.at(added, columns.index[picks], np.minimum(least[rows[picks]], ILLEGAL_S))
        return added


class _Solver:
    """The rows of a programme for HiGHS.

    Each run is a new solver: one that has solved other meshes, even with its basis cleared, can
    stall for as long as forty runs take.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns, self._rows, self.stalled = columns, len(columns.low), False
        self._rows_of = np.repeat(np.arange(self._rows), np.diff(columns.starts))

    def run(
        self, cost: Array, legal: NDArray[np.bool_], rows: list[tuple[float, float, Array]]
    ) -> tuple[Array, Array, list[float]] | None:
        """(columns, weights of the rows times the columns, duals of the extra rows) of one cost."""
        columns, n = self._columns, self._columns.size
        scale = 1e3 / max(float(np.abs(cost[:-1]).max(initial=0.0)), 1e-30)
        lp = self._model(cost * scale, legal, rows)
        for how, seconds in METHODS:
            solver = highspy.Highs()  # type: ignore[no-untyped-call]
            asked: tuple[tuple[str, str | bool | float], ...] = (*how, *QUIET)
            for option, value in (*asked, ("time_limit", seconds)):
                solver.setOptionValue(option, value)
            if solver.passModel(lp) == highspy.HighsStatus.kError:
                raise PassError("relax", "programme_is_legal", "HiGHS does not take the programme")
            solver.run()
            status = solver.getModelStatus()
            self.stalled = status not in DECIDED
            if not self.stalled:
                break
        if status != highspy.HighsModelStatus.kOptimal:
            return None
        solution = solver.getSolution()
        duals = np.array(solution.row_dual) / scale
        own = duals[: self._rows].copy()
        own[columns.one_of] = 0.0  # what a node must choose is in the bound itself
        of_columns: Array = np.bincount(
            columns.index, weights=columns.value * own[self._rows_of], minlength=n
        ).astype(np.float64)
        return np.array(solution.col_value), of_columns, list(duals[self._rows :])

    def _model(
        self, cost: Array, legal: NDArray[np.bool_], extra: list[tuple[float, float, Array]]
    ) -> highspy.HighsLp:
        columns, n = self._columns, self._columns.size + 1
        places = [np.flatnonzero(np.abs(row) > 1e-9) for _, _, row in extra]
        ends = columns.starts[-1] + np.cumsum([len(at) for at in places], dtype=np.int64)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = n, self._rows + len(extra)
        lp.col_cost_ = cost
        lp.col_lower_ = np.zeros(n)
        lp.col_upper_ = np.append(legal.astype(np.float64), highspy.kHighsInf)
        lp.row_lower_ = np.append(columns.low, [low for low, _, _ in extra])
        lp.row_upper_ = np.append(columns.high, [high for _, high, _ in extra])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.concatenate((columns.starts, ends)).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate((columns.index, *places)).astype(np.int32)
        values = [row[at] for at, (_, _, row) in zip(places, extra, strict=True)]
        lp.a_matrix_.value_ = np.concatenate((columns.value, *values))
        return lp
