"""Pipelines beside the other plans: which are tried, why there are none, forced families."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch.fx

from autopar.cost.cluster import make_mesh
from autopar.cost.pipeline import transfer_s
from autopar.errors import UserError
from autopar.ir.graph import Graph, Value
from autopar.ir.mesh import Mesh
from autopar.plan import PIPELINE_AXIS, Alternative
from autopar.units import bytes_text

from .accounts import NONE
from .cut_points import units_of
from .families import FAMILIES, PIPELINED
from .frame import Variant
from .hints import hinted_axes
from .lower_step import why_not_micro_batched
from .pipelined import (
    Candidate,
    Wanted,
    check_wanted,
    micro_batch_counts,
    propose_pipelines,
    stage_counts,
)
from .problem import Problem
from .propose import Frames, Request
from .staged import Misfit, Staged, settle_pipeline

Node = torch.fx.Node
Progress = Callable[[str], None]
Symbols = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Piped:
    """Pipelines that were looked at, and the least bound of those that were not."""

    tried: tuple[Staged | Alternative, ...] = ()
    left_s: float = math.inf

    @property
    def best(self) -> Staged | None:
        """The fastest one."""
        made = [one for one in self.tried if isinstance(one, Staged)]
        return min(made, key=lambda one: one.timeline.step_s, default=None)

    @property
    def best_s(self) -> float:
        """Its seconds."""
        return self.best.timeline.step_s if self.best is not None else math.inf


DEEP = 16  # pieces of a model whose blocks are not cut inside
SETTLED = 3  # candidates that are solved exactly and simulated, by estimate
MUCH_SENT = 0.05  # of a step: less is within what predictions are off by
SERIAL = 2  # of those that would take least if nothing overlapped
ROLES = {"data": "dp", "tensor": "tp"}  # the axis inside a stage of a forced family


def why_no_pipeline(graph: Graph, symbols: Symbols, statistics: bool = False) -> str | None:
    """Why a captured step cannot run as a pipeline, with what to change; None if it can."""
    return why_no_loss(graph) or why_no_micro_batches(graph, symbols, statistics)


def why_no_loss(graph: Graph) -> str | None:
    """What to say of a model whose loss is outside of it; None where forward returns a loss."""
    outputs = graph.output_node.args[0]
    assert isinstance(outputs, (tuple, list))
    returned = [n for n in outputs[: graph.outputs] if isinstance(n, torch.fx.Node)]
    if any(_is_loss(n.meta.get("value")) for n in returned):
        return None
    return (
        "pipelines need the loss inside of the module, and forward returns no scalar loss: "
        "give forward the targets, `def forward(self, x, y)`, and `return loss_fn(self.net(x), y)`"
    )


def why_no_micro_batches(graph: Graph, symbols: Symbols, statistics: bool = False) -> str | None:
    """What to say of a model that cannot run in micro-batches; None where it can."""
    why = why_not_micro_batched(graph, symbols, statistics)
    return f"pipelines need micro-batches, and there are none: {why}" if why else None


def _is_loss(value: object) -> bool:
    return (
        isinstance(value, Value)
        and value.rank == 0
        and value.requires_grad
        and value.dtype.is_floating_point
    )


@dataclass(frozen=True)
class Best:
    """Pipelines that fit, some that do not, and the least bound of those not looked at.

    `why_none`: why no pipeline can run, where that was asked.
    """

    found: tuple[Staged, ...] = ()
    misfits: tuple[Misfit, ...] = ()
    left_s: float = math.inf
    why_none: str | None = None


def best_pipelines(
    frames: Frames,
    graph: Graph,
    request: Request,
    wanted: Wanted,
    best_s: float = math.inf,
    progress: Progress = lambda _: None,
    check: Callable[[], str | None] = lambda: None,
) -> Best:
    """Pipelines that may take less than `best_s` seconds, the best few settled.

    `check` says why there can be none; it is asked where there is something to settle.
    """
    problem = frames.problem_at(graph, request.symbols, request.cluster)
    most = most_stages(problem)
    made = propose_pipelines(frames, request, wanted, most, best_s, progress)
    misfits: list[Misfit] = []
    if made.leanest is not None and not made.solved:
        lean = made.leanest
        mesh = Mesh((lean.mesh[PIPELINE_AXIS], *lean.inner.axes))
        needs = lean.least_bytes / lean.stages + request.given_bytes
        misfits.append(Misfit(mesh, 0, needs))
    why = check() if made.solved else None
    if why is not None:
        return Best(why_none=why)
    by_serial = sorted(made.solved, key=lambda c: c.relaxed.serial_s / c.stages if c.relaxed else 0)
    chosen = dict.fromkeys((*_various(made.solved)[:SETTLED], *_various(by_serial)[:SERIAL]))
    found: list[Staged] = []
    fits: set[tuple[str, int]] = set()  # recomputation is shared out anew for every assignment
    optimism, left = 1.0, made.left_s  # the least that a step took of its estimate
    for candidate in chosen:
        key = (str(candidate.mesh), candidate.micro_batches)
        best_s = min([best_s, *(one.timeline.step_s for one in found)])
        if key in fits:
            continue
        if candidate.est_s * optimism >= best_s:
            left = min(left, candidate.est_s)
            continue
        one = _settled("auto", frames, graph, request, wanted, candidate)
        if isinstance(one, Misfit):
            misfits.append(one)
        elif one is not None:
            took = one.timeline.step_s / candidate.est_s
            optimism = min(optimism, took) if found else took
            found.append(one)
            fits.add(key)
            progress(f"{one.mesh}, {one.pipeline.schedule}: simulated")
    best = min(found, key=lambda one: one.timeline.step_s, default=None)
    if best is not None and _sends_much(best, request):
        found += _with_split_messages(frames, graph, request, wanted, best)
    left = min([left, *(c.est_s for c in made.solved if c not in chosen)])
    return Best(tuple(found), tuple(misfits), left)


def _sends_much(one: Staged, request: Request) -> bool:
    """Whether messages between stages take a share of the step that the programme, which does not
    price them, might have chosen otherwise for.
    """
    level = one.mesh[PIPELINE_AXIS].level
    return transfer_s(request.cluster, one.sent_bytes, level) > MUCH_SENT * one.timeline.step_s


def _with_split_messages(
    frames: Frames, graph: Graph, request: Request, wanted: Wanted, one: Staged
) -> list[Staged]:
    """The same stages with the batch split inside, if that is faster.

    A device sends its rows then, and never all of them.
    """
    stages, k = one.mesh[PIPELINE_AXIS].size, one.variant.micro_batches
    if stages == request.cluster.size:
        return []
    same = replace(wanted, micro_batches=(k,))
    made = _forced(frames, graph, request, "pipeline+data", same, stages, "data")
    if isinstance(made, Staged) and made.timeline.step_s < one.timeline.step_s:
        return [replace(made, name="auto")]
    return []


def _various(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best of every number of stages first, then the rest in order."""
    first: dict[int, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.stages, candidate)
    ahead = list(first.values())
    return [*ahead, *(c for c in candidates if c not in ahead)]


