"""Choose a plan: candidates by rising bound, the best few settled exactly and simulated."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import sympy
import torch.fx

from autopar.collector import collector_paused
from autopar.cost.cluster import Cluster, make_mesh
from autopar.cost.sent import sent_bytes
from autopar.cost.step import Step
from autopar.cost.timeline import Timeline, summarise
from autopar.errors import PassError, UserError
from autopar.ir.graph import Graph, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding
from autopar.ir.text import parse_sharding
from autopar.plan import Alternative, Plan, Prediction, Storage
from autopar.units import bytes_text

from .accounts import MODES, NONE, Accounts
from .describe import describe_activations, describe_traffic, renamed, type_of
from .families import FAMILIES, PIPELINED, ROLE_OF
from .forced import check_forced, force, force_within
from .frame import Variant
from .hints import without_hints
from .impossible import no_candidate
from .options import Option, place_call
from .pipeline_search import only_pipelines, pipelines_beside
from .pipelined import Wanted
from .price import Pricer
from .problem import Problem, options_of, problem_of
from .programme import edges_of, evaluate, is_getitem, solve
from .propose import Frames, Proposal, Request
from .rules_of import unsharded_ops
from .same_model import parts_of
from .settle import Settled, settle
from .settle_best import Found, settle_best
from .staged import Staged
from .staged_plan import (
    axis_names,
    gap_with,
    messages_of,
    on_stages,
    per_stage,
    schedule_text,
    sent_bytes_of,
    with_sends,
)

__all__ = ["MODES", "Frames", "Problem", "choose_for", "predict", "search"]

Node = torch.fx.Node
Progress = Callable[[str], None]

USABLE_MEMORY = 0.92  # of the device's, the rest is left to the allocator's fragmentation
SETTLED = 3  # candidates that are solved exactly and simulated
SERIAL = 2  # of those that would take least if nothing overlapped
SHOWN = 12  # other meshes that a plan lists
LEAN = 4  # candidates that are made as lean as they can be where nothing fits
ATTEMPTS = 3  # at leaving room for what a step needs for a moment

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
    request = Request(cluster, symbols, limit, tuple(micro_batches), modes)
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
        fitting = [_leanest(found, request, frames, graph)]
    above = _above([one for one in found.above if not _has(fitting, one)], limit)
    tried: list[Settled | Alternative] = [*fitting, *above, *piped.tried]
    # They run one micro-batch and recompute nothing: not what was asked for, perhaps.
    comparable = cluster.size > 1 and 1 in micro_batches and NONE in modes
    for other in ("data", "zero", "tensor") if comparable else ():
        tried += force(problem, other, limit, progress)
    lefts = (piped.left_s, found.left_s)
    return _finish(problem, tried, found.proposals, strategy, fingerprint, symbols, limit, *lefts)


def _has(fitting: Sequence[Settled], one: Settled) -> bool:
    return any(str(f.mesh) == str(one.mesh) and f.variant == one.variant for f in fitting)


def _above(settled: Sequence[Settled], limit: float) -> list[Alternative]:
    """Candidates whose steps take more than the limit for a moment."""
    if not settled:
        return []
    least: dict[str, float] = {}
    for one in settled:
        text, needs = _mesh_text(one.mesh, one.variant), one.timeline.peak_bytes
        least[text] = min(needs, least.get(text, needs))
    there = f"per device for a moment, {bytes_text(limit)} are there"
    return [
        Alternative("auto", text, None, int(needs), f"needs {bytes_text(needs)} {there}")
        for text, needs in least.items()
    ]


def _leanest(found: Found, request: Request, frames: Frames, graph: Graph) -> Settled:
    """The candidate that needs least memory; raises UserError if that is too much."""
    limit = request.memory_limit
    lean: list[Settled] = []
    for p in sorted(found.proposals, key=lambda p: p.least_bytes)[:LEAN]:
        sizes = request.at(p.variant.micro_batches)
        problem = frames.problem_at(graph, sizes, request.cluster)
        family = problem.family("auto", p.frame.roles)
        made = settle("auto", problem, p.mesh, family, p.variant, limit, minimise_memory=True)
        if made is not None:
            lean.append(made)
    lean += found.above
    if not lean:
        raise no_candidate(frames.problem_at(graph, request.symbols, request.cluster))
    least = min(lean, key=lambda s: s.timeline.peak_bytes)
    needs, mesh = least.timeline.peak_bytes, least.mesh
    if needs <= limit:
        return _faster(least, limit)
    raise UserError(
        f"the model fits on no plan: the leanest found ({mesh}) needs {bytes_text(needs)} per "
        f"device, the limit is {bytes_text(limit)}: {bytes_text(needs - limit)} short",
        fix="use more devices, a smaller batch, or a higher memory_limit",
    )


def _faster(least: Settled, limit: float) -> Settled:
    """What is fastest in little more memory than the leanest assignment, if that fits.

    The gap of either is unknown: it is given as one.
    """
    names = dict(least.roles)
    family = least.problem.family("auto", names)
    best = least
    for more in (1.02, 1.1, 1.3):
        room = least.assignment.memory_bytes * more
        made = settle("auto", least.problem, least.mesh, family, least.variant, room)
        fits = made is not None and made.timeline.peak_bytes <= limit
        if made is not None and fits and made.timeline.step_s < best.timeline.step_s:
            best = made
    return replace(best, assignment=replace(best.assignment, gap=1.0))


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
    best = min(mine, key=lambda s: (s.timeline.peak_bytes > limit, s.timeline.step_s))
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
        alternatives=tuple(_alternatives(problem, best, tried, proposals, limit)),
        notes=tuple(unsharded_ops(graph, best.problem.blocks, best.problem.rules, pricer)),
        hints={str(symbol): int(size) for symbol, size in symbols.items()},
        gap=gap_with(_gap(best, unsettled_s), best, [left_s]),
        activations=describe_activations(graph, best.problem.rules, option, pricer, rename),
        traffic=per_stage(
            describe_traffic(graph, best.problem.rules, option, pricer, rename),
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


def _alternatives(
    problem: Problem,
    best: Settled,
    tried: Sequence[Settled | Alternative],
    proposals: Sequence[Proposal],
    limit: float,
) -> list[Alternative]:
    best_s = best.timeline.step_s
    found: list[Alternative] = []
    shown = {(str(best.mesh), best.variant)}
    for one in tried:
        if one is best:
            continue
        if isinstance(one, Alternative):
            found.append(one)
            continue
        shown.add((str(one.mesh), one.variant))
        found.append(
            Alternative(
                one.name,
                _mesh_text(one.mesh, one.variant) + schedule_text(one),
                one.timeline.step_s,
                int(one.timeline.peak_bytes),
                _why(one, best),
            )
        )
    # Bounds are of the programme: compare them with what it says of the best, not its timeline.
    least = best.programme_s or best_s
    told = {one.mesh for one in found}
    for p in proposals:
        if len(found) >= SHOWN:
            break
        if (str(p.mesh), p.variant) in shown or (p.relaxed is None and p.bound_s <= 0):
            continue
        if _mesh_text(p.mesh, p.variant) in told:
            continue
        shown.add((str(p.mesh), p.variant))
        ratio = p.bound_s / least if least > 0 else 1.0
        if p.relaxed is not None:
            why = f"{ratio:.2f}x by its relaxation"
            found.append(
                Alternative(
                    "auto",
                    _mesh_text(p.mesh, p.variant),
                    best_s * ratio,
                    int(p.relaxed.memory_bytes),
                    why,
                )
            )
        else:
            why = f"at least {ratio:.2f}x: its bound"
            if limit < p.least_bytes < float("inf"):
                why = f"needs at least {bytes_text(p.least_bytes)} per device"
            found.append(Alternative("auto", _mesh_text(p.mesh, p.variant), None, None, why))
    if problem.cluster.size > 1:
        found.append(_one_process(problem, best_s))
    return found


def _gap(best: Settled, unsettled_s: float) -> float:
    """How much less than the plan's programme a candidate that was not settled could take."""
    programme_s = best.programme_s or best.timeline.step_s
    left = 1 - unsettled_s / programme_s if programme_s > 0 else 0.0
    return min(1.0, max(best.assignment.gap, left))


