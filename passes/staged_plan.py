"""What a pipeline adds to a plan: its cuts, stages of parameters, traffic, prediction, gap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch.fx

from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.plan import PIPELINE_AXIS, Pipeline, Prediction, Storage, Traffic

from .families import Factors
from .pipeline_plan import stages_of
from .pipelined import inner_mesh
from .programme import Assignment
from .settle import Settled
from .staged import Staged

Node = torch.fx.Node

SEND = "send"


def axis_names(best: Settled, batch: Factors) -> dict[str, str]:
    """What the plan calls every axis: the only one beside stages `dp` if it splits the batch."""
    mesh = inner_mesh(best.mesh) if isinstance(best, Staged) else best.mesh
    found = {name: name for name in mesh.names}
    if best.name == "auto":  # the axes of others have the names of their families
        found = _inner_names(mesh, best.assignment, batch)
    return found | {name: name for name in best.mesh.names if name == PIPELINE_AXIS}


def _inner_names(mesh: Mesh, assignment: Assignment, batch: Factors) -> dict[str, str]:
    """Call the only axis `dp` if it splits the batch, else `tp`; one with a role keeps its name."""
    names = mesh.names
    if len(names) != 1 or names[0] not in ("dp", "tp"):
        return {name: name for name in names}
    on_batch = any(
        choice.factor in batch.get(node, ())
        for node, option in assignment.option.items()
        for _, choice in option.choices
        if choice.factor
    )
    return {names[0]: "dp" if on_batch else "tp"}


def on_stages(params: Mapping[str, Storage], graph: Graph, best: Settled) -> dict[str, Storage]:
    """The storage of parameters with the stages that use them; `graph` is the captured one."""
    if not isinstance(best, Staged):
        return dict(params)
    stages = best.mesh[PIPELINE_AXIS].size
    used = stages_of(graph, best.pipeline.cuts, stages)
    return {name: replace(s, stages=used.get(name, (0,))) for name, s in params.items()}


def sent_bytes_of(best: Settled) -> float | None:
    """What a device sends to other stages per step, at most; None without a pipeline."""
    return best.sent_bytes if isinstance(best, Staged) else None


def with_sends(prediction: Prediction, sent_bytes: float | None) -> Prediction:
    """The prediction with what a device sends to other stages; None without a pipeline."""
    if sent_bytes is None:
        return prediction
    sent = {**prediction.comm_bytes, SEND: int(sent_bytes)}
    return replace(prediction, comm_bytes=sent)


def per_stage(
    traffic: Iterable[Traffic], stages: int, messages: int, sent_bytes: float | None
) -> tuple[Traffic, ...]:
    """Traffic of the whole model as that of one stage on average, and what stages send.

    `messages` of them per step; None bytes without a pipeline.
    """
    if sent_bytes is None:
        return tuple(traffic)
    made = [
        replace(t, count=-(-t.count // stages), sent_bytes=t.sent_bytes // stages) for t in traffic
    ]
    between = Traffic(SEND, PIPELINE_AXIS, "activations and gradients", messages, int(sent_bytes))
    return (*made, between)


def messages_of(pipeline: Pipeline | None, micro_batches: int) -> int:
    """Messages that a stage in the middle sends per step: outputs and gradients."""
    return 0 if pipeline is None else 2 * micro_batches * pipeline.chunks


def gap_with(gap: float, best: Settled, least_s: Sequence[float]) -> float:
    """The gap where pipelines were looked at: to the least bound of any plan.

    `least_s` are bounds of plans that were not settled.
    """
    step_s = best.timeline.step_s
    bounds = list(least_s)
    if isinstance(best, Staged) and best.bound_s:
        bounds.append(best.bound_s)
    least = min(bounds, default=step_s)
    return min(1.0, max(gap, 1 - least / step_s if step_s > 0 else 0.0))


def schedule_text(one: Settled) -> str:
    """`, zero_bubble` of a pipeline; nothing of other plans."""
    return f", {one.pipeline.schedule}" if isinstance(one, Staged) else ""
