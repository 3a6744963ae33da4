"""Choose a plan: candidates by rising bound, the best few settled exactly and simulated."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import sympy
import torch.fx

from autopar.collector import collector_paused
from autopar.cost.cluster import Cluster
from autopar.cost.sent import sent_bytes
from autopar.cost.step import Step
from autopar.cost.timeline import Timeline, summarise
from autopar.errors import PassError, UserError
from autopar.ir.graph import Graph, value_of
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_sharding
from autopar.plan import Alternative, Plan, Prediction, Storage

from .accounts import MODES, NONE
from .describe import describe_activations, describe_traffic, renamed, type_of
from .families import FAMILIES, PIPELINED, ROLE_OF
from .forced import check_forced, force, force_within
from .hints import without_hints
from .leanest import leanest
from .not_chosen import above_limit, not_chosen
from .options import Option
from .pipeline_search import only_pipelines, pipelines_beside
from .pipelined import Wanted
from .price import Pricer
from .problem import Problem, options_of, problem_of
from .programme import edges_of, solve
from .propose import Frames, Proposal, Request
from .rules_of import unsharded_ops
from .same_model import parts_of
from .settle import Settled, recorded
from .settle_best import settle_best
from .staged import Staged
from .staged_plan import (
    axis_names,
    gap_with,
    messages_of,
    on_stages,
    per_stage,
    sent_bytes_of,
    with_sends,
)

__all__ = ["MODES", "Frames", "Problem", "choose_for", "predict", "search"]

Node = torch.fx.Node
Progress = Callable[[str], None]

USABLE_MEMORY = 0.92  # of the device's, the rest is left to the allocator's fragmentation

_options = options_of


@collector_paused()
def search(
    graph: Graph,
    fingerprint: str,
    symbols: Mapping[sympy.Symbol, int],
    cluster: Cluster,
    *,
    strategy: str = "auto",
    memory_limit: float | None = None,
    optimizer: str = "adamw",
    progress: Progress = lambda _: None,
    micro_batches: Sequence[int] = (1,),
    recompute: Sequence[str] = (NONE,),
    frames: Frames | None = None,
    pipelines: Wanted | None = None,
) -> Plan:
    """The cheapest plan that fits for a captured graph on a cluster.

    `memory_limit` is bytes per device (default: the device's memory). `micro_batches` and
    `recompute` (of `MODES`) are what may be tried. `frames`, from an earlier search of the same
    graph, make this one fast. `pipelines` says which of those may be tried (None: none); where it
    names stages, nothing else is. Raises UserError if the strategy is unknown or does not apply, or
    if nothing fits, saying what is short and by how much.
    """
    if strategy not in FAMILIES:
        raise UserError(
            f"unknown strategy {strategy!r}", fix=f"use one of {', '.join(map(repr, FAMILIES))}"
        )
    limit = (
        memory_limit if memory_limit is not None else cluster.device.memory_bytes * USABLE_MEMORY
    )
    if frames is None or frames.problem.optimizer != optimizer:
        frames = Frames(problem_of(graph, symbols, cluster, optimizer))
    problem = frames.problem_at(graph, symbols, cluster)
    # What the user recomputes stays as it is written.
    written = any(node.meta.get("region") is not None for node in problem.graph.calls())
    modes = (NONE,) if written else tuple(recompute)
    given = problem.given_bytes(1)
    request = Request(cluster, symbols, limit, tuple(micro_batches), modes, given_bytes=given)
    if strategy in PIPELINED or (pipelines is not None and pipelines.stages is not None):
        only = only_pipelines(frames, graph, request, strategy, pipelines or Wanted(), progress)
        return _finish(problem, only.tried, [], strategy, fingerprint, symbols, limit, only.left_s)
    if strategy != "auto":
        forced = force_within(frames, graph, request, strategy, progress)
        check_forced(forced, strategy, limit, cluster.size)
        return _finish(problem, forced, [], strategy, fingerprint, symbols, limit)
    found = settle_best(frames, graph, request, progress)
    fitting = found.fitting
    # What else there is says which pipelines can be left out at once.
    best_s = found.best.timeline.step_s if found.best else math.inf
    piped = pipelines_beside(frames, graph, request, pipelines, best_s, progress)
    if not fitting and not piped.best:
        fitting = [leanest(found, request, frames, graph)]
    above = above_limit([one for one in found.above if not _has(fitting, one)], limit)
    tried: list[Settled | Alternative] = [*fitting, *above, *piped.tried]
    plain = 1 in micro_batches and NONE in modes  # else it is not what was asked for
    for other in ("data", "zero", "tensor") if cluster.size > 1 else ():
        if plain:
            tried += force(problem, other, limit, progress)
        else:
            tried += force_within(frames, graph, request, other, progress)
    lefts = (piped.left_s, found.left_s)
    return _finish(problem, tried, found.proposals, strategy, fingerprint, symbols, limit, *lefts)


def _has(fitting: Sequence[Settled], one: Settled) -> bool:
    return any(str(f.mesh) == str(one.mesh) and f.variant == one.variant for f in fitting)


def _finish(
    problem: Problem,
    tried: Sequence[Settled | Alternative],
    proposals: Sequence[Proposal],
    strategy: str,
    fingerprint: str,
    symbols: Mapping[sympy.Symbol, int],
    limit: float,
    left_s: float = math.inf,
    unsettled_s: float = math.inf,
) -> Plan:
    settled = [s for s in tried if isinstance(s, Settled)]
    # A named strategy is a plan like any other where nothing is asked for.
    mine = [s for s in settled if strategy in ("auto", s.name)]
    best = fastest = min(mine, key=lambda s: (s.timeline.peak_bytes > limit, s.timeline.step_s))
    if not isinstance(fastest, Staged):
        best = replace(fastest, timeline=recorded(fastest))
        tried = [best if one is fastest else one for one in tried]
    option, pricer = best.option, best.pricer
    rename = axis_names(best, best.problem.batch)
    mesh = Mesh(tuple(replace(a, name=rename[a.name]) for a in best.mesh.axes))
    graph = best.problem.graph
    pipeline = best.pipeline if isinstance(best, Staged) else None
    choices = {
        node.name: {rename[axis]: str(choice) for axis, choice in o.choices}
        for node, o in option.items()
        if o.choices
    }
    params = {
        node.meta["fqns"][0]: Storage(
            str(renamed(o.gives[0], rename)),
            o.regather,
            type_of(value_of(node)),
            int(pricer.local_bytes(value_of(node), o.gives[0])),
        )
        for node, o in option.items()
        if node.meta.get("role") == "param"
    }
    return Plan(
        fingerprint=fingerprint,
        mesh=mesh,
        cluster=problem.cluster.name,
        strategy=strategy,
        choices=choices,
        params=on_stages(params, problem.symbolic or graph, best),
        predicted=with_sends(predicted(best.step, best.timeline), sent_bytes_of(best)),
        alternatives=tuple(not_chosen(problem, best, tried, proposals, limit)),
        notes=tuple(unsharded_ops(graph, best.problem.blocks, best.problem.rules, pricer)),
        hints={str(symbol): int(size) for symbol, size in symbols.items()},
        gap=gap_with(_gap(best, unsettled_s), best, [left_s]),
        activations=describe_activations(graph, best.problem.rules, option, pricer, rename),
        traffic=per_stage(
            describe_traffic(
                graph, best.problem.rules, option, pricer, rename, best.variant.micro_batches
            ),
            mesh.axes[0].size if pipeline is not None else 1,
            messages_of(pipeline, best.variant.micro_batches),
            sent_bytes_of(best),
        ),
        recompute=best.recompute,
        micro_batches=best.variant.micro_batches,
        memory_limit=limit,
        timeline=summarise(best.timeline),
        model=parts_of(problem.symbolic or graph),
        pipeline=pipeline,
    )


def predicted(step: Step, timeline: Timeline) -> Prediction:
    """The prediction of a simulated step, with its traffic."""
    parts = {name: int(n) for name, n in step.state_bytes.items()}
    rest = int(timeline.peak_bytes) - sum(parts.values())
    if rest < 0:  # the peak comes before all gradients are there
        parts["gradients"] += rest
    else:
        parts["activations and buffers"] = rest
    return Prediction(
        time_s=timeline.step_s,
        compute_s=timeline.compute_s,
        comm_s=timeline.exposed_total_s,
        optimizer_s=timeline.optimizer_s,
        memory_bytes=int(timeline.peak_bytes),
        memory_parts=parts,
        comm_bytes={kind: int(n) for kind, n in sorted(sent_bytes(step).items())},
    )


def _gap(best: Settled, unsettled_s: float) -> float:
    """How much less than the plan's programme a candidate that was not settled could take."""
    programme_s = best.programme_s or best.timeline.step_s
    left = 1 - unsettled_s / programme_s if programme_s > 0 else 0.0
    return min(1.0, max(best.assignment.gap, left))


def predict(graph: Graph, option: Mapping[Node, Option], pricer: Pricer) -> Prediction:
    """Time, memory and traffic of an assignment, by what causes them."""
    compute = optimizer = comm = 0.0
    parts: dict[str, float] = defaultdict(float)
    sent: dict[str, float] = defaultdict(float)
    for node, o in option.items():
        if node.op == "placeholder":
            optimizer += o.time_s
            parts["parameters, gradients, optimizer state"] += o.memory_bytes
        else:
            compute += o.time_s
            parts["saved activations"] += o.memory_bytes
    paid: set[object] = set()
    kept: set[object] = set()
    for edge in edges_of(graph):
        producer = option[edge.producer]
        source, want = producer.gives[edge.port], option[edge.consumer].wants[edge.slot]
        key = (edge.producer, edge.port, want)
        arguments = (edge.producer, edge.port, source, want, producer.regather)
        if key not in paid:
            paid.add(key)
            comm += pricer.edge_time_s(*arguments)
            for kind, n in pricer.edge_bytes(*arguments).items():
                sent[kind] += n
        if pricer.saves_input(edge.consumer, edge.slot) and key not in kept:
            kept.add(key)
            name = (
                "gathered parameters" if edge.producer.op == "placeholder" else "saved activations"
            )
            parts[name] += pricer.saved_input_bytes(*arguments)
    return Prediction(
        time_s=compute + comm + optimizer,
        compute_s=compute,
        comm_s=comm,
        optimizer_s=optimizer,
        memory_bytes=int(sum(parts.values())),
        memory_parts={name: int(n) for name, n in parts.items()},
        comm_bytes={kind: int(n) for kind, n in sorted(sent.items())},
    )


def choose_for(
    graph: Graph,
    symbols: Mapping[sympy.Symbol, int],
    cluster: Cluster,
    plan: Plan,
    optimizer: str = "adamw",
) -> dict[str, dict[str, str]]:
    """Choices for another capture of the planned module (evaluation, say) with its storage.

    Keyed by node name, then axis. The plan's mesh and storage are kept.
    """
    mesh, problem = plan.mesh, problem_of(without_hints(graph), symbols, cluster, optimizer)
    concrete, pricer = problem.graph, Pricer(cluster, mesh, optimizer)
    roles = {a.name: "any" for a in mesh.axes}
    if len(roles) > 2:
        roles = {name: ROLE_OF.get(name, "feature") for name in roles}
    options = options_of(problem, mesh, pricer, problem.family("auto", roles))
    for node in concrete.placeholders("param"):
        if node in options:
            stored = next(plan.params[f] for f in node.meta["fqns"] if f in plan.params)
            options[node] = [
                Option((), (), (parse_sharding(stored.sharding),), 0.0, 0.0, stored.regather)
            ]
    assignment = solve(concrete, problem.blocks, options, pricer, float("inf"))
    if assignment is None:
        raise PassError("choose_for", "solvable", "no choices exist for the plan's storage")
    return {
        node.name: {axis: str(choice) for axis, choice in option.choices}
        for node, option in assignment.option.items()
        if option.choices
    }
