"""`autopar timeline` and `autopar simulate`: a plan's step over time, here or elsewhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .cli_report import write_whole
from .cost.schedules import Schedule
from .cost.simulate import how_for, simulate
from .cost.simulator import How
from .cost.step import Step
from .cost.timeline import Points, Timeline, summarise
from .cost.trace import write_trace
from .errors import UserError
from .passes.case import Case
from .passes.describe import collapse, pattern
from .passes.staged_case import simulate_case
from .passes.timeline_of import step_of_case
from .plan import Plan
from .questions import Question, ask
from .report import WIDTH, fitted, make_console, plain_table
from .units import bytes_text, seconds_text, signed_seconds

MOST_OPS = 12
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Changes:
    """What `autopar simulate` does otherwise than the plan; None is as the plan has it."""

    cluster: str | None = None
    batch: int | None = None
    micro_batches: int | None = None
    schedule: str | None = None
    stages: int = 1
    chunks: int = 1
    overlap: bool | None = None
    slowdown: float | None = None
    prefetch: int | None = None
    reduce_every: bool | None = None


def show_timeline(
    plan_file: Path,
    target: str,
    *,
    inputs: tuple[str, ...] = (),
    cluster: str | None = None,
    optimizer: str = "adamw",
    trace: Path | None = None,
    out: Path | None = None,
) -> None:
    """Simulate a plan as it is and print its timeline; raises UserError for bad input."""
    simulate_plan(
        plan_file,
        target,
        Changes(cluster),
        inputs=inputs,
        optimizer=optimizer,
        trace=trace,
        out=out,
    )


def simulate_plan(
    plan_file: Path,
    target: str,
    changes: Changes,
    *,
    inputs: tuple[str, ...] = (),
    optimizer: str = "adamw",
    trace: Path | None = None,
    out: Path | None = None,
) -> None:
    """Simulate a plan with some things changed; raises UserError for bad input.

    `trace` is where a trace for Perfetto goes, `out` where the figures go as JSON (`-`: printed).
    """
    schedule = _checked(changes)
    for path in (trace, out):
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise UserError(
                f"cannot write {path}: its folder does not exist", fix="make the folder"
            )
    console = make_console()
    with make_console(stderr=True).status(f"loading {target}") as status:
        question = ask(
            plan_file,
            target,
            inputs=inputs,
            cluster=changes.cluster,
            optimizer=optimizer,
            progress=status.update,
        )
        status.update("simulating")
        case, step, timeline = simulated(question, changes, schedule)
    if trace is not None:
        write_trace(timeline, trace, f"a device of {case.cluster}")
    schedule = schedule or schedule_of(case.plan)
    found = figures(timeline, case, schedule)
    if out is not None:
        _write(out, found)
    if out is None or str(out) != "-":
        print_timeline(timeline, step, case.plan, schedule, console, str(case.cluster))
        for path in (trace, out):
            if path is not None:
                console.print(Text(f"wrote {path}"))


def simulated(
    question: Question, changes: Changes, schedule: Schedule | None = None
) -> tuple[Case, Step, Timeline]:
    """A plan's case, step and timeline under the changes; the question's cluster counts."""
    case, step = _changed(_rescheduled(question, changes), changes)
    if case.plan.pipeline is not None:
        made = simulate_case(case, _how(case, changes))
        return case, made.step, made.timeline
    timeline = simulate(step, case.cluster, schedule=schedule, how=_how(case, changes))
    return case, step, timeline


def schedule_of(plan: Plan) -> Schedule | None:
    """The schedule of a plan's own pipeline."""
    if plan.pipeline is None:
        return None
    return Schedule(plan.stages, plan.pipeline.chunks, plan.pipeline.schedule)


def _rescheduled(question: Question, changes: Changes) -> Question:
    """The question with the plan's own pipeline on another schedule; UserError where it cannot."""
    plan = question.plan
    if plan.pipeline is None:
        if changes.schedule is not None and changes.stages == 1:
            raise UserError("a pipeline schedule needs stages", fix="add --stages 2 or more")
        return question
    if changes.stages > 1 or changes.chunks > 1:
        raise UserError(
            f"the plan has a pipeline of its own: {plan.stages} stages",
            fix="leave --stages and --chunks out, or plan without a pipeline",
        )
    if changes.schedule is None:
        return question
    pipeline = replace(plan.pipeline, schedule=changes.schedule)
    Schedule(plan.stages, pipeline.chunks, pipeline.schedule)
    return replace(question, plan=replace(plan, pipeline=pipeline))


