"""The priced parts of a run's model, what of them is recomputed, and the memory they take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from autopar.cost.families import op_family
from autopar.cost.step import Part, Segment

from .force import USABLE_MEMORY
from .plan_of import RunPlan
from .pricing import FUSABLE

# What the search leaves to the allocator, and what a process holds beside tensors: the driver's
# context, NCCL's and cuBLAS' buffers (chosen on the runs: docs/accuracy.md).
RUNTIME_BYTES = 4.0 * 2**30


def repeated_parts(plan: RunPlan, segment: Segment, policy: str) -> dict[str, float]:
    """How much of each part's forward is repeated in the backward."""
    if policy not in ("full", "layer", "selective"):
        return {}
    parts = segment.parts
    if plan.software.stops_early:  # nothing needs what the last product makes
        last = max(i for i, part in enumerate(parts) if part.name.startswith("linear"))
        parts = parts[:last]
    if policy != "selective":
        share = 1.0 if policy == "full" else 0.5
        return {part.name: share for part in parts}
    if plan.software.selective == "attention":
        return {p.name: 1.0 for p in parts if _is_core(p)}
    if plan.software.selective == "half":
        found = {p.name: 1.0 for p in parts if p.recomputable}
        found.update({p.name: 0.5 for p in parts if p.name.startswith("linear")})
        return found
    core = min(i for i, part in enumerate(parts) if _family(part) == "attention")
    kept = {p.name for p in parts[:core] if p.name.startswith("linear")}
    return {p.name: 1.0 for p in parts if p.name not in kept}


def _is_core(part: Part) -> bool:
    """Whether a part is of plain attention between its projections."""
    return part.name.startswith(("matmul", "softmax")) or (
        part.name.startswith("dropout") and "attention" in part.name
    )


@dataclass(frozen=True)
class Layered:
    """A step's segments by what they are, and the stored bytes of each."""

    first: Segment
    layer: Segment
    last: Segment
    first_bytes: float
    layer_bytes: float
    last_bytes: float
    first_optimizer_s: float
    layer_optimizer_s: float
    last_optimizer_s: float


# Memory -------------------------------------------------------------------------------------------


def memory_of(plan: RunPlan, made: Layered, policy: str) -> float:
    """Bytes that the process holds at the peak: tensors with fragmentation, and what is beside."""
    tensors = tensors_of(plan, made, policy)
    return tensors / USABLE_MEMORY + RUNTIME_BYTES + plan.software.buffer_bytes


def tensors_of(plan: RunPlan, made: Layered, policy: str) -> float:
    """Bytes at the peak on the fullest stage: states, activations in flight, working space."""
    row = plan.row
    tokens = plan.micro_batch * row.seq / row.cp
    entering = 2.0 * tokens * plan.shape.hidden / (row.tp if plan.sequence_parallel else 1)
    whole = _saved(plan, made.layer.parts)
    if policy == "full":
        kept, working = entering, whole
    elif policy == "layer":
        kept, working = (entering + whole) / 2, whole
    elif policy == "selective":
        again = repeated_parts(plan, made.layer, policy)
        kept = max(entering, _saved(plan, made.layer.parts, again))
        working = whole - kept
    else:
        kept, working = whole, 0.0
    gathered = 2 * _gathered(plan, made.layer)
    stages, m = len(plan.stages), plan.micro_batches
    peak = 0.0
    for i, layers in enumerate(plan.stages):
        flying: float = min(m, stages - i)
        if row.vpp > 1:
            flying = min(m, stages - i + (stages - 1) / row.vpp)
        total = made.layer_bytes * layers + flying * layers * kept + working
        if (
            plan.gathers_once
        ):  # parameters and gradients of the stage stay whole for all micro-batches
            total += gathered * layers
        else:
            total += gathered
        if i == 0:
            total += made.first_bytes
        if i == stages - 1:
            logits = 2 * max((p.saved_bytes for p in made.last.parts), default=0.0)
            total += made.last_bytes + _saved(plan, made.last.parts) + logits
        peak = max(peak, total)
    return peak


def _saved(plan: RunPlan, parts: tuple[Part, ...], without: Mapping[str, float] = {}) -> float:
    """Bytes that a copy of a segment keeps for its backward.

    An input that was gathered along the sequence is kept as its shard, and gathered again
    (Korthikanti et al., arXiv:2205.05198, section 4.2.2); what a fused kernel makes for itself is
    made again in its backward. `without` has the share of parts that is not kept.
    """
    total = 0.0
    for part in parts:
        named = sum(nbytes for _, nbytes in part.saved_from)
        kept = part.saved_bytes - named
        for source, nbytes in part.saved_from:
            made = parts[source] if source >= 0 else None
            if made is not None and made.kind == "all_gather" and not made.param:
                nbytes /= plan.sizes[made.axis]
            if made is not None and plan.software.fuses and _fusable(part) and _fusable(made):
                continue
            kept += nbytes
        total += kept * (1.0 - without.get(part.name, 0.0))
    return total


def _family(part: Part) -> str:
    return op_family(re.sub(r"_\d+$", "", part.name))


def _fusable(part: Part) -> bool:
    return part.is_compute and _family(part) in FUSABLE


def _gathered(plan: RunPlan, segment: Segment) -> float:
    """Bytes of one layer's parameters while they are gathered."""
    if not plan.sharded:
        return 0.0
    outputs: dict[str, float] = {}
    for part in segment.parts:
        if part.param and part.kind == "all_gather":
            outputs[part.param] = max(outputs.get(part.param, 0.0), part.output_bytes)
    return sum(outputs.values())


def policy_of(plan: RunPlan, made: Layered) -> str:
    """The row's recomputation; where it does not say, the least whose tensors fit: the run ran."""
    if plan.row.recompute:
        return plan.row.recompute
    if plan.software.unsaid:
        return plan.software.unsaid
    for policy in ("none", "selective"):
        if tensors_of(plan, made, policy) <= plan.memory_bytes:
            return policy
    return "full"
