"""A plan with a pipeline at one setting: its chain, cut as the plan says, and simulated."""

from __future__ import annotations

from collections.abc import Iterator

from autopar.cost.schedules import KINDS, Schedule
from autopar.cost.simulator import How
from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.plan import PIPELINE_AXIS, Plan

from .blocks import Blocks
from .case import Case
from .cut_points import units_at
from .hints import nearest
from .pipelined import runs
from .simulate_cuts import CutSimulator, Simulated
from .stage_steps import chain_of


def simulate_case(case: Case, how: How | None = None) -> Simulated:
    """The pipeline of a plan on its cluster; raises UserError where its cuts do not fit."""
    plan = case.plan
    assert plan.pipeline is not None
    problems = list(illegal_cuts(plan, case.concrete, case.layers))
    if problems:
        raise UserError(problems[0], fix="make a new plan with `autopar plan`")
    cuts = plan.pipeline.cuts
    units = units_at(case.concrete, case.layers, cuts)
    chain = chain_of(
        case.concrete,
        case.layers,
        units,
        case.option,
        case.pricer,
        plan.micro_batches,
        case.given_bytes,
    )
    numbers = {first.name: r for r, (first, _, _) in enumerate(case.layers.regions)}
    shares = {numbers[r.block]: (r.full, r.selective) for r in plan.recompute if r.block in numbers}
    names = [unit.name for unit in units]
    starts = [0, *(names.index(cut) for cut in cuts)]
    schedule = Schedule(plan.stages, plan.pipeline.chunks, plan.pipeline.schedule)
    simulator = CutSimulator(case.cluster, case.pricer.mesh[PIPELINE_AXIS].level, how)
    return simulator.simulate(chain.recomputed(shares), schedule, starts)


def illegal_cuts(plan: Plan, graph: Graph, blocks: Blocks) -> Iterator[str]:
    """One sentence for everything in a plan's pipeline that its model cannot do."""
    if plan.pipeline is None:
        return
    names = [node.name for node in graph.calls()]
    for cut in plan.pipeline.cuts:
        if cut not in names:
            near = nearest(cut, names)
            yield f"pipeline: the model has no op {cut!r}" + (f"; {near}" if near else "")
            return
    try:
        units_at(graph, blocks, plan.pipeline.cuts)
    except ValueError as error:
        yield f"pipeline: {error}"
    kind, p, m = plan.pipeline.schedule, plan.stages, plan.micro_batches
    if kind in KINDS and not runs(kind, p, m):
        yield (
            f"pipeline: {kind} on {p} stages does not run {m} micro-batches; a multiple of {p} does"
        )