def _settled(
    name: str,
    frames: Frames,
    graph: Graph,
    request: Request,
    wanted: Wanted,
    candidate: Candidate,
    family: str = "auto",
    roles: Mapping[str, str] | None = None,
) -> Staged | Misfit | None:
    k, stages = candidate.micro_batches, candidate.stages
    problem = frames.problem_at(graph, request.at(k), request.cluster)
    rounds = k + (stages - 1) * wanted.bubble
    variant = Variant(rounds, candidate.mode, min(stages, k))  # type: ignore[arg-type]
    return settle_pipeline(
        name,
        problem,
        candidate,
        wanted,
        request.modes,
        request.memory_limit,
        variant,
        family=family,
        roles=roles,
    )


def force_pipelines(
    frames: Frames,
    graph: Graph,
    request: Request,
    strategy: str,
    wanted: Wanted,
    progress: Progress = lambda _: None,
) -> list[Staged | Alternative]:
    """Every number of stages of a named strategy: settled, or an alternative that says why not.

    Of several numbers of micro-batches the best one.
    """
    problem = frames.problem_at(graph, request.symbols, request.cluster)
    most = most_stages(problem)
    (roles,) = FAMILIES[strategy]
    inner = roles[1] if len(roles) > 1 else None
    n = request.cluster.size
    tried: list[Staged | Alternative] = []
    for stages in stage_counts(n, most, wanted.stages):
        if (stages == n) != (inner is None):
            continue
        start = time.perf_counter()
        tried.append(_forced(frames, graph, request, strategy, wanted, stages, inner))
        progress(f"{strategy} of {stages} stages: {time.perf_counter() - start:.1f} s")
    return tried


def _forced(
    frames: Frames,
    graph: Graph,
    request: Request,
    strategy: str,
    wanted: Wanted,
    stages: int,
    inner: str | None,
) -> Staged | Alternative:
    axis = ROLES[inner] if inner is not None else "dp"
    rest = request.cluster.size // stages
    mesh = make_mesh(request.cluster, {PIPELINE_AXIS: stages, axis: rest})
    batch = next((b for s, b in request.symbols.items() if str(s) == "b"), 1)
    rows = rest if inner == "data" else 1
    best: Staged | None = None
    misfit: Misfit | None = None
    for k in micro_batch_counts(batch, stages, rows, wanted.micro_batches):
        candidate = Candidate(stages, ((axis, inner or "any"),), mesh, k, NONE, 0.0, 0.0)
        roles = {axis: inner} if inner is not None else {}
        made = _settled(strategy, frames, graph, request, wanted, candidate, strategy, roles)
        if isinstance(made, Staged):
            better = best is None or made.timeline.step_s < best.timeline.step_s
            best = made if better else best
        elif made is not None and (misfit is None or made.needs_bytes < misfit.needs_bytes):
            misfit = made
    if best is not None:
        return best
    if misfit is None:
        why = "no cut into stages has a plan on this mesh"
        return Alternative(strategy, str(mesh), None, None, why)
    why = misfit_text(misfit, request.memory_limit)
    return Alternative(strategy, str(misfit.mesh), None, int(misfit.needs_bytes), why)