def _why(one: Settled, best: Settled) -> str:
    a, b = one.timeline, best.timeline
    gaps = {
        "communication": a.exposed_total_s - b.exposed_total_s,
        "compute": a.compute_s - b.compute_s,
        "optimizer": a.optimizer_s - b.optimizer_s,
        "bubble": a.bubble_s - b.bubble_s,
    }
    reason = max(gaps, key=gaps.__getitem__)
    if gaps[reason] <= 1e-3 * b.step_s or b.step_s <= 0:
        return "as good as the chosen plan"
    return f"{a.step_s / b.step_s:.2f}x: {reason} +{gaps[reason] * 1e3:.3g} ms"


def _mesh_text(mesh: Mesh, variant: Variant) -> str:
    parts = [str(mesh)]
    if variant.micro_batches > 1:
        parts.append(f"{variant.micro_batches} micro-batches")
    if variant.mode != NONE:
        parts.append(f"{variant.mode} recomputation")
    return ", ".join(parts)


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
            value = values_of(edge.producer)[edge.port]
            for kind, n in pricer.edge_bytes(value, source, want, producer.regather).items():
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


def _one_process(problem: Problem, best_s: float) -> Alternative:
    """The same step on one device (on a CPU: one process with all the threads)."""
    mesh = make_mesh(problem.cluster, {"dp": 1})
    pricer = Pricer(problem.cluster, mesh, problem.optimizer)
    options: dict[Node, Option] = {}
    for node, first in problem.blocks.representative.items():
        if first is not node and first in options:
            options[node] = options[first]
        elif node.op == "output" or (node.op == "call_function" and not is_getitem(node)):
            values = [v for s in tensor_inputs(node) for v in values_of(s)[:1]]
            wants = tuple(Sharding.replicated(v.rank) for v in values)
            gives = tuple(Sharding.replicated(v.rank) for v in values_of(node))
            time_s = memory = 0.0
            if node.op == "call_function":
                placed = place_call(node, problem.rules[node.name], mesh, {})
                assert placed is not None
                time_s = pricer.compute_time_s(node, placed)
                memory = pricer.saved_output_bytes(node, placed)
            options[node] = Option((), wants, gives, time_s, memory)
        elif node.op == "placeholder" and values_of(node):
            value = values_of(node)[0]
            whole = Sharding.replicated(value.rank)
            is_param = node.meta["role"] == "param"
            options[node] = Option(
                (),
                (),
                (whole,),
                pricer.optimizer_time_s(value, whole) if is_param else 0.0,
                pricer.stored_bytes(value, whole) if is_param else 0.0,
            )
    accounts = Accounts(pricer, problem.regions)
    time_s, memory_bytes = evaluate(problem.graph, problem.blocks, options, accounts)
    name = "one process, all threads" if problem.cluster.single else "one device"
    faster = time_s < best_s
    ratio = time_s / best_s if best_s > 0 else 1.0
    why = f"{ratio:.2f}x: " + ("faster; start one process" if faster else "compute")
    return Alternative(name, "single", time_s, int(memory_bytes), why)


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
