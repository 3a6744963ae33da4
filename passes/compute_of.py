"""What a plan's step computes on one device, by phase and by family: communication left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from autopar.cost.families import op_family, op_name
from autopar.cost.recompute import recomputed_parts

from .case import Case
from .timeline_of import step_of_case


@dataclass(frozen=True)
class ComputeTimes:
    """Seconds of a step on one device; `families` are those of ops (`cost.families`).

    What is recomputed counts with the backward.
    """

    forward_s: float
    backward_s: float
    optimizer_s: float
    families: Mapping[str, float]

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.optimizer_s


def compute_of(case: Case) -> ComputeTimes:
    """Predicted compute of a plan's step on the device with the largest shards."""
    step = step_of_case(case)
    family = {n.name: op_family(op_name(n.target)) for n in case.concrete.calls()}
    families: dict[str, float] = defaultdict(float)
    forward = backward = 0.0
    for segment in step.segments:
        times = segment.copies * step.micro_batches
        again = recomputed_parts(segment)
        for i, part in enumerate(segment.parts):
            if not part.is_compute:
                continue
            second = part.backward_s + (part.forward_s if i in again else 0.0)
            forward += times * part.forward_s
            backward += times * second
            families[family[part.name]] += times * (part.forward_s + second)
    return ComputeTimes(forward, backward, step.optimizer_s, dict(families))
