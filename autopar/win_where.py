"""The crossover: for which batch, sequence, bandwidth or memory another plan wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from .cost.cluster import Cluster
from .cost.crossover import NOBODY, Contender, Span, allowed_sizes, crossover
from .cost.evaluate import Array
from .errors import UserError
from .passes.case import Case
from .plan import Plan
from .questions import Question
from .report import plain_table
from .units import bytes_text, seconds_text

VARIABLES = ("batch", "sequence", "bandwidth", "memory")
RIVALS = ("auto", "data", "zero", "tensor", "data+tensor", "zero+tensor")
POINTS = 257  # of a continuous variable, before the changes are narrowed down


def crossover_report(
    question: Question,
    variable: str,
    others: Mapping[str, Plan],
    level: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Who wins where along one variable: the plan, and `others` or the best of other strategies."""
    plans = {_label(question.plan): question.plan}
    for name, plan in (others or _rivals(question, progress)).items():
        if not any(_same(plan, known) for known in plans.values()):
            plans[name] = plan
    if len(plans) == 1:
        raise UserError(
            "there is no other plan to compare with",
            fix="name one with --against",
        )
    progress("evaluating")
    cases = {name: question.case(plan) for name, plan in plans.items()}
    values, unit, exact = _values(question, variable, cases, level)
    where = level_of(question.cluster, level) if variable == "bandwidth" else ""
    contenders = [Contender(n, _at(case, variable, where)) for n, case in cases.items()]
    limit = _limit(question, variable)
    spans = crossover(contenders, values, limit, exact=exact)
    scale = bandwidth_of(question.cluster, where) if where else 1.0
    names = list(cases)
    return {
        "crossover": variable,
        "level": where,
        "unit": unit,
        "at": _now(question, variable, where) * scale,
        "plans": {
            name: {"mesh": str(c.plan.mesh), "time_s": c.time_s, "memory_bytes": c.memory_bytes}
            for name, c in cases.items()
        },
        "spans": [_span(s, names, scale) for s in spans],
        "sentences": sentences(spans, names, variable, where, scale),
    }


def _label(plan: Plan) -> str:
    return f"the plan ({plan.mesh})"


def _same(a: Plan, b: Plan) -> bool:
    stored = [{n: (s.sharding, s.regather) for n, s in p.params.items()} for p in (a, b)]
    return a.mesh == b.mesh and a.choices == b.choices and stored[0] == stored[1]


def _rivals(question: Question, progress: Callable[[str], None]) -> dict[str, Plan]:
    """The best plan of every other strategy that applies."""
    found: dict[str, Plan] = {}
    for strategy in RIVALS:
        if strategy == question.plan.strategy:
            continue
        progress(f"planning: {strategy}")
        try:
            plan = question.best(strategy)
        except UserError:  # does not apply, or fits nowhere: no rival
            continue
        found[f"{strategy} ({plan.mesh})"] = plan
    return found