def most_stages(problem: Problem) -> int:
    """Pieces that the model has at most: copies of blocks whole where there are many."""
    coarse = len(units_of(problem.graph, problem.blocks, 1))
    return coarse if coarse >= DEEP else len(units_of(problem.graph, problem.blocks))


def misfit_text(misfit: Misfit, limit: float) -> str:
    """Which stage does not fit, and what it needs."""
    return (
        f"stage {misfit.stage} needs {bytes_text(misfit.needs_bytes)} per device, "
        f"{bytes_text(limit)} are there"
    )


def check_pipelines(
    strategy: str, problem: Problem, symbols: Symbols, wanted: Wanted, devices: int
) -> None:
    """Raise UserError where the pipelines that are asked for cannot be."""
    most = most_stages(problem)
    batch = next((b for s, b in symbols.items() if str(s) == "b"), None)
    check_wanted(wanted, problem.graph, devices, most, batch)
    if strategy == "pipeline":
        wanted = replace(wanted, stages=wanted.stages or (devices,))
        if tuple(wanted.stages or ()) != (devices,):
            raise UserError(
                f"the strategy 'pipeline' has one device per stage: {devices} stages",
                fix="use 'pipeline+data' or 'pipeline+tensor' for fewer stages than devices",
            )
        check_wanted(wanted, problem.graph, devices, most, batch)
    elif strategy.startswith("pipeline+"):
        if devices in (wanted.stages or ()):
            raise UserError(
                f"{devices} stages leave one device each, and the strategy {strategy!r} needs more",
                fix="use the strategy 'pipeline', or fewer stages",
            )
        if not [p for p in stage_counts(devices, most, wanted.stages) if p < devices]:
            raise UserError(
                f"the strategy {strategy!r} needs a mesh of two axes, and {devices} devices make "
                "none of them with stages that the model can be cut into",
                fix="use a number of devices that is a product of two, or strategy='auto'",
            )


def pipelines_beside(
    frames: Frames,
    graph: Graph,
    request: Request,
    wanted: Wanted | None,
    best_s: float = math.inf,
    progress: Progress = lambda _: None,
) -> Piped:
    """Pipelines for an automatic search; an alternative that says why where there are none."""
    if wanted is None or hinted_axes(graph):
        return Piped()
    if not stage_counts(request.cluster.size, request.cluster.size, None):
        return Piped()
    why = why_no_loss(graph)
    if why is not None:
        return Piped((Alternative("pipeline", "-", None, None, why),))

    def check() -> str | None:
        return why_no_micro_batches(graph, request.symbols, wanted.statistics)

    made = best_pipelines(frames, graph, request, wanted, best_s, progress, check)
    if made.why_none is not None:
        return Piped((Alternative("pipeline", "-", None, None, made.why_none),))
    if made.found or not made.misfits:
        return Piped(made.found, made.left_s)
    return Piped((_unfit("auto", made.misfits, request.memory_limit),), made.left_s)


def only_pipelines(
    frames: Frames,
    graph: Graph,
    request: Request,
    strategy: str,
    wanted: Wanted,
    progress: Progress = lambda _: None,
) -> Piped:
    """The pipelines that are asked for; raises UserError where there are none, and says why."""
    problem = frames.problem_at(graph, request.symbols, request.cluster)
    check_pipelines(strategy, problem, request.symbols, wanted, request.cluster.size)
    why = why_no_pipeline(graph, request.symbols, wanted.statistics)
    if why is not None:
        raise UserError(why, fix="use strategy 'auto' and no stages: that needs no pipeline")
    if strategy in PIPELINED:
        piped = Piped(tuple(force_pipelines(frames, graph, request, strategy, wanted, progress)))
    else:
        made = best_pipelines(frames, graph, request, wanted, math.inf, progress)
        unfit = (_unfit(strategy, made.misfits, request.memory_limit),) if made.misfits else ()
        piped = Piped((*made.found, *unfit), made.left_s)
    if piped.best is None:
        reasons = [one for one in piped.tried if isinstance(one, Alternative)]
        least = min(reasons, key=lambda one: one.memory_bytes or math.inf, default=None)
        if least is None or least.memory_bytes is None:
            rounds = set(wanted.schedules) == {"interleaved"}
            raise UserError(
                f"no pipeline with the strategy {strategy!r} exists for this model",
                fix="use another schedule: stages of interleaved have several pieces each"
                if rounds
                else "use strategy='auto' or 'data'",
            )
        raise UserError(
            f"no pipeline fits: on {least.mesh}, {least.why}",
            fix="use more devices, more stages, a smaller batch, or a higher memory_limit",
        )
    return piped


def _unfit(strategy: str, misfits: Sequence[Misfit], limit: float) -> Alternative:
    least = min(misfits, key=lambda m: m.needs_bytes)
    why = misfit_text(least, limit)
    return Alternative(strategy, str(least.mesh), None, int(least.needs_bytes), why)
