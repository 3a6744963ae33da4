"""Simulate a plan at one setting: its priced step with the plan's recomputation, over time."""

from __future__ import annotations

from autopar.cost.recompute import with_recompute
from autopar.cost.schedules import Schedule
from autopar.cost.simulate import simulate
from autopar.cost.simulator import How
from autopar.cost.step import Step
from autopar.cost.timeline import Timeline

from .case import Case
from .given import with_given
from .staged_case import simulate_case
from .step_of import step_of


def step_of_case(case: Case) -> Step:
    """The priced step of a plan, with the copies of its blocks that are recomputed.

    Of a pipeline that of all stages together: one device would run it.
    """
    accounts = case.accounts
    step = step_of(case.concrete, case.blocks, case.option, accounts.pricer, accounts.micro_batches)
    step = with_given(step, case.given_bytes)
    return with_recompute(step, {r.block: (r.full, r.selective) for r in case.plan.recompute})


def timeline_of(
    case: Case, *, schedule: Schedule | None = None, how: How | None = None
) -> Timeline:
    """The simulated step of a plan on its cluster; a pipeline's on its own schedule by default."""
    if schedule is None and case.plan.pipeline is not None:
        return simulate_case(case, how).timeline
    return simulate(step_of_case(case), case.cluster, schedule=schedule, how=how)
