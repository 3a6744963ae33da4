"""Load what one rank runs of a plan with a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .errors import UserError
from .ir.graph import Graph, Value
from .ir.lowered import GroupRef
from .ir.recomputed import mark_of
from .ir.step import StepGraphs
from .kernel_use import NOWHERE, Places
from .passes.follow_micro_batches import Followed
from .passes.lower_pieces import LoweredPieces, lower_pieces
from .passes.pieces import Boundary
from .passes.pipeline import Stage
from .passes.pipeline_plan import matching_cuts
from .passes.rank_program import storage_of
from .plan import PIPELINE_AXIS, Plan
from .runtime import agree, world
from .runtime.group import Group
from .runtime.pipeline_engine import PipelineEngine, schedule_for
from .runtime.pipelined_step import PipelinedStep, Results
from .runtime.stage_placement import piece_shape, stage_of
from .runtime.step import PartProgram, load_part
from .runtime.step_parts import Crossing
from .runtime.tied_parameters import Tied, TiedParameters

BUG = "this is a bug in autopar: please report it with the model"


def load_pipelined_step(
    graph: Graph,
    followed: Followed,
    plan: Plan,
    micro_batches: int,
    parameters: Mapping[str, Tensor],
    live: DeviceMesh,
    groups: dict[tuple[str, ...], Group],
    device: torch.device,
    backend: str | None = None,
    kernels: Places = NOWHERE,
) -> tuple[PipelinedStep, list[Stage]]:
    """The step of this rank: its pieces' programs, the engine of the schedule, tied parameters.

    And what every pass left of its pieces.

    `graph` is the prepared captured graph, `followed` the same in micro-batches, `parameters` are
    the module's by all their names. Collective; raises UserError where the plan's cuts do not fit
    the graph, or ranks of a stage would run different collectives.
    """
    assert plan.pipeline is not None
    storage, regather = storage_of(graph, plan)
    rank = dist.get_rank()
    lowered = _on_all_or_none(
        lambda: lower_pieces(
            followed,
            _cuts(graph, followed, plan),
            plan.stages,
            plan.stage_mesh,
            rank,
            storage,
            regather,
            ahead=device.type != "cpu",
            kernels=kernels,
            boundary=Boundary.of(plan.mesh),
        )
    )
    compiled = backend not in (None, "eager")
    graphs = [made.graphs for _, made in lowered.mine]
    world.make_groups(_axes_of_all(graphs), live, groups, traceable=compiled)
    last = plan.pipeline.pieces - 1
    parts = [
        load_part(made.graphs, groups, backend, device, index, sends=index < last)
        for index, made in lowered.mine
    ]
    line = live.get_group(PIPELINE_AXIS)
    _check_schedules(parts, rank // plan.stage_mesh.size)
    _check_crossings(parts, line)
    kind, chunks = plan.pipeline.schedule, plan.pipeline.chunks
    recomputes = any(mark_of(node) for made in graphs for node in made.body.calls())
    engine = PipelineEngine(kind, chunks, line, device, splits=not (compiled or recomputes))
    owners = {
        name: stage
        for name, p in parameters.items()
        if isinstance(p, DTensor) and (stage := stage_of(p)) is not None
    }
    tied = TiedParameters(line, _tied(lowered, parameters, owners), device)
    results = _results(lowered)
    reads = tuple(lowered.parameters)
    step = PipelinedStep(parts, engine, micro_batches, line, results, owners, tied, reads)
    return step, lowered.stages


def _on_all_or_none(make: Callable[[], LoweredPieces]) -> LoweredPieces:
    """What `make` returns; where it raises on one rank, all raise: pieces differ between stages."""
    found, error = None, None
    try:
        found = make()
    except Exception as raised:
        error = raised
    is_users = isinstance(error, UserError)
    mine = (error.what, error.where, error.fix) if isinstance(error, UserError) else str(error)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (error is None, is_users, mine))
    if error is not None and not is_users:
        raise error
    for fine, of_user, text in told:
        if of_user:
            what, where, fix = text
            raise UserError(what, where=where, fix=fix)
        if not fine:
            raise RuntimeError(f"another stage failed: {text}")
    assert found is not None
    return found


def another_schedule(plan: Plan, micro_batches: int) -> str | None:
    """What to say where the plan's schedule cannot run so many micro-batches, and another one does.

    That is for batches that the plan was not made for.
    """
    assert plan.pipeline is not None
    kind, stages = plan.pipeline.schedule, plan.stages
    runs = schedule_for(kind, stages, plan.pipeline.chunks, micro_batches)
    if runs == kind:
        return None
    return (
        f"{micro_batches} micro-batches on {stages} stages run with the schedule {runs}, not "
        f"{kind}: a batch of another size than the plan's, whose bubbles are larger"
    )


def _cuts(graph: Graph, followed: Followed, plan: Plan) -> tuple[str, ...]:
    """The plan's cuts in this capture; of ops that micro-batches made away with, the next ones."""
    kept = {node.name for node in followed.graph.calls()}
    order = [node.name for node in graph.calls()]
    at = {name: i for i, name in enumerate(order)}
    return tuple(
        next((name for name in order[at[cut] :] if name in kept), cut)
        for cut in matching_cuts(graph, plan)
    )


