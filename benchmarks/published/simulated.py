"""The step of a run on the planner's timeline: its stages, its schedule, what overlaps."""

from __future__ import annotations

import math
from dataclasses import replace

from autopar.cost.pipeline import simulate_stages
from autopar.cost.schedules import Schedule
from autopar.cost.simulate import simulate
from autopar.cost.simulator import How
from autopar.cost.step import Part, Segment, Step
from autopar.cost.timeline import Timeline

from .assemble import Layered, repeated_parts
from .plan_of import RunPlan

# A synchronous step waits for its slowest device: its time grows by this share per doubling of the
# hosts (weak scaling of NeMo's and MosaicML's runs).
STRAGGLING = 0.004


def timeline_of(plan: RunPlan, made: Layered, policy: str) -> Timeline:
    """Simulate one step; without pipeline stages on one device, else on the stages' schedule."""
    pieces = pieces_of(plan, made, policy)
    how = How(
        overlap=plan.software.overlaps_data,
        reduce_every=bool(plan.sharded) and not plan.gathers_once,
        split_backward=False,
        record=False,
    )
    if len(pieces) == 1:
        return simulate(pieces[0], plan.cluster, how=how)
    stages = len(plan.stages)
    chunks = len(pieces) // stages
    schedule = Schedule(stages, chunks, "interleaved" if chunks > 1 else "1f1b")
    level = 0 if plan.cluster.size < plan.whole.host_size else -1
    return simulate_stages(
        pieces,
        schedule,
        plan.whole,
        how=how,
        level=level,
        overlap_sends=plan.software.overlaps_p2p and chunks > 1,
        boundary_bytes=[boundary_bytes(plan)] * (len(pieces) - 1),
    )


def step_time_s(plan: RunPlan, timeline: Timeline) -> float:
    """Seconds of the step on all devices."""
    hosts = max(1.0, plan.row.gpus / plan.whole.host_size)
    return timeline.step_s * (1 + STRAGGLING * math.log2(hosts))


def boundary_bytes(plan: RunPlan) -> float:
    """Bytes that one device sends to the next stage per micro-batch."""
    nbytes = 2.0 * plan.micro_batch * plan.row.seq / plan.row.cp * plan.shape.hidden
    split = plan.sequence_parallel or plan.software.scatters_p2p
    return nbytes / plan.row.tp if split else nbytes


def pieces_of(plan: RunPlan, made: Layered, policy: str) -> list[Step]:
    """Number `c * stages + s` is chunk c of stage s; one piece where there is no pipeline."""
    stages = len(plan.stages)
    chunks = plan.row.vpp if stages > 1 and min(plan.stages) >= plan.row.vpp else 1
    if chunks > 1 and plan.micro_batches % stages:
        chunks = 1
    layer = as_run(plan, made.layer, policy)
    first, last = as_run(plan, made.first, "none"), as_run(plan, made.last, "none")
    pieces = []
    for chunk in range(chunks):
        for stage, layers in enumerate(plan.stages):
            copies = layers // chunks + (chunk < layers % chunks)
            optimizer = made.layer_optimizer_s * copies
            segments = [replace(layer, copies=copies, block="layer")]
            if stage == chunk == 0:
                segments.insert(0, first)
                optimizer += made.first_optimizer_s
            if stage == stages - 1 and chunk == chunks - 1:
                segments.append(last)
                optimizer += made.last_optimizer_s
            pieces.append(Step(tuple(segments), optimizer, {}, plan.micro_batches))
    return pieces


def as_run(plan: RunPlan, segment: Segment, policy: str) -> Segment:
    """A segment's parts as the run's software does them.

    What is recomputed is part of the backward; collectives that run pipelined with the products
    beside them take no time of their own; gradients are reduced in the run's format.
    """
    again = repeated_parts(plan, segment, policy)
    return replace(
        segment, parts=tuple(_as_run(plan, p, again.get(p.name, 0.0)) for p in segment.parts)
    )


def _as_run(plan: RunPlan, part: Part, again: float) -> Part:
    if part.is_compute:
        return replace(part, backward_s=part.backward_s + again * part.forward_s)
    if part.param and part.axis != "tp":
        backward = part.backward_s * plan.software.reduce_bytes / 2
        if part.axis == "dpr" and plan.sharded:  # a shard is reduced among the replicas
            backward /= plan.sizes["dp"]
        if not plan.sharded or plan.gathers_once:
            return replace(part, backward_s=backward, once=True, regather=False)
        return replace(part, backward_s=backward, once=False)
    if plan.software.overlaps_tensor and part.axis in ("tp", "cp"):
        return replace(part, forward_s=0.0, backward_s=0.0)
    hidden = plan.software.overlaps_tensor_backward and part.axis == "tp"
    backward = (0.0 if hidden else part.backward_s) + again * part.forward_s
    return replace(part, backward_s=backward, backward_kind=part.backward_kind or part.kind)
