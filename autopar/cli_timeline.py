"""`autopar timeline` and `autopar simulate`: a plan's step over time, here or elsewhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from .cli_report import write_whole
from .cost.schedules import Schedule
from .cost.simulate import how_for, simulate
from .cost.simulator import How
from .cost.step import Step
from .cost.timeline import Timeline, summarise
from .cost.trace import write_trace
from .errors import UserError
from .passes.case import Case
from .passes.staged_case import simulate_case
from .passes.timeline_of import step_of_case
from .plan import Plan
from .questions import Question, ask
from .report import make_console
from .timeline_tables import print_timeline


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
    question = replace(question, plan=replace(question.plan, micro_batches=wanted))
    case = question.case()
    return case, step_of_case(case)


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