def _axes_of_all(graphs: list[StepGraphs]) -> set[tuple[str, ...]]:
    """The axes of all groups that some stage communicates in."""
    nodes = [n for made in graphs for g in (made.prologue, made.body, made.tail) for n in g.calls()]
    arguments: list[Any] = [a for n in nodes for a in (*n.args, *n.kwargs.values())]
    mine = sorted({a.axes for a in arguments if isinstance(a, GroupRef)})
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return {tuple(axes) for of_rank in told for axes in of_rank}


def _check_schedules(parts: list[PartProgram], stage: int) -> None:
    """Raise UserError unless all ranks of each stage run the same collectives in the same order."""
    mine = " ".join(part.schedule for part in parts)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (stage, mine))
    for at in sorted({s for s, _ in told}):
        texts = [text for s, text in told if s == at]
        agree.check_told(f"the schedule of collectives of stage {at}", texts, BUG)


def _check_crossings(parts: list[PartProgram], line: dist.ProcessGroup) -> None:
    """Raise UserError unless every piece receives what the one before it sends."""
    told: list[Any] = [None] * dist.get_world_size(line)
    mine = [(p.index, [str(c) for c in p.receives], [str(c) for c in p.sends]) for p in parts]
    dist.all_gather_object(told, mine, group=line)
    pieces = {index: (receives, sends) for of in told for index, receives, sends in of}
    for index in range(1, len(pieces)):
        texts = [str(pieces[index - 1][1]), str(pieces[index][0])]
        agree.check_told(f"what piece {index} of the pipeline receives", texts, BUG)


def _tied(
    lowered: LoweredPieces, parameters: Mapping[str, Tensor], owners: Mapping[str, int]
) -> list[Tied]:
    found = []
    for name, readers in sorted(lowered.parameters.items()):
        users = tuple(stage for stage in readers if stage != owners.get(name, stage))
        if users:
            parameter = parameters[name]
            assert isinstance(parameter, DTensor)
            shape = piece_shape(parameter)
            found.append(Tied(name, owners[name], users, shape, parameter.dtype))
    return found


def _results(lowered: LoweredPieces) -> Results:
    outputs = tuple(_crossing(v) if isinstance(v, Value) else v for v in lowered.outputs)
    updates = tuple((name, stage, _crossing(v)) for name, stage, v in lowered.updates)
    return Results(outputs, updates)


def _crossing(value: Value) -> Crossing:
    return Crossing(value.int_shape(), value.dtype, value.requires_grad)
