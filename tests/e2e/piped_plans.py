"""Plans with a pipeline for models of the zoo, made without a search over pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from autopar.capture import Capture, capture
from autopar.cost.cluster import parse_cluster
from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding
from autopar.passes.blocks import find_blocks
from autopar.passes.cut_points import units_of
from autopar.passes.lower_step import why_not_micro_batched
from autopar.passes.pipeline_plan import with_pipeline
from autopar.passes.prepare import prepare
from autopar.passes.search import search
from autopar.passes.specialise import specialise
from autopar.plan import Plan, Prediction, Storage

SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1}  # chunks of each

# Stages, what is done inside of them, and the schedule, on four ranks.
PIPED: Mapping[str, tuple[int, str, str]] = {
    "pipeline/1f1b": (4, "data", "1f1b"),
    "pipeline/interleaved": (4, "data", "interleaved"),
    "pipeline/zero_bubble": (4, "data", "zero_bubble"),
    "pipeline+data/gpipe": (2, "data", "gpipe"),
    "pipeline+data/interleaved": (2, "data", "interleaved"),
    "pipeline+zero/1f1b": (2, "zero", "1f1b"),
    "pipeline+tensor/1f1b": (2, "tensor", "1f1b"),
    "pipeline+tensor/zero_bubble": (2, "tensor", "zero_bubble"),
}
MICRO_BATCHES = 4


def piped_case(name: str, strategy: str, dtype: str, ranks: int = 4) -> Plan:
    """The plan of a model of the zoo under one of `PIPED`, of as many stages on fewer ranks.

    Batch normalisation and the like run in one micro-batch. Raises UserError where the model has no
    such stages, and where its loss is outside.
    """
    from tests.e2e.training import MODELS

    stages, family, schedule = PIPED[strategy]
    if MODELS[name].target is not None:
        raise UserError("the loss is computed outside of the model")
    captured = zoo_capture(name, dtype)
    whole = why_not_micro_batched(prepare(captured.graph), captured.symbols) is not None
    if whole:
        schedule, micro_batches = "gpipe", 1
    else:
        micro_batches = MICRO_BATCHES
    return piped_plan(captured, min(stages, ranks), ranks, family, schedule, micro_batches)


def whole_plan(captured: Capture, graph: Graph) -> Plan:
    """The plan of one device."""
    params = {
        node.meta["fqns"][0]: Storage(str(Sharding.replicated(node.meta["value"].rank)))
        for node in graph.placeholders("param")
    }
    nothing = Prediction(0.0, 0.0, 0.0, 0.0, 0)
    return Plan(captured.fingerprint, Mesh(()), "cpu:1", "auto", {}, params, nothing)


def piped_plan(
    captured: Capture,
    stages: int,
    devices: int,
    family: str = "data",
    schedule: str = "1f1b",
    micro_batches: int = 4,
) -> Plan:
    """A pipeline of even numbers of units, with a named strategy inside of its stages.

    Raises UserError where the strategy does not apply, or the model has fewer units than pieces.
    """
    graph = prepare(captured.graph)
    inner = devices // stages
    if inner == 1:
        flat = whole_plan(captured, graph)
    else:
        flat = search(
            graph,
            captured.fingerprint,
            captured.symbols,
            parse_cluster(f"cpu:{inner}"),
            strategy=family,
        )
    pieces = stages * SCHEDULES[schedule]
    return with_pipeline(
        flat, graph, stages, even_cuts(graph, captured, pieces), micro_batches, schedule
    )


def even_cuts(graph: Graph, captured: Capture, pieces: int) -> list[str]:
    """The first nodes of all pieces but the first, of as many units each as can be."""
    whole = specialise(graph, captured.symbols)
    units = units_of(whole, find_blocks(whole), pieces)
    if len(units) < pieces:
        raise UserError(f"the model has {len(units)} units, fewer than {pieces} pieces")
    return [units[round(i * len(units) / pieces)].name for i in range(1, pieces)]


@cache
def zoo_capture(name: str, dtype: str) -> Capture:
    """The training capture of a model of the zoo."""
    from tests.e2e.training import DTYPES, MODELS, build

    entry = MODELS[name]
    args, kwargs = entry.inputs(0, DTYPES[dtype])
    with torch.enable_grad():
        return capture(build(entry, dtype), args, kwargs)
