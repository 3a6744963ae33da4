"""Edited plans, and plans for another batch: what is illegal in them, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import sympy
import torch.fx

from autopar.cost.cluster import Cluster, make_mesh
from autopar.cost.simulate import simulate
from autopar.cost.step import Step
from autopar.cost.timeline import Timeline, summarise
from autopar.errors import UserError
from autopar.ir.graph import Graph, value_of
from autopar.ir.parse import parse_sharding
from autopar.ir.rule import REPLICATE, Choice, ShardingRule, choices
from autopar.ir.sharding import Sharding
from autopar.kernel_gains import without_kernels
from autopar.kernel_use import ON_AXES, OPTIMIZER
from autopar.plan import Plan

from .assignment_of import assignment_of
from .blocks import find_blocks
from .case import Case, make_case
from .columns import edges_of, is_getitem
from .describe import describe_activations, describe_traffic, type_of
from .hints import hints_at, nearest
from .options import Option, place_call, storable
from .pipeline_plan import stages_of
from .price import Pricer
from .rules_of import rules_of
from .search import predicted
from .specialise import specialise
from .staged_case import illegal_cuts, simulate_case
from .staged_plan import messages_of, per_stage, with_sends
from .step_formula import BATCH
from .timeline_of import step_of_case

Node = torch.fx.Node
Sizes = Mapping[sympy.Symbol, int]
MOST_SHOWN = 12  # illegal edits of one plan


def reprice(
    plan: Plan, graph: Graph, symbols: Sizes, cluster: Cluster, optimizer: str = "adamw"
) -> Plan:
    """The plan with its mesh laid over the cluster and its cost predicted anew, for these sizes.

    Kernels are not counted: see `autopar.kernel_gains`.

    `graph` is the prepared captured graph. What the plan chose is kept; alternatives, which it was
    compared with, are not if it costs something else now. Raises UserError, as `check_edits`.
    """
    plan = _on(plan, cluster)
    check_edits(plan, graph, symbols, cluster, optimizer)
    case = make_case(graph, symbols, plan, cluster, optimizer)
    step, timeline, sent = simulated(case)
    prediction = with_sends(predicted(step, timeline), sent)
    option, pricer = case.option, case.pricer
    rename = {name: name for name in plan.mesh.names}
    params = dict(plan.params)
    for node in case.concrete.placeholders("param"):
        name = next(n for n in node.meta["fqns"] if n in plan.params)
        local = int(pricer.local_bytes(value_of(node), option[node].gives[0]))
        stored = plan.params[name]
        params[name] = replace(stored, type=type_of(value_of(node)), local_bytes=local)
    before = without_kernels(plan.predicted, plan.kernels).time_s
    same = abs(prediction.time_s - before) <= 1e-6 * before
    return replace(
        plan,
        cluster=cluster.name,
        params=params,
        predicted=prediction,
        alternatives=plan.alternatives if same else (),
        hints={str(symbol): int(size) for symbol, size in symbols.items()},
        activations=describe_activations(case.concrete, case.rules, option, pricer, rename),
        traffic=per_stage(
            describe_traffic(case.concrete, case.rules, option, pricer, rename, plan.micro_batches),
            plan.stages,
            messages_of(plan.pipeline, plan.micro_batches),
            sent,
        ),
        timeline=summarise(timeline),
    )


def check_edits(
    plan: Plan, graph: Graph, symbols: Sizes, cluster: Cluster, optimizer: str = "adamw"
) -> None:
    """Raise UserError with everything in a plan that its model cannot do on its mesh."""
    found = illegal_edits(plan, graph, symbols, cluster, optimizer)
    if not found:
        return
    more = [f"and {len(found) - MOST_SHOWN} more"] if len(found) > MOST_SHOWN else []
    listed = "".join(f"\n  - {line}" for line in (*found[:MOST_SHOWN], *more))
    raise UserError(
        f"the plan asks for what cannot be:{listed}",
        fix="correct these entries, or make a new plan with `autopar plan`",
    )


def illegal_edits(
    plan: Plan, graph: Graph, symbols: Sizes, cluster: Cluster, optimizer: str = "adamw"
) -> list[str]:
    """One sentence for every entry of a plan that its model cannot do; none if it can be run."""
    k, sizes = plan.micro_batches, dict(symbols)
    if k > 1:
        if sizes.get(BATCH, 0) % k or BATCH not in sizes:
            batch = sizes.get(BATCH, "of a fixed size")
            return [f"micro_batches is {k}, which does not divide the batch {batch}"]
        sizes[BATCH] //= k
    concrete = specialise(graph, sizes)
    rules = rules_of(concrete)
    pricer = Pricer(cluster, plan.mesh, optimizer)
    found = [*_names(plan, concrete, rules), *_stored(plan, concrete, pricer)]
    for node in concrete.calls():
        if not is_getitem(node):
            found += _chosen(node, rules[node.name], plan.choices.get(node.name, {}), pricer)
    found += _recomputed(plan, concrete)
    found += [*illegal_cuts(plan, concrete, find_blocks(concrete)), *_on_stages(plan, graph)]
    return found or list(_edges(plan, concrete, rules, pricer))


def simulated(case: Case) -> tuple[Step, Timeline, float | None]:
    """The step of a plan's fullest device over time; what it sends to other stages, in bytes."""
    if case.plan.pipeline is not None:
        made = simulate_case(case)
        return made.step, made.timeline, made.sent_bytes
    step = step_of_case(case)
    return step, simulate(step, case.cluster), None


