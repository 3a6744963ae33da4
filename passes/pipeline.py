"""The passes, in order: the table of contents of the compiler.

The first half works on the graph of all ranks, where shapes are global; `localise_shapes` turns it
into one rank's program.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import sympy

from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice, ShardingRule
from autopar.ir.sharding import Sharding
from autopar.ir.verify import verify
from autopar.kernel_use import NOWHERE, Places
from autopar.plan import Recompute

from .bucket_collectives import bucket_collectives
from .cast_before_gather import cast_before_gather
from .fuse_all_reduce_norm import fuse_all_reduce_norm
from .insert_reshards import insert_reshards
from .localise_shapes import localise_shapes
from .lower_collectives import lower_collectives
from .mark_blocks import mark_blocks
from .mark_recompute import mark_recompute, settle_recompute
from .overlap_collectives import overlap_collectives
from .propagate import propagate
from .settle_regather import settle_regather
from .specialise import specialise
from .use_kernels import use_kernels


@dataclass(frozen=True)
class Pass:
    """A pass with what it establishes and what it ends (names in `ir.verify.INVARIANTS`)."""

    name: str
    run: Callable[[Graph], Graph]
    establishes: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """What one pass left: kept for `explain`, printed for people; of which piece of a pipeline."""

    name: str
    graph: Graph
    time_s: float
    piece: int = 0


def lowering(
    mesh: Mesh,
    rank: int,
    symbols: Mapping[sympy.Symbol, int],
    rules: Callable[[Graph], Mapping[str, ShardingRule]],
    choices: Mapping[str, Mapping[str, Choice]],
    storage: Mapping[str, Sharding],
    regather: frozenset[str] = frozenset(),
    recompute: tuple[Recompute, ...] = (),
    ahead: bool = True,
    kernels: Places = NOWHERE,
) -> list[Pass]:
    """The lowering of a captured graph to the program of one rank.

    `ahead` says whether parameters that are dropped after use are gathered ahead of it, `kernels`
    where autopar's own run.
    """
    return [
        Pass("specialise", partial(specialise, symbols=symbols), ("typed", "functional")),
        Pass("mark_blocks", partial(mark_blocks, regather=regather)),
        Pass("mark_recompute", partial(mark_recompute, recompute=recompute)),
        Pass(
            "propagate",
            lambda g: propagate(g, mesh, rules(g), choices, storage, regather),
            ("axis_used_once", "axes_exist"),
        ),
        Pass("settle_regather", partial(settle_regather, mesh=mesh)),
        Pass("cast_before_gather", partial(cast_before_gather, mesh=mesh)),
        Pass("insert_reshards", insert_reshards, ("resharded",)),
        Pass("lower_collectives", partial(lower_collectives, mesh=mesh), ("types_follow",)),
        Pass("bucket_collectives", partial(bucket_collectives, mesh=mesh)),
        Pass("settle_recompute", partial(settle_recompute, mesh=mesh)),
        Pass(
            "localise_shapes",
            partial(localise_shapes, mesh=mesh, rank=rank),
            ends=("resharded", "types_follow", "typed"),
        ),
        Pass("overlap_collectives", partial(overlap_collectives, ahead=ahead)),
        *with_kernels(mesh, kernels),
    ]


def with_kernels(mesh: Mesh, kernels: Places) -> list[Pass]:
    """The passes that use kernels, where there are any."""
    if not kernels:
        return []
    return [
        Pass("fuse_all_reduce_norm", partial(fuse_all_reduce_norm, places=kernels)),
        Pass(
            "use_kernels",
            partial(use_kernels, mesh=mesh, places=kernels),
            ("topological", "kernels_fit"),
        ),
    ]


def last_of(graph: Graph, passes: list[Pass]) -> Graph:
    """What the passes make of a graph, on one copy of it and unverified: for counting.

    Copies and verification are most of what lowering takes.
    """
    graph = graph.copy()
    for step in passes:
        graph = step.run(replace(graph, spent=True))
    return replace(graph, spent=False)


def run_passes(graph: Graph, passes: list[Pass], mesh: Mesh) -> list[Stage]:
    """Run the passes in order; after each, every live invariant is verified.

    Raises PassError naming the pass, the invariant and the node. Returns every intermediate graph,
    the input first.
    """
    stages = [Stage("capture", graph, 0.0)]
    live: dict[str, None] = {}
    for step in passes:
        start = time.perf_counter()
        graph = step.run(graph)
        stages.append(Stage(step.name, graph, time.perf_counter() - start))
        for name in step.ends:
            live.pop(name, None)
        live.update(dict.fromkeys(step.establishes))
        verify(graph, mesh, tuple(live), pass_name=step.name)
    return stages
