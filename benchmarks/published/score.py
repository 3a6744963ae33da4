"""Scores of predictions against published runs: errors, rank correlation, out-of-memory calls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from .rows import Row

# Goals on the whole file; times and memory as absolute relative errors.
TIME_MEDIAN, TIME_P90, KENDALL, MEMORY_MEDIAN, OOM_RIGHT, COVERED = (
    0.06,
    0.20,
    0.85,
    0.08,
    0.95,
    0.9,
)
LEAST_IN_SWEEP = 4


@dataclass(frozen=True)
class Result:
    """One row with its prediction: seconds, bytes, what the device has; `why` where it has none."""

    row: Row
    time_s: float
    memory_bytes: float
    limit_bytes: float
    plan: str
    parts: dict[str, float]

    @property
    def time_error(self) -> float | None:
        """Relative error of the step time; None where none was measured."""
        return None if self.row.step_s is None else self.time_s / self.row.step_s - 1

    @property
    def memory_gib(self) -> float:
        return self.memory_bytes / 2**30

    @property
    def memory_error(self) -> float | None:
        """Relative error of the peak memory; the published figures are in GiB."""
        return None if self.row.mem_gb is None else self.memory_gib / self.row.mem_gb - 1

    @property
    def oom_right(self) -> bool | None:
        """Whether out of memory is called as it was; None where the row does not say."""
        if self.row.oom is None:
            return None
        return (self.memory_bytes > self.limit_bytes) == self.row.oom


def held_out(row_id: str) -> bool:
    """Whether a row is in the half that constants were not first fitted to."""
    return int(hashlib.sha256(row_id.encode()).hexdigest(), 16) % 2 == 1


def quantile(values: Iterable[float], share: float) -> float | None:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@dataclass(frozen=True)
class Errors:
    """Absolute relative errors of some rows, and the signed median."""

    rows: int
    median: float | None
    p90: float | None
    bias: float | None


def errors(values: Iterable[float | None]) -> Errors:
    known = [v for v in values if v is not None]
    sizes = [abs(v) for v in known]
    return Errors(
        len(known),
        median(sizes) if sizes else None,
        quantile(sizes, 0.9),
        median(known) if known else None,
    )


def sweeps(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Rows of one set: runs of one system, whose plans and models vary."""
    return _groups(results, lambda row: row.family)


def tables(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Rows of one published table: the same set and the same source."""
    return _groups(results, lambda row: f"{row.family}: {row.source}")


def _groups(results: Sequence[Result], key: Callable[[Row], str]) -> dict[str, list[Result]]:
    """Groups of at least four different plans."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.row.step_s is not None:
            groups.setdefault(key(result.row), []).append(result)
    return {
        name: group
        for name, group in groups.items()
        if len({r.plan for r in group}) >= LEAST_IN_SWEEP
    }


def kendall(group: Sequence[Result]) -> float | None:
    """Share of pairs in the right order minus those in the wrong one.

    Pairs with one measured time, or of one plan (their columns do not say how they differ), are
    left out.
    """
    right = wrong = 0
    for a, b in combinations(group, 2):
        if a.plan == b.plan or a.row.step_s is None or b.row.step_s is None:
            continue
        sign = (a.time_s - b.time_s) * (a.row.step_s - b.row.step_s)
        right += sign > 0
        wrong += sign < 0
    return (right - wrong) / (right + wrong) if right + wrong else None


@dataclass(frozen=True)
class Goal:
    """One goal: what was reached, what was asked, whether it is met (None: nothing to judge by)."""

    name: str
    reached: float | None
    wanted: float
    at_least: bool

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.wanted if self.at_least else self.reached <= self.wanted


def goals(results: Sequence[Result], rows: int) -> list[Goal]:
    """The overall goals."""
    time, memory = errors(r.time_error for r in results), errors(r.memory_error for r in results)
    ranks = [k for k in map(kendall, sweeps(results).values()) if k is not None]
    calls = [r.oom_right for r in results if r.oom_right is not None]
    return [
        Goal("rows covered", len(results) / rows if rows else None, COVERED, True),
        Goal("step time, median error", time.median, TIME_MEDIAN, False),
        Goal("step time, 90th percentile", time.p90, TIME_P90, False),
        Goal("Kendall, worst sweep", min(ranks, default=None), KENDALL, True),
        Goal("memory, median error", memory.median, MEMORY_MEDIAN, False),
        Goal("out of memory called right", share(calls), OOM_RIGHT, True),
    ]


def share(calls: Sequence[bool]) -> float | None:
    return sum(calls) / len(calls) if calls else None


# Baseline -----------------------------------------------------------------------------------------


def model_flops(row: Row) -> float:
    """Flops of a step without recomputation: 6 per weight and token, and attention's products."""
    heads = row.heads or 1
    kv = row.hidden * (row.kv_heads or heads) / heads
    ffn = row.ffn or 4 * row.hidden
    products = 3 if row.arch == "llama" else 2
    layer = 2 * row.hidden**2 + 2 * row.hidden * kv + products * row.hidden * ffn
    weights = row.layers * layer + row.hidden * row.vocab
    tokens = row.global_batch * row.seq
    return 6 * weights * tokens + 12 * row.layers * row.hidden * row.seq * tokens / 2


def constant_mfu(results: Sequence[Result], kind: Callable[[Row], str]) -> list[float | None]:
    """Errors of the simplest prediction: every step of a kind has the same flops per device second.

    The constant is the median over the fitted half of the rows (all where that half has none).
    """
    rate: dict[str, float] = {}
    timed = [r for r in results if r.row.step_s]
    for name in {kind(r.row) for r in timed}:
        mine = [r.row for r in timed if kind(r.row) == name]
        fitted = [row for row in mine if not held_out(row.id)] or mine
        rate[name] = median(model_flops(row) / (row.gpus * (row.step_s or 1.0)) for row in fitted)
    return [
        None
        if not r.row.step_s
        else model_flops(r.row) / (r.row.gpus * rate[kind(r.row)]) / r.row.step_s - 1
        for r in results
    ]
