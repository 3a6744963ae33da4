"""Choose a plan: candidates of mesh and family, a programme for each, the cheapest that fits."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import sympy
import torch.fx

from autopar.cost.cluster import Cluster, make_mesh
from autopar.errors import PassError, UserError
from autopar.ir.graph import Graph, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import ShardingRule
from autopar.ir.sharding import Sharding
from autopar.ir.text import parse_sharding
from autopar.plan import Alternative, Plan, Prediction, Storage
from autopar.units import bytes_text

from .blocks import Blocks, find_blocks
from .describe import describe_activations, describe_traffic, renamed, type_of
from .families import FAMILIES, Family, batch_factors
from .options import Option, call_options, param_options, place_call
from .price import Pricer
from .programme import Assignment, edges_of, is_getitem, solve
from .rules_of import rules_of, unsharded_ops
from .specialise import specialise

Node = torch.fx.Node
Progress = Callable[[str], None]

USABLE_MEMORY = 0.92  # of the device's, the rest is left to the allocator's fragmentation


@dataclass(frozen=True)
class Candidate:
    """A mesh with a family, and its solved programme (None: nothing fits or nothing applies)."""

    family: str
    mesh: Mesh
    pricer: Pricer
    assignment: Assignment | None
    why: str = ""
    least_bytes: float | None = None


@dataclass(frozen=True)
class Problem:
    """What every candidate shares: the graph at its hint sizes, its rules and repeated blocks."""

    graph: Graph
    rules: Mapping[str, ShardingRule]
    blocks: Blocks
    batch: Mapping[Node, frozenset[str]]
    cluster: Cluster
    optimizer: str


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
) -> Plan:
    """The cheapest plan that fits for a captured graph on a cluster.

    `memory_limit` is bytes per device (default: the device's memory). Raises UserError if the
    strategy is unknown or does not apply, or if nothing fits, saying what is short and by how much.
    """
    if strategy not in FAMILIES:
        raise UserError(
            f"unknown strategy {strategy!r}", fix=f"use one of {', '.join(map(repr, FAMILIES))}"
        )
    limit = (
        memory_limit if memory_limit is not None else cluster.device.memory_bytes * USABLE_MEMORY
    )
    concrete = specialise(graph, symbols)
    rules = rules_of(concrete)
    problem = Problem(
        concrete,
        rules,
        find_blocks(concrete),
        batch_factors(concrete, rules, graph),
        cluster,
        optimizer,
    )
    wanted = list(_candidates(strategy, cluster))
    others = [] if strategy != "auto" else ["data", "zero", "tensor"]
    tried: list[Candidate] = []
    bound = float("inf")
    for family, sizes in wanted + [c for other in others for c in _candidates(other, cluster)]:
        start = time.perf_counter()
        searched = family == strategy
        tried.append(_try(problem, family, sizes, limit, bound if searched else float("inf")))
        if searched and (found := tried[-1].assignment) is not None:
            bound = min(bound, found.time_s)
        label = " x ".join(map(str, sizes.values()))
        progress(f"{family} on {label}: {time.perf_counter() - start:.1f} s")
    chosen = [c for c in tried[: len(wanted)] if c.assignment is not None]
    if not chosen:
        _raise_nothing_fits(tried[: len(wanted)], strategy, limit, cluster.size)
    best = min(chosen, key=lambda c: c.assignment.time_s if c.assignment else 0.0)
    return _to_plan(problem, best, tried, fingerprint, strategy, symbols)


def _candidates(strategy: str, cluster: Cluster) -> list[tuple[str, dict[str, int]]]:
    """(family, axis sizes) pairs, axis names outermost first."""
    n = cluster.size
    found = []
    for roles in FAMILIES[strategy]:
        if len(roles) == 1 or n == 1:
            name = "tp" if roles == ("tensor",) else "dp"
            found.append((strategy, {name: n}))
            continue
        for outer in range(2, n // 2 + 1):
            if n % outer == 0:
                found.append((strategy, {"dp": outer, "tp": n // outer}))
    if strategy == "auto" and len(cluster.levels) > 1:
        found = [c for c in found if len(c[1]) == 1 or _fits_hosts(c[1]["tp"], cluster)]
    return found


def _fits_hosts(inner: int, cluster: Cluster) -> bool:
    """Whether the inner axis stays inside a host."""
    return cluster.host_size % inner == 0


def _try(
    problem: Problem, family_name: str, sizes: Mapping[str, int], limit: float, bound_s: float
) -> Candidate:
    """Solve one candidate; nothing slower than `bound_s` is of interest."""
    mesh = make_mesh(problem.cluster, dict(sizes))
    roles = next(r for r in FAMILIES[family_name] if len(r) == len(sizes))
    family = Family(family_name, dict(zip(sizes, roles, strict=True)), problem.batch)
    pricer = Pricer(problem.cluster, mesh, problem.optimizer, family.never_gather)
    options = _options(problem, mesh, pricer, family)
    assignment = solve(problem.graph, problem.blocks, options, pricer, limit, better_than_s=bound_s)
    if assignment is None and bound_s < float("inf"):
        why = f"nothing faster than {bound_s * 1e3:.4g} ms within {bytes_text(limit)} per device"
        return Candidate(family_name, mesh, pricer, None, why)
    if assignment is None:
        lean = solve(problem.graph, problem.blocks, options, pricer, limit, minimise_memory=True)
        if lean is None:
            return Candidate(family_name, mesh, pricer, None, "does not apply")
        why = f"needs {bytes_text(lean.memory_bytes)} per device, {bytes_text(limit)} are there"
        return Candidate(family_name, mesh, pricer, None, why, lean.memory_bytes)
    if family_name in ("tensor", "data+tensor") and not _splits_params(assignment):
        return Candidate(family_name, mesh, pricer, None, "no parameter can be split in place")
    return Candidate(family_name, mesh, pricer, assignment)


def _splits_params(assignment: Assignment) -> bool:
    return any(
        node.meta.get("role") == "param" and any(option.gives[0].splits)
        for node, option in assignment.option.items()
    )


def _options(
    problem: Problem, mesh: Mesh, pricer: Pricer, family: Family
) -> dict[Node, list[Option]]:
    """Options of every representative node."""
    options: dict[Node, list[Option]] = {}
    wanted: dict[Node, dict[Sharding, None]] = defaultdict(dict)
    stands_for = problem.blocks.representative
    for node in problem.graph.fx.nodes:
        if stands_for[node] is not node:
            continue
        if node.op == "output":
            wants = tuple(
                Sharding.replicated(v.rank) for s in tensor_inputs(node) for v in values_of(s)[:1]
            )
            options[node] = [Option((), wants, (), 0.0, 0.0)]
        elif node.op == "call_function" and not is_getitem(node):
            rule = problem.rules[node.name]
            found = call_options(node, rule, mesh, pricer, family.allows)
            options[node] = family.keeps(node, found)
    for edge in edges_of(problem.graph):
        if edge.producer.meta.get("role") == "param":
            consumer = stands_for[edge.consumer]
            for option in options[consumer]:
                wanted[stands_for[edge.producer]].setdefault(option.wants[edge.slot])
    for node in problem.graph.placeholders():
        if stands_for[node] is not node or not values_of(node):
            continue
        if node.meta["role"] == "param":
            found = param_options(node, wanted[node], mesh, pricer)
            options[node] = family.keeps_stored(node, mesh, found)
        else:
            whole = Sharding.replicated(values_of(node)[0].rank)
            options[node] = [Option((), (), (whole,), 0.0, 0.0)]
    return options


def _raise_nothing_fits(tried: list[Candidate], strategy: str, limit: float, size: int) -> NoReturn:
    if not tried:
        raise UserError(
            f"the strategy {strategy!r} needs a mesh of two axes, and {size} devices make none",
            fix="use a number of devices that is a product of two, or strategy='auto'",
        )
    needs = [(c.least_bytes, str(c.mesh)) for c in tried if c.least_bytes is not None]
    if not needs:
        raise UserError(
            f"the strategy {strategy!r} does not apply to this model: {tried[0].why}",
            fix="use strategy='auto' or 'data'",
        )
    least, mesh = min(needs)
    raise UserError(
        f"the model fits on no plan: the leanest ({mesh}) needs {bytes_text(least)} per device, "
        f"the limit is {bytes_text(limit)}: {bytes_text(least - limit)} short",
        fix="use more devices, a smaller batch, or a higher memory_limit",
    )


def _to_plan(
    problem: Problem,
    best: Candidate,
    tried: list[Candidate],
    fingerprint: str,
    strategy: str,
    symbols: Mapping[sympy.Symbol, int],
) -> Plan:
    assert best.assignment is not None
    option = best.assignment.option
    rename = _axis_names(best, problem.batch)
    mesh = Mesh(tuple(replace(a, name=rename[a.name]) for a in best.mesh.axes))
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
            int(best.pricer.local_bytes(value_of(node), o.gives[0])),
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
        params=params,
        predicted=predict(problem.graph, option, best.pricer),
        alternatives=tuple(_alternatives(problem, best, tried)),
        notes=tuple(unsharded_ops(problem.graph, problem.rules, best.pricer)),
        hints={str(symbol): int(size) for symbol, size in symbols.items()},
        gap=best.assignment.gap,
        activations=describe_activations(problem.graph, problem.rules, option, best.pricer, rename),
        traffic=describe_traffic(problem.graph, option, best.pricer, rename),
    )


def _axis_names(best: Candidate, batch: Mapping[Node, frozenset[str]]) -> dict[str, str]:
    """Call the only axis `dp` if it splits the batch, else `tp`."""
    names = best.mesh.names
    if len(names) != 1 or best.assignment is None:
        return {name: name for name in names}
    on_batch = any(
        choice.factor in batch.get(node, ())
        for node, option in best.assignment.option.items()
        for _, choice in option.choices
        if choice.factor
    )
    return {names[0]: "dp" if on_batch else "tp"}


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


def _alternatives(problem: Problem, best: Candidate, tried: list[Candidate]) -> list[Alternative]:
    assert best.assignment is not None
    best_s = best.assignment.time_s
    found = []
    for candidate in tried:
        if candidate is best:
            continue
        mesh, assignment = str(candidate.mesh), candidate.assignment
        if assignment is None:
            found.append(Alternative(candidate.family, mesh, None, None, candidate.why))
            continue
        p = predict(problem.graph, assignment.option, candidate.pricer)
        b = predict(problem.graph, best.assignment.option, best.pricer)
        gaps = {
            "communication": p.comm_s - b.comm_s,
            "compute": p.compute_s - b.compute_s,
            "optimizer": p.optimizer_s - b.optimizer_s,
        }
        reason = max(gaps, key=gaps.__getitem__)
        if gaps[reason] <= 1e-3 * best_s:
            why = "as good as the chosen plan"
        else:
            why = f"{p.time_s / best_s:.2f}x: {reason} +{gaps[reason] * 1e3:.3g} ms"
        found.append(Alternative(candidate.family, mesh, p.time_s, p.memory_bytes, why))
    if problem.cluster.size > 1:
        found.append(_one_process(problem, best_s))
    return found


def _one_process(problem: Problem, best_s: float) -> Alternative:
    """The same step on one device (on a CPU: one process with all the threads)."""
    mesh = make_mesh(problem.cluster, {"dp": 1})
    pricer = Pricer(problem.cluster, mesh, problem.optimizer)
    options: dict[Node, Option] = {}
    for node in problem.graph.fx.nodes:
        if node.op == "output" or (node.op == "call_function" and not is_getitem(node)):
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
    p = predict(problem.graph, options, pricer)
    name = "one process, all threads" if problem.cluster.single else "one device"
    faster = p.time_s < best_s
    why = f"{p.time_s / best_s:.2f}x: " + ("faster; start one process" if faster else "compute")
    return Alternative(name, "single", p.time_s, p.memory_bytes, why)


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
    concrete = specialise(graph, symbols)
    rules = rules_of(concrete)
    mesh = plan.mesh
    problem = Problem(
        concrete,
        rules,
        find_blocks(concrete),
        batch_factors(concrete, rules, graph),
        cluster,
        optimizer,
    )
    roles = dict(zip(mesh.names, next(iter(FAMILIES["auto"])) * len(mesh.names), strict=True))
    pricer = Pricer(cluster, mesh, optimizer)
    options = _options(problem, mesh, pricer, Family("auto", roles, problem.batch))
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
