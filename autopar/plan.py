"""A plan: where every tensor lives and what every op splits, with its predicted cost.

Plans are JSON files: versioned, bound to a captured graph by its fingerprint, checked on load.
"""

from __future__ import annotations

from .plan_reading import load_plan, plan_from_json
from .plan_types import (
    MICRO_BATCH_AXIS,
    PIPELINE_AXIS,
    VERSION,
    Activation,
    Alternative,
    HintPrice,
    ModelPart,
    Pipeline,
    Plan,
    Prediction,
    Recompute,
    Storage,
    Traffic,
)

__all__ = [
    "MICRO_BATCH_AXIS",
    "PIPELINE_AXIS",
    "VERSION",
    "Activation",
    "Alternative",
    "HintPrice",
    "ModelPart",
    "Pipeline",
    "Plan",
    "Prediction",
    "Recompute",
    "Storage",
    "Traffic",
    "load_plan",
    "plan_from_json",
]
