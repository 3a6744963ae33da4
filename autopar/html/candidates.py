"""What else was considered: a chart of time against memory, and the table of all."""

from __future__ import annotations

import math

from autopar.plan import Alternative, Plan
from autopar.units import bytes_text, seconds_text

from .charts import Point, drawable, scatter
from .markup import Child, Markup, element, join, table
from .shapes import coloured


def candidates_section(plan: Plan) -> Markup:
    """The chosen plan among its alternatives."""
    p = plan.predicted
    points = [
        Point(f"{plan.strategy} {plan.mesh}", p.time_s, float(p.memory_bytes), chosen=True),
        *(
            Point(f"{a.name} {a.mesh}", a.time_s, float(a.memory_bytes), why=a.why)
            for a in plan.alternatives
            if a.time_s is not None and a.memory_bytes is not None
        ),
    ]
    limit = memory_limit(plan)
    has_chart = any(drawable(point) for point in points)
    ranked = sorted(plan.alternatives, key=lambda a: math.inf if a.time_s is None else a.time_s)
    chosen = (
        element("strong", plan.strategy),
        coloured(str(plan.mesh), plan.mesh.names),
        seconds_text(p.time_s),
        bytes_text(p.memory_bytes),
        element("strong", "chosen"),
    )
    return join(
        [
            scatter(points, limit) if has_chart else Markup(),
            element("p", class_="tip", aria_live="polite"),
            _without_limit(limit),
            table(
                "Candidates: the chosen one, then the fastest first",
                ("strategy", "mesh", ">step", ">memory", "why not"),
                [chosen, *(_row(a) for a in ranked)],
            ),
        ]
    )


def memory_limit(plan: Plan) -> float | None:
    """Bytes that a device may use, if the plan says so."""
    limit = getattr(plan, "memory_limit", None)
    return float(limit) if isinstance(limit, (int, float)) and limit > 0 else None


def _without_limit(limit: float | None) -> Markup:
    if limit is not None:
        return Markup()
    return element("p", "This plan carries no memory limit.", class_="absent")


def _row(a: Alternative) -> list[Child]:
    return [
        a.name,
        a.mesh,
        "-" if a.time_s is None else seconds_text(a.time_s),
        "-" if a.memory_bytes is None else bytes_text(a.memory_bytes),
        a.why,
    ]
