"""What must hold between the parts of a plan beyond the type of each."""

from __future__ import annotations

from collections.abc import Iterable

from .cost.schedules import Schedule
from .errors import UserError
from .ir.parse import parse_sharding
from .ir.sharding import Sharding
from .kernel_use import KERNELS, ON_AXES
from .plan_types import MICRO_BATCH_AXIS, PIPELINE_AXIS, Plan
from .records import MalformedError, joined, shown


def check_plan(plan: Plan) -> None:
    """Raise MalformedError, with the path, where parts of a plan do not go together."""
    _check_mesh(plan)
    _check_pipeline(plan)
    _positive(plan.micro_batches, "micro_batches")
    for i, again in enumerate(plan.recompute):
        if min(again.full, again.selective) < 0 or again.full + again.selective > again.copies:
            raise MalformedError(
                f"recompute[{i}] recomputes {again.full} + {again.selective} of {again.copies} "
                "copies",
                "lower full or selective",
            )
    for name in plan.params:
        _check_storage(name, plan)
    for node, chosen in plan.choices.items():
        path = joined("choices", node)
        if PIPELINE_AXIS in chosen and plan.pipeline is not None:
            raise MalformedError(
                f"{joined(path, PIPELINE_AXIS)}: {node} splits something on {PIPELINE_AXIS}, which "
                "stages are on",
                "take it out",
            )
        for axis in chosen:
            _check_axes(joined(path, axis), [axis], plan)
    _check_kernels(plan)


def _check_mesh(plan: Plan) -> None:
    names = plan.mesh.names
    for i, axis in enumerate(plan.mesh.axes):
        _positive(axis.size, f"mesh.axes[{i}].size (the mesh axis {axis.name})")
        if axis.level < 0:
            raise MalformedError(f"mesh.axes[{i}].level is {axis.level}, which is negative")
        if axis.name == MICRO_BATCH_AXIS:
            raise MalformedError(
                f"mesh.axes[{i}].name: a mesh axis is called {MICRO_BATCH_AXIS}, as micro-batches "
                "are",
                "give it another name",
            )
        if axis.name in names[:i]:
            raise MalformedError(
                f"mesh.axes[{i}].name: two mesh axes have one name: {axis.name}",
                "give one of them another name",
            )


def _check_storage(name: str, plan: Plan) -> None:
    stored, path = plan.params[name], joined("params", name)
    try:
        sharding = parse_sharding(stored.sharding)
    except ValueError as error:
        raise MalformedError(
            f"{path}.sharding is {shown(stored.sharding)}: {error}",
            "write one entry per dim, as in [dp, -]",
        ) from None
    for where, axes in _axes_of(sharding):
        _check_axes(f"{path}.sharding{where}", axes, plan)
        if PIPELINE_AXIS in axes:
            raise MalformedError(
                f"{path}.sharding{where}: {name} is split on {PIPELINE_AXIS}",
                "use `stages` instead",
            )
    stages = stored.stages
    if len(set(stages)) < len(stages) or min(stages, default=0) < 0:
        raise MalformedError(f"{path}.stages is {list(stages)}, not different stage numbers")
    if plan.pipeline is None and stages:
        raise MalformedError(
            f"{path}.stages is {list(stages)}, and there is no pipeline", "take the stages out"
        )
    if plan.pipeline is not None and not stages:
        raise MalformedError(f"{path}.stages: {name} is on no stage", "name the stages that use it")
    if max(stages, default=-1) >= plan.stages:
        raise MalformedError(
            f"{path}.stages: {name} is on stage {max(stages)} of {plan.stages} stages, from 0"
        )


def _axes_of(sharding: Sharding) -> Iterable[tuple[str, list[str]]]:
    """The axes that a sharding names, with the place in its text: `[1]` is dim 1."""
    for dim, split in enumerate(sharding.splits):
        yield f"[{dim}]", list(split.axes)
    yield "", [*(axis for axis, _ in sharding.partial), *sharding.varying]


def _check_kernels(plan: Plan) -> None:
    for i, use in enumerate(plan.kernels):
        if use.kernel not in KERNELS:
            raise MalformedError(
                f"kernels[{i}].kernel: unknown kernel {shown(use.kernel)}",
                f"there are {', '.join(KERNELS)}",
            )
        _positive(use.count, f"kernels[{i}].count")
        if use.kernel in ON_AXES:
            for k, axis in enumerate(use.where):
                _check_axes(f"kernels[{i}].where[{k}]", [axis], plan)


def _check_pipeline(plan: Plan) -> None:
    pipeline, names = plan.pipeline, plan.mesh.names
    if pipeline is None:
        if PIPELINE_AXIS in names:
            raise MalformedError(
                f"mesh.axes: the mesh has the axis {PIPELINE_AXIS}, and there is no pipeline",
                "call it otherwise, or write the pipeline",
            )
        return
    if names[:1] != (PIPELINE_AXIS,):
        raise MalformedError(
            f"mesh.axes: the first mesh axis of a pipeline is {PIPELINE_AXIS}: it has {plan.mesh}"
        )
    try:
        schedule = Schedule(plan.stages, pipeline.chunks, pipeline.schedule)
    except UserError as error:
        raise MalformedError(f"pipeline.schedule: {error.what}", error.fix) from None
    pieces = schedule.stages * schedule.chunks
    if pipeline.pieces != pieces:
        raise MalformedError(
            f"pipeline.cuts: {len(pipeline.cuts)} cuts make {pipeline.pieces} pieces, and "
            f"{schedule} have {pieces}",
            f"name {pieces - 1} cuts",
        )
    for i, cut in enumerate(pipeline.cuts):
        if not cut:
            raise MalformedError(f"pipeline.cuts[{i}] is empty", "name an op of the model")
        if cut in pipeline.cuts[:i]:
            raise MalformedError(f"pipeline.cuts[{i}]: two cuts are at the same node")


def _check_axes(path: str, used: Iterable[str], plan: Plan) -> None:
    for axis in used:
        if axis not in plan.mesh.names:
            has = ", ".join(plan.mesh.names) or "none"
            raise MalformedError(
                f"{path} names the axis {axis!r}, which the mesh lacks: it has {has}",
                "name an axis of the mesh",
            )


def _positive(value: int, path: str) -> None:
    if value < 1:
        raise MalformedError(f"{path} is {value}, not a positive number")
