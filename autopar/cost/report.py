"""Plans and timings as tables for people."""

from __future__ import annotations

from autopar.plan import Plan


def print_plan(plan: Plan) -> None:
    print(plan.mesh, plan.predicted)


def print_timing(plan: Plan | None, measured_s: float | None) -> None:
    print(plan.predicted.time_s if plan else None, measured_s)
