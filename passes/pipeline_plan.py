"""Pipelines in plans: which stages use a parameter, and the cuts of another capture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch.fx

from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.ir.mesh import Axis, Mesh
from autopar.plan import PIPELINE_AXIS, Pipeline, Plan

from .columns import is_getitem
from .cut_points import crossing_values
from .pieces import cut_graph

Node = torch.fx.Node


def with_pipeline(
    plan: Plan,
    graph: Graph,
    stages: int,
    cuts: Sequence[str],
    micro_batches: int,
    schedule: str = "1f1b",
    level: int = 0,
) -> Plan:
    """A plan for one stage's devices as the plan of a pipeline of so many stages.

    `graph` is the prepared captured graph; `level` is the cluster level that stages communicate
    over. The plan's predictions stay what they were. Raises UserError where the cuts do not fit.
    """
    chunks = (len(cuts) + 1) // stages
    used = stages_of(graph, cuts, stages)
    return replace(
        plan,
        mesh=Mesh((Axis(PIPELINE_AXIS, stages, level), *plan.mesh.axes)),
        pipeline=Pipeline(schedule, tuple(cuts), chunks),
        micro_batches=micro_batches,
        params={
            name: replace(stored, stages=used.get(name, (0,)))
            for name, stored in plan.params.items()
        },
        timeline=None,
    )


def stages_of(graph: Graph, cuts: Sequence[str], stages: int) -> dict[str, tuple[int, ...]]:
    """The stages that use every parameter, by its first name, the owner first.

    One that no op reads is on the first stage. Raises UserError where the cuts do not fit.
    """
    found: dict[str, dict[int, None]] = {}
    for node in graph.placeholders("param"):
        found[node.meta["fqns"][0]] = {}
    for i, piece in enumerate(cut_graph(graph, cuts)):
        for node in piece.graph.placeholders("param"):
            found[node.meta["fqns"][0]][i % stages] = None
    return {name: tuple(used) or (0,) for name, used in found.items()}


def matching_cuts(graph: Graph, plan: Plan) -> tuple[str, ...]:
    """Where the plan cuts a capture that is not the one it was made for: evaluation, say.

    The nodes of the plan's cuts where they have the plan's parameters on both sides, else where
    ops begin to read parameters of the next stage. Raises UserError where the model's parameters
    are read in another order than the stages have them.
    """
    assert plan.pipeline is not None
    owners = {name: stored.stages for name, stored in plan.params.items()}
    cuts = plan.pipeline.cuts
    names = {node.name for node in graph.calls()}
    if names.issuperset(cuts):
        try:
            used = stages_of(graph, cuts, plan.stages)
        except UserError:
            used = {}
        if used and all(set(used[n]) <= set(owners.get(n, used[n])) for n in used):
            return cuts
    return _cuts_by_parameters(graph, owners, plan.stages, plan.pipeline.pieces)


def _cuts_by_parameters(
    graph: Graph, owners: Mapping[str, tuple[int, ...]], stages: int, pieces: int
) -> tuple[str, ...]:
    calls = list(graph.calls())
    crossing = [len(values) for values in crossing_values(graph)]
    here, since = 0, 0  # the piece, and the last op that had to be in it
    bound = 0  # the last op whose parameters no later piece has
    cuts: list[str] = []
    for i, node in enumerate(calls):
        wanted = _stages_read(node, owners)
        if wanted is None:
            continue
        ahead = [p for p in range(here + 1, pieces) if p % stages in wanted]
        if here % stages in wanted:
            since, bound = i, bound if ahead else i
            continue
        if not ahead:
            continue  # as with tied parameters: its value is sent to where it is read
        free = [j for j in range(since + 1, i + 1) if not is_getitem(calls[j])]
        narrow = sorted(free, key=lambda j: (crossing[j], j))
        steps = ahead[0] - here
        if len(narrow) < steps:
            break
        cuts.extend(calls[j].name for j in sorted(narrow[:steps]))
        here, since, bound = ahead[0], i, i
    else:  # the last pieces have no parameters but those that earlier ones read, too
        steps = pieces - 1 - here
        free = [j for j in range(bound + 1, len(calls)) if not is_getitem(calls[j])]
        if 0 < steps <= len(free):
            narrow = sorted(free, key=lambda j: (crossing[j], j))
            cuts.extend(calls[j].name for j in sorted(narrow[:steps]))
            here = pieces - 1
    if here < pieces - 1:
        raise UserError(
            f"the model cannot be cut into {pieces} pieces as the plan has it: in this mode it "
            "uses its parameters in another order",
            fix="plan without a pipeline",
        )
    return tuple(cuts)


def _stages_read(node: Node, owners: Mapping[str, tuple[int, ...]]) -> frozenset[int] | None:
    """The stages that have all parameters an op reads; None if it reads none."""
    read = [
        frozenset(owners[name])
        for source in node.all_input_nodes
        if source.op == "placeholder" and source.meta["role"] == "param"
        for name in source.meta["fqns"][:1]
        if name in owners
    ]
    return frozenset.intersection(*read) if read else None
