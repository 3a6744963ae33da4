"""The tables of a simulated step: what it takes, who waits, the longest ops, memory over time."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.text import Text

from .cost.schedules import Schedule
from .cost.step import Step
from .cost.timeline import Points, Timeline
from .passes.describe import collapse, pattern
from .plan import Plan
from .report import WIDTH, fitted, plain_table
from .units import bytes_text, seconds_text, signed_seconds

MOST_OPS = 12
_BLOCKS = " ▁▂▃▄▅▆▇█"


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
