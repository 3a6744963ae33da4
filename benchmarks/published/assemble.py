"""From the priced layer of a stage to the step time and the memory of a whole run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from autopar.cost.cluster import Cluster
from autopar.cost.comm import level_time
from autopar.cost.families import op_family
from autopar.cost.step import Part, Segment

from .force import USABLE_MEMORY
from .plan_of import RunPlan
from .pricing import FUSABLE

# What the search leaves to the allocator, and what a process holds beside tensors: the driver's
# context, NCCL's and cuBLAS' buffers (chosen on the fitted half of the runs).
RUNTIME_BYTES = 4.0 * 2**30
# A synchronous step waits for its slowest device: its time grows by this share per doubling of the
# hosts (weak scaling of the fitted half of the runs).
STRAGGLING = 0.004


@dataclass(frozen=True)
class Costs:
    """Seconds of one copy of a segment for one micro-batch.

    Compute forward, backward and repeated, with the activation collectives that nothing hides;
    `beside_s`, those that run beside the products next to them, forward and backward; gathers and
    reductions of parameters that happen per micro-batch; `once_s`, gradients reduced per step.
    """

    slowdown: float

    forward_s: float
    backward_s: float
    again_s: float
    gather_s: float
    regather_s: float
    reduce_s: float
    once_s: float
    beside_s: tuple[float, float] = (0.0, 0.0)

    @property
    def whole_forward_s(self) -> float:
        return self._beside(self.forward_s, self.gather_s, self.beside_s[0])

    @property
    def whole_backward_s(self) -> float:
        parameters = self.regather_s + self.reduce_s
        return self._beside(self.backward_s + self.again_s, parameters, self.beside_s[1])

    def _beside(self, compute_s: float, parameters_s: float, tensor_s: float) -> float:
        """Compute with traffic on other streams: the longest of the three.

        Collectives of parameters slow compute down; those that are pipelined with products use the
        copy engines.
        """
        slowed = compute_s + self.slowdown * min(parameters_s, compute_s)
        return max(slowed, parameters_s, tensor_s)


def costs_of(plan: RunPlan, segment: Segment, policy: str) -> Costs:
    """Costs of one copy of a segment under a recomputation policy."""
    overlap = plan.software.overlaps_tensor
    forward = backward = again = gather = regather = reduce = once = 0.0
    hidden = [0.0, 0.0]
    repeated = _repeated(plan, segment, policy)
    reduce_factor = plan.software.reduce_bytes / 2
    for part in segment.parts:
        if part.is_compute:
            forward += part.forward_s
            backward += part.backward_s
            again += part.forward_s * repeated.get(part.name, 0.0)
        elif part.param and part.axis != "tp":
            back = part.backward_s * reduce_factor
            if part.axis == "dpr" and plan.sharded:  # a shard is reduced among the replicas
                back /= plan.sizes["dp"]
            if not plan.sharded or plan.gathers_once:
                once += back + part.forward_s
            else:
                gather += part.forward_s
                regather += part.forward_s if part.regather else 0.0
                reduce += back
        elif overlap and part.axis in ("tp", "cp"):
            hidden[0] += part.forward_s
            hidden[1] += part.backward_s + part.forward_s * repeated.get(part.name, 0.0)
        else:
            forward += part.forward_s
            backward += part.backward_s
            again += part.forward_s * repeated.get(part.name, 0.0)
    return Costs(
        plan.cluster.device.overlap_slowdown,
        forward,
        backward,
        again,
        gather,
        regather,
        reduce,
        once,
        (hidden[0], hidden[1]),
    )


def _repeated(plan: RunPlan, segment: Segment, policy: str) -> dict[str, float]:
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
class Prediction:
    """Seconds per step and bytes at the peak, with what they are made of (seconds per step)."""

    time_s: float
    memory_bytes: float
    parts: dict[str, float]


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


def time_of(plan: RunPlan, made: Layered, policy: str) -> tuple[float, dict[str, float]]:
    """Seconds of one step, and what they are spent on."""
    layer = costs_of(plan, made.layer, policy)
    first, last = costs_of(plan, made.first, "none"), costs_of(plan, made.last, "none")
    stages = len(plan.stages)
    wire = p2p_s(plan)
    forward, backward, once, optimizer = [], [], [], []
    for i, layers in enumerate(plan.stages):
        members = [(layer, layers)]
        o = made.layer_optimizer_s * layers
        if i == 0:
            members.append((first, 1))
            o += made.first_optimizer_s
        if i == stages - 1:
            members.append((last, 1))
            o += made.last_optimizer_s
        forward.append(sum(c.whole_forward_s * n for c, n in members))
        backward.append(sum(c.whole_backward_s * n for c, n in members))
        once.append(sum(c.once_s * n for c, n in members))
        optimizer.append(o)
    vpp, m = plan.row.vpp, plan.micro_batches
    sends = 0.0
    if stages > 1:
        hidden = plan.software.overlaps_p2p and vpp > 1
        sends = 0.0 if hidden else 2 * wire * vpp
    busy = [f + b + sends for f, b in zip(forward, backward, strict=True)]
    slowest = max(busy)
    steady = m * slowest
    bubble = (sum(busy) - slowest) / vpp
    reduce = max(once)
    if plan.software.overlaps_data:
        hideable = backward[0] if stages == 1 else backward[0] / max(vpp, 1)
        reduce = max(reduce - hideable, 0.05 * reduce) if reduce else 0.0
    update = max(optimizer)
    hosts = max(1.0, plan.row.gpus / plan.whole.host_size)
    total = (steady + bubble + reduce + update) * (1 + STRAGGLING * math.log2(hosts))
    parts = {
        "compute": m * (layer.forward_s + layer.backward_s) * max(plan.stages),
        "recompute": m * layer.again_s * max(plan.stages),
        "ends": m * (sum(x.whole_forward_s + x.whole_backward_s for x in (first, last))),
        "p2p": m * sends,
        "bubble": bubble,
        "reduce": reduce,
        "optimizer": update,
        "layer_gather_ms": 1e3 * (layer.gather_s + layer.regather_s + layer.reduce_s),
    }
    return total, parts


def p2p_s(plan: RunPlan) -> float:
    """Seconds to send one micro-batch's activations to the next stage."""
    if len(plan.stages) < 2:
        return 0.0
    row, shape = plan.row, plan.shape
    nbytes = 2.0 * plan.micro_batch * row.seq / row.cp * shape.hidden
    if plan.sequence_parallel or plan.software.scatters_p2p:
        nbytes /= row.tp
    cluster: Cluster = plan.whole
    level = cluster.levels[0] if plan.cluster.size < cluster.host_size else cluster.levels[-1]
    latency, transfer = level_time(level, "broadcast", nbytes, 2)
    return float(latency + transfer)


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
        again = _repeated(plan, made.layer, policy)
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


def predict(plan: RunPlan, made: Layered) -> Prediction:
    """Time and memory of a run."""
    policy = policy_of(plan, made)
    time_s, parts = time_of(plan, made, policy)
    return Prediction(time_s, memory_of(plan, made, policy), parts)