def _on_stages(plan: Plan, graph: Graph) -> Iterator[str]:
    """What is wrong with the stages that the plan's parameters are on."""
    if plan.pipeline is None:
        return
    try:
        used = stages_of(graph, plan.pipeline.cuts, plan.stages)
    except UserError:
        return  # the cuts are wrong, and said to be
    for name, stages in used.items():
        if name in plan.params and set(plan.params[name].stages) != set(stages):
            at = list(plan.params[name].stages)
            yield f"params: {name} is on the stages {at}, and the cuts use it on {list(stages)}"


def broken_hints(plan: Plan, graph: Graph, symbols: Sizes, cluster: Cluster) -> list[str]:
    """The hints of the graph that a legal plan does not keep."""
    case = make_case(graph, symbols, plan, cluster)
    broken = {
        hint: None
        for node, option in case.option.items()
        for hint in hints_at(node)
        if not hint.allows(option.gives[0])
    }
    return [str(hint) for hint in broken]


def _on(plan: Plan, cluster: Cluster) -> Plan:
    """The plan with the levels that its mesh's axes cross on a cluster; raises UserError."""
    if plan.mesh.size != cluster.size:
        raise UserError(
            f"the plan's mesh {plan.mesh} is of {plan.mesh.size} devices, and {cluster.name} has "
            f"{cluster.size}",
            fix="change the mesh's sizes, or name another cluster",
        )
    return replace(plan, mesh=make_mesh(cluster, {a.name: a.size for a in plan.mesh}))


def _names(plan: Plan, graph: Graph, rules: Mapping[str, ShardingRule]) -> Iterator[str]:
    for name in plan.choices:
        if name not in rules:
            near = nearest(name, rules)
            yield f"choices: the model has no op {name!r}" + (f"; {near}" if near else "")
    known = [fqn for node in graph.placeholders("param") for fqn in node.meta["fqns"]]
    for name in plan.params:
        if name not in known:
            near = nearest(name, known)
            yield f"params: the model has no parameter {name!r}" + (f"; {near}" if near else "")
    for use in plan.kernels:
        if use.kernel in ON_AXES:
            continue
        places = {OPTIMIZER: None} if use.kernel == "adamw" else rules
        for name in sorted(set(use.where) - set(places)):
            near = nearest(name, places)
            yield f"kernels: {use.kernel} has no place {name!r}" + (f"; {near}" if near else "")