def _checked(changes: Changes) -> Schedule | None:
    """The schedule that is asked for; raises UserError where figures make no sense."""
    for name in ("batch", "micro_batches", "stages", "chunks"):
        number = getattr(changes, name)
        option = "--" + name.replace("_", "-")
        if number is not None and number < 1:
            raise UserError(f"{option} {number} is not positive", fix=f"use {option} 1 or more")
    if changes.prefetch is not None and changes.prefetch < 0:
        raise UserError(f"--prefetch {changes.prefetch} is negative", fix="use 0 or more")
    slowdown = changes.slowdown
    if slowdown is not None and not 0 <= slowdown < math.inf:
        raise UserError(
            f"--slowdown {slowdown} is not a share of compute time",
            fix="use for example 0.1, a tenth slower",
        )
    if changes.stages == 1:
        if changes.chunks > 1:
            raise UserError("a pipeline schedule needs stages", fix="add --stages 2 or more")
        return None
    default = "interleaved" if changes.chunks > 1 else "1f1b"
    return Schedule(changes.stages, changes.chunks, changes.schedule or default)


def _changed(question: Question, changes: Changes) -> tuple[Case, Step]:
    """The case and its step at the batch and micro-batches that are asked for."""
    if changes.batch is not None:
        question = question.with_sizes(b=changes.batch)
    wanted = changes.micro_batches
    if wanted is None:
        case = question.case()
        return case, step_of_case(case)
    if "micro_batches" in Plan.__dataclass_fields__:
        planned: dict[str, Any] = {"micro_batches": wanted}
        question = replace(question, plan=replace(question.plan, **planned))
        case = question.case()
        return case, step_of_case(case)
    batch = {symbol.name: size for symbol, size in question.hints.items()}.get("b")
    if wanted > 1:
        if batch is None or batch % wanted:
            size = "a fixed batch" if batch is None else f"a batch of {batch}"
            raise UserError(
                f"{size} does not divide into {wanted} micro-batches",
                fix="choose a number that divides the batch",
            )
        question = question.with_sizes(b=batch // wanted)
    case = question.case()
    return case, replace(step_of_case(case), micro_batches=wanted)


def _how(case: Case, changes: Changes) -> How:
    how = how_for(case.cluster)
    if changes.overlap is not None:
        how = replace(how, overlap=changes.overlap, prefetch=int(changes.overlap))
    if changes.slowdown is not None:
        how = replace(how, slowdown=changes.slowdown)
    if changes.prefetch is not None:
        how = replace(how, prefetch=changes.prefetch)
    return replace(how, reduce_every=changes.reduce_every)


def figures(timeline: Timeline, case: Case, schedule: Schedule | None) -> dict[str, Any]:
    """A timeline as plain data: its summary and what goes beyond it; seconds and bytes."""
    return {
        **summarise(timeline).to_json(),
        "cluster": str(case.cluster),
        "mesh": str(case.plan.mesh),
        "schedule": None if schedule is None else str(schedule),
        "micro_batches": timeline.micro_batches,
        "exposed_by_collective_s": dict(timeline.exposed_s),
        "in_flight_s": dict(timeline.busy_s),
        "recompute_s": timeline.recompute_s,
        "slowdown_s": timeline.slowdown_s,
        "peak_at_s": timeline.peak_at_s,
        "peak_phase": timeline.peak_phase,
        "exact": timeline.exact,
        "additive_s": case.time_s,
        "kernels_s": case.plan.predicted.kernels_s,
        "stages": [
            {
                "compute_s": use.compute_s,
                "exposed_s": use.exposed_s,
                "bubble_s": use.bubble_s,
                "peak_bytes": use.peak_bytes,
                "micro_batches_in_flight": use.in_flight,
            }
            for use in timeline.stages
        ],
    }


def _write(out: Path, found: Mapping[str, Any]) -> None:
    text = json.dumps(found, indent=1) + "\n"
    if str(out) == "-":
        sys.stdout.write(text)
        return
    write_whole(out, text)


# Printing -----------------------------------------------------------------------------------------


def print_timeline(
    timeline: Timeline,
    step: Step,
    plan: Plan,
    schedule: Schedule | None,
    console: Console,
    cluster: str,
) -> None:
    """Print a simulated step: its parts, collectives, longest ops, stages and memory over time."""
    how = f"{timeline.micro_batches} micro-batches" if timeline.micro_batches > 1 else ""
    more = ", ".join(text for text in (str(schedule or ""), how) if text)
    console.print()
    console.print(
        Text.assemble(
            "simulated step of ",
            (str(plan.mesh), "bold green"),
            f" on {cluster}" + (f" ({more})" if more else ""),
        )
    )
    parts = [
        ("compute", timeline.compute_s),
        ("waiting for collectives", timeline.exposed_total_s),
        ("pipeline bubble", timeline.bubble_s),
        ("optimizer", timeline.optimizer_s),
    ]
    shown = [f"{name} {seconds_text(s)}" for name, s in parts if s or name == "compute"]
    change = plan.predicted.kernels_s
    if change:
        shown.append(f"kernels {signed_seconds(change)} (not in the trace)")
    whole = timeline.step_s + change
    console.print(Text.assemble((seconds_text(whole), "bold"), " = " + " + ".join(shown)))
    for text, seconds in (
        ("of compute, recomputation takes", timeline.recompute_s),
        ("of compute, running beside collectives costs", timeline.slowdown_s),
    ):
        if seconds:
            console.print(Text(f"{text} {seconds_text(seconds)}"))
    if not timeline.exact:
        console.print(Text("micro-batches differ: one of the last simulated stands for the rest"))
    for table in (_collectives(timeline), _stages(timeline), _longest(step)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    at = f"peak {bytes_text(timeline.peak_bytes)} at {seconds_text(timeline.peak_at_s)}"
    during = f", in the {timeline.peak_phase}" if timeline.peak_phase else ""
    console.print(Text.assemble(("memory over time", "bold"), f": {at}{during}"))
    for line in memory_chart(timeline.memory):
        console.print(Text(line))
    console.print()


def _collectives(timeline: Timeline) -> Any:
    names = sorted({*timeline.exposed_s, *timeline.busy_s})
    if not names:
        return None
    table = plain_table(
        "collectives", "*collective", "axis", ">in flight", ">waited for", ">hidden"
    )
    rows: list[tuple[str, ...]] = []
    for name in sorted(names, key=lambda n: -timeline.exposed_s.get(n, 0.0)):
        kind, _, axis = name.rpartition(" ")
        busy, exposed = timeline.busy_s.get(name), timeline.exposed_s.get(name, 0.0)
        hidden = "-" if not busy else f"{max(0.0, 1 - exposed / busy):.0%}"
        flight = "-" if busy is None else seconds_text(busy)
        rows.append((kind, axis, flight, seconds_text(exposed), hidden))
    return fitted(table, rows)


def _stages(timeline: Timeline) -> Any:
    if not timeline.stages:
        return None
    columns = (
        ">stage",
        "*modules",
        ">compute",
        ">waiting",
        ">bubble",
        ">micro-batches in flight",
        ">peak",
    )
    rows: list[tuple[str, ...]] = [
        (
            str(i),
            use.what or "-",
            seconds_text(use.compute_s),
            seconds_text(use.exposed_s),
            seconds_text(use.bubble_s),
            f"{use.in_flight:.3g}",
            bytes_text(use.peak_bytes),
        )
        for i, use in enumerate(timeline.stages)
    ]
    return fitted(plain_table("pipeline stages", *columns), rows)


def _longest(step: Step) -> Any:
    """Ops and collectives by the time of all their calls in a step, before any overlap."""
    seconds: dict[tuple[str, str, str], list[float]] = {}
    modules: dict[tuple[str, str, str], list[str]] = {}
    for segment, part in step.parts():
        op = part.name.partition(" over ")[0].rstrip("0123456789").rstrip("_")
        if not part.is_compute:
            kinds = dict.fromkeys(k for k in (part.kind, part.backward_kind) if k)
            what = f" of {pattern(part.param)}" if part.param else ""
            op = f"{' / '.join(kinds)} {part.axis}{what}"
        key = (op, pattern(part.module), "compute" if part.is_compute else part.axis)
        times = segment.copies * (1 if part.once else step.micro_batches)
        total = seconds.setdefault(key, [0.0, 0.0, 0.0])
        total[0] += times
        total[1] += times * part.forward_s
        total[2] += times * (part.backward_s + (part.forward_s if part.regather else 0.0))
        modules.setdefault(key, []).append(part.module)
    ranked = sorted(seconds.items(), key=lambda item: -item[1][1] - item[1][2])[:MOST_OPS]
    if not ranked:
        return None
    table = plain_table(
        "longest ops and collectives", "*op", "module", ">×", ">forward", ">backward"
    )
    rows: list[tuple[str, ...]] = [
        (
            op,
            _short(collapse(modules[op, module, stream])),
            f"{times:.0f}",
            seconds_text(forward),
            seconds_text(backward),
        )
        for (op, module, stream), (times, forward, backward) in ranked
    ]
    return fitted(table, rows)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def memory_chart(points: Points, width: int = WIDTH - 12, height: int = 6) -> list[str]:
    """A staircase of bytes as lines of text: the highest of each column, from the lowest."""
    columns = _per_column(points, width)
    low, high = min(columns), max(columns)
    span = (high - low) or 1.0
    heights = [(level - low) / span * height for level in columns]
    lines = []
    for row in reversed(range(height)):
        text = "".join(_BLOCKS[max(0, min(8, round((h - row) * 8)))] for h in heights)
        label = bytes_text(high) if row == height - 1 else bytes_text(low) if row == 0 else ""
        lines.append(f"{label:>10} {text}".rstrip())
    end = seconds_text(float(points[-1, 0]))
    return [*lines, f"{'':>10} 0{end:>{width - 1}}"]


def _per_column(points: Points, width: int) -> list[float]:
    """The highest level in each of `width` spans of equal length."""
    end = float(points[-1, 0]) or 1.0
    columns = [-math.inf] * width
    level = float(points[0, 1])
    at = 0
    for column in range(width):
        until = end * (column + 1) / width
        highest = level
        while at < len(points) and points[at, 0] <= until:
            level = float(points[at, 1])
            highest = max(highest, level)
            at += 1
        columns[column] = highest
    return columns
