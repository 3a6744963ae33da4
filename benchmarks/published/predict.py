"""Step time and memory of a published run."""

from __future__ import annotations

from dataclasses import dataclass

from .assemble import Layered, memory_of, policy_of
from .plan_of import RunPlan
from .simulated import step_time_s, timeline_of


@dataclass(frozen=True)
class Prediction:
    """Seconds per step and bytes at the peak; `parts` are seconds per step by cause."""

    time_s: float
    memory_bytes: float
    recompute: str
    parts: dict[str, float]


def predict(plan: RunPlan, made: Layered) -> Prediction:
    """Time and memory of a run, given the priced parts of its model.

    Raises UserError where the plan's schedule is not possible.
    """
    policy = policy_of(plan, made)
    timeline = timeline_of(plan, made, policy)
    parts = {
        "compute": timeline.compute_s,
        "optimizer": timeline.optimizer_s,
        "bubble": timeline.bubble_s,
    }
    for name, seconds in timeline.exposed_by_axis().items():
        parts[f"exposed {name}"] = seconds
    return Prediction(step_time_s(plan, timeline), memory_of(plan, made, policy), policy, parts)