def _values(
    question: Question, variable: str, cases: Mapping[str, Case], level: str | None
) -> tuple[Array, str, bool]:
    """Values to try, their unit, and whether only these may occur."""
    if variable in ("batch", "sequence"):
        name = variable[0]
        known = {symbol.name: size for symbol, size in question.hints.items()}
        if name not in known:
            raise question.fixed(name)
        units = set() if variable == "batch" else {max(1, known[name] // 64)}
        for case in cases.values():
            k = case.accounts.micro_batches if variable == "batch" else 1
            sizes = [axis.size for axis in case.pricer.mesh]
            units |= {k * n for n in (*sizes, math.prod(sizes)) if k * n > 1}
        high = 64 * max(known[name], *units, 1)
        values = allowed_sizes(sorted(units or {1}), 1, high)
        return np.union1d(values, [1.0, known[name]]), "", True
    if variable == "bandwidth":
        level_of(question.cluster, level)
        return np.geomspace(1 / 64, 64, POINTS), "B/s", False
    most = max(c.memory_bytes for c in cases.values())
    least = min(c.memory_bytes for c in cases.values())
    return np.geomspace(least / 2, 2 * max(most, question.limit), POINTS), "B", False


def _at(
    case: Case, variable: str, level: str
) -> Callable[[Array], tuple[Array, Array, np.ndarray[Any, np.dtype[np.bool_]]]]:
    def evaluate(values: Array) -> Any:
        if variable == "memory":
            n = np.ones(len(values))
            return case.time_s * n, case.memory_bytes * n, n > 0
        if variable == "bandwidth":
            return case.evaluate(case.settings(bandwidth={level: values}))
        return case.evaluate(case.settings({variable[0]: values}))

    return evaluate


def _limit(question: Question, variable: str) -> Callable[[Array], Array]:
    if variable == "memory":
        return lambda values: values
    return lambda values: np.full(len(values), question.limit)


def _now(question: Question, variable: str, level: str) -> float:
    """Where the question itself stands."""
    if variable == "memory":
        return question.limit
    if variable == "bandwidth":
        return 1.0
    return float(next(n for s, n in question.hints.items() if s.name == variable[0]))


def level_of(cluster: Cluster, level: str | None) -> str:
    """A level of the cluster by name, by default the outermost; raises UserError if unknown."""
    names = [found.name for found in cluster.levels]
    if level is None:
        return names[-1]
    if level not in names:
        raise UserError(
            f"{cluster.name} has no level {level!r}", fix=f"use one of {', '.join(names)}"
        )
    return level


def bandwidth_of(cluster: Cluster, level: str) -> float:
    """What a level carries at most: bus bytes per second of its largest all-reduce group."""
    found = next(c for c in cluster.levels if c.name == level)
    return float(found.collectives["all_reduce"][-1].bandwidth.peak)


def _span(span: Span, names: list[str], scale: float) -> dict[str, Any]:
    nobody = span.winner == NOBODY
    return {
        "low": span.low * scale,
        "high": span.high * scale,
        "winner": None if nobody else names[span.winner],
        "low_s": None if nobody else span.low_s,
        "high_s": None if nobody else span.high_s,
    }


def sentences(
    spans: list[Span], names: list[str], variable: str, level: str, scale: float
) -> list[str]:
    """The spans in words: `the plan (dp=4) wins from batch 96`."""
    what = f"{level} bandwidth" if variable == "bandwidth" else variable
    found = []
    for i, span in enumerate(spans):
        low, high = (value_text(v * scale, variable) for v in (span.low, span.high))
        first, last = i == 0, i == len(spans) - 1
        if span.low == span.high:
            where = f"at {what} {low}"
        elif first and last:
            where = f"at every {what} tried, {low} to {high}"
        elif first:
            where = f"up to {what} {high}"
        elif last:
            where = f"from {what} {low}"
        else:
            where = f"from {what} {low} to {high}"
        who = "no plan fits" if span.winner == NOBODY else f"{names[span.winner]} wins"
        found.append(f"{who} {where}")
    return found


def value_text(value: float, variable: str) -> str:
    """A value of a variable, as people write it."""
    if variable == "memory":
        return bytes_text(value)
    return f"{value / 1e9:.3g} GB/s" if variable == "bandwidth" else f"{value:.0f}"


def print_crossover(found: Mapping[str, Any], console: Console) -> None:
    """The plans, and who wins where."""
    variable = found["crossover"]
    table = plain_table("the plans", "", ">time", ">memory")
    for name, plan in found["plans"].items():
        table.add_row(name, seconds_text(plan["time_s"]), bytes_text(plan["memory_bytes"]))
    console.print(table)
    console.print(f"at {variable} {value_text(found['at'], variable)}", style="dim")
    console.print()
    shown = found["sentences"]
    for sentence in shown[:20]:
        console.print(Text(sentence))
    if len(shown) > 20:
        console.print(f"and {len(shown) - 20} more changes: see --json", style="dim")
