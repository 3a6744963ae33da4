"""From a run's plan to a priced step of one pipeline stage's layer, through the planner."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from autopar.capture import capture
from autopar.cost.cluster import make_mesh
from autopar.ir.graph import Graph
from autopar.ir.rule import ShardingRule
from autopar.passes.blocks import Blocks, find_blocks
from autopar.passes.prepare import prepare
from autopar.passes.rules_of import rules_of
from autopar.passes.specialise import specialise
from autopar.passes.step_of import step_of

from .assemble import Layered
from .force import Axes, Forced, axes_of, solve_forced
from .models import Shape, build
from .plan_of import RunPlan
from .pricing import PublishedPricer


@lru_cache(maxsize=4)
def captured(shape: Shape) -> tuple[Graph, Mapping[object, int]]:
    """The module's graph with a symbolic batch; the sequence and the widths are numbers."""
    module, arguments = build(shape, 4)
    made = capture(module, arguments, {})
    return prepare(made.graph), made.symbols


@lru_cache(maxsize=8)
def sized(shape: Shape, batch: int) -> tuple[Graph, Mapping[str, ShardingRule], Blocks, Axes]:
    """The graph at one batch, with its rules, its repeated block, and what its factors are."""
    graph, symbols = captured(shape)
    concrete = specialise(graph, dict.fromkeys(symbols, batch))
    rules = rules_of(concrete)
    return concrete, rules, find_blocks(concrete), axes_of(concrete, rules)


def layered(plan: RunPlan) -> Layered:
    """The priced parts of one stage: a layer, what comes before the layers and what comes after.

    Solves a two-layer model on one stage's mesh for one micro-batch. Raises UserError where the
    module cannot be captured or the plan cannot be forced.
    """
    graph, rules, blocks, axes = sized(plan.shape, plan.micro_batch * plan.row.dp)
    names = [name for name, size in plan.sizes.items() if size > 1] or ["dp"]
    mesh = make_mesh(plan.cluster, {name: plan.sizes[name] for name in names})
    forced = Forced(
        {name: plan.role[name] for name in names},
        axes,
        plan.sharded & set(names),
        plan.regather,
        plan.sequence_parallel,
    )
    pricer = PublishedPricer(plan.cluster, mesh, plan.pricing, forced.never_gather)
    solved = solve_forced(graph, rules, blocks, forced, pricer)
    step = step_of(graph, blocks, solved.option, pricer, plan.micro_batches)
    owner = {"first": [0.0, 0.0], "layer": [0.0, 0.0], "last": [0.0, 0.0]}
    for node, option in solved.option.items():
        if node.meta.get("role") != "param":
            continue
        name = node.meta["fqns"][0]
        kind = "layer" if name.startswith("blocks.") else "first"
        if name.startswith(("norm.", "head.")):
            kind = "last"
        share = 1 / plan.shape.layers if kind == "layer" else 1.0
        owner[kind][0] += option.memory_bytes * share
        owner[kind][1] += option.time_s * share
    segments = step.segments
    return Layered(
        segments[0],
        segments[-2],
        segments[-1],
        *(owner[kind][0] for kind in ("first", "layer", "last")),
        *(owner[kind][1] for kind in ("first", "layer", "last")),
    )