def _stored(plan: Plan, graph: Graph, pricer: Pricer) -> Iterator[str]:
    for node in graph.placeholders("param"):
        names = [name for name in node.meta["fqns"] if name in plan.params]
        if not names:
            yield f"params: {node.meta['fqns'][0]} is missing"
            continue
        name, value = names[0], value_of(node)
        sharding = parse_sharding(plan.params[name].sharding)
        why = _not_storable(sharding, value.int_shape(), pricer)
        if why:
            yield f"params: {name}, {type_of(value)}, as {sharding}: {why}"


def _not_storable(sharding: Sharding, shape: tuple[int, ...], pricer: Pricer) -> str:
    axes = list(sharding.used_axes())
    if sharding.rank != len(shape):
        return f"it has {len(shape)} dims, not {sharding.rank}"
    if sharding.partial or sharding.varying:
        return "a parameter is stored split or whole, not partial or varying"
    if len(set(axes)) < len(axes):
        return f"an axis splits one dim once; {max(axes, key=axes.count)} is used twice"
    if not storable(sharding, shape, pricer.mesh):
        return "only even, contiguous pieces can be stored; write a plain axis such as tp"
    for dim, (split, size) in enumerate(zip(sharding.splits, shape, strict=True)):
        if split and split.parts(pricer.mesh) > size:
            return f"dim {dim} has {size} elements for {split.parts(pricer.mesh)} devices"
    return ""


def _chosen(
    node: Node, rule: ShardingRule, texts: Mapping[str, str], pricer: Pricer
) -> Iterator[str]:
    line = node.meta.get("source", "")
    called = f"choices: {node.name}" + (f" ({line})" if line else "")
    legal = [str(choice) for choice in choices(rule)]
    chosen: dict[str, Choice] = {}
    for axis in pricer.mesh.names:
        if axis not in texts:
            continue
        choice = Choice.parse(texts[axis])
        if str(choice) not in legal:
            yield f"{called}: {axis} is {texts[axis]!r}; allowed by {rule}: {', '.join(legal)}"
            return
        if choice != REPLICATE:
            chosen[axis] = choice
    if place_call(node, rule, pricer.mesh, chosen, uneven=True) is None:
        asked = ", ".join(f"{axis}: {choice}" for axis, choice in chosen.items())
        yield f"{called}: {asked} cannot be together under {rule}"


def _recomputed(plan: Plan, graph: Graph) -> Iterator[str]:
    known = [(first.name, copies) for first, _, copies in find_blocks(graph).regions]
    for block in plan.recompute:
        if (block.block, block.copies) not in known:
            are = ", ".join(f"{name} ({copies} copies)" for name, copies in known) or "none"
            yield (
                f"recompute: no block of {block.copies} copies begins at {block.block!r}; "
                f"the model's are {are}"
            )


def _edges(
    plan: Plan, graph: Graph, rules: Mapping[str, ShardingRule], pricer: Pricer
) -> Iterator[str]:
    option: Mapping[Node, Option] = assignment_of(graph, rules, plan, pricer)
    for edge in edges_of(graph):
        made, read = option[edge.producer], option[edge.consumer]
        source, want = made.gives[edge.port], read.wants[edge.slot]
        if pricer.edge_time_s(edge.producer, edge.port, source, want) == float("inf"):
            yield (
                f"choices: {edge.consumer.name} wants {want} of {edge.producer.name}, "
                f"which gives {source}; no collective makes one of the other"
            )


def missing_sizes(plan: Plan, symbols: Sizes) -> Sequence[str]:
    """Sizes of the plan that a capture has as numbers: there its ops have other factors."""
    return sorted(set(plan.hints) - {str(symbol) for symbol in symbols})
