"""The lowering of a step on micro-batches: three programs in place of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import sympy

from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice, ShardingRule
from autopar.ir.sharding import Sharding
from autopar.ir.step import StepGraphs
from autopar.ir.verify import verify
from autopar.kernel_use import NOWHERE, Places
from autopar.plan import Recompute

from .bucket_collectives import bucket_collectives
from .cast_before_gather import cast_before_gather
from .follow_micro_batches import Followed, batch_size, follow_micro_batches, with_micro_batches
from .insert_reshards import insert_reshards
from .localise_shapes import localise_shapes
from .lower_collectives import lower_collectives
from .mark_blocks import mark_blocks
from .mark_recompute import mark_recompute, settle_recompute
from .number_random_calls import number_random_calls
from .overlap_collectives import overlap_collectives
from .pieces import Boundary
from .pipeline import Pass, Stage, run_passes, with_kernels
from .propagate import propagate
from .rules_of import rules_of
from .settle_regather import settle_regather
from .shorten_blocks import shorten_blocks
from .specialise import specialise
from .spell_out_means import spell_out_means
from .split_step import check_even, split_step

Rules = Callable[[Graph], Mapping[str, ShardingRule]]
Choices = Mapping[str, Mapping[str, Choice]]


@dataclass(frozen=True)
class Lowered:
    """One rank's step, and what every pass left (those of the body, after the split)."""

    graphs: StepGraphs
    stages: tuple[Stage, ...]


def micro_batched(
    graph: Graph,
    mesh: Mesh,
    micro_batches: int,
    sizes: Mapping[sympy.Symbol, int],
    rules: Rules,
    choices: Choices,
    storage: Mapping[str, Sharding],
    regather: frozenset[str] = frozenset(),
    recompute: tuple[Recompute, ...] = (),
    statistics: bool = False,
) -> Followed:
    """A captured graph for a batch of `sizes`, whose ops say what they do on the axis `mb`.

    The whole model, before it is cut into pieces, if it is. Raises UserError as
    `follow_micro_batches` does.
    """
    whole = specialise(graph, sizes)
    whole = mark_recompute(mark_blocks(whole, regather), recompute)
    whole = number_random_calls(spell_out_means(whole))
    known = rules(whole)
    on = with_micro_batches(mesh, micro_batches)
    return follow_micro_batches(whole, on, known, choices, storage, graph, statistics)


def lower_part(
    followed: Followed,
    graph: Graph,
    rank: int,
    storage: Mapping[str, Sharding],
    regather: frozenset[str] = frozenset(),
    ahead: bool = True,
    sends: Boundary | None = None,
    kernels: Places = NOWHERE,
) -> Lowered:
    """One rank's programs of a step, or of a piece of the model in it.

    `graph` is that of `followed`, or a piece cut from it; `storage` also has the shardings, on `mb`
    too, of what a piece receives. Raises UserError as `split_step` does.
    """
    mesh = followed.mesh
    common = [
        Pass(
            "propagate",
            lambda g: propagate(
                g, mesh, followed.rules, followed.choices, storage, regather, sends
            ),
            ("typed", "functional", "axis_used_once", "axes_exist"),
        ),
        Pass("settle_regather", partial(settle_regather, mesh=mesh)),
        Pass("cast_before_gather", partial(cast_before_gather, mesh=mesh)),
        Pass("insert_reshards", insert_reshards, ("resharded",)),
        Pass("lower_collectives", partial(lower_collectives, mesh=mesh), ("types_follow",)),
    ]
    stages = run_passes(graph, common, mesh)
    check_even(stages[-1].graph, mesh)
    made = split_step(stages[-1].graph, mesh, sends is not None)
    own = _own_passes(mesh, rank, ahead, kernels)
    found = []
    for part in (made.prologue, made.tail, made.body):
        verify(part, mesh, ("typed", "topological", "no_micro_batch_axis"), "split_step")
        found.append(run_passes(part, own, mesh))
    prologue, tail, body = (each[-1].graph for each in found)
    stages = [*stages, Stage("split_step", made.body, 0.0), *found[-1][1:]]
    return Lowered(replace(made, prologue=prologue, body=body, tail=tail), tuple(stages))


def _own_passes(mesh: Mesh, rank: int, ahead: bool, kernels: Places) -> list[Pass]:
    """What is done to each of the three programs."""
    return [
        Pass("bucket_collectives", partial(bucket_collectives, mesh=mesh)),
        Pass("settle_recompute", partial(settle_recompute, mesh=mesh)),
        Pass(
            "localise_shapes",
            partial(localise_shapes, mesh=mesh, rank=rank),
            ("no_micro_batch_axis",),
        ),
        Pass("overlap_collectives", partial(overlap_collectives, ahead=ahead)),
        *with_kernels(mesh, kernels),
    ]


def why_not_micro_batched(
    graph: Graph, sizes: Mapping[sympy.Symbol, int], statistics: bool = False
) -> str | None:
    """Why the training step of a captured graph cannot run in micro-batches; None if it can.

    `statistics` says whether batch normalisation may take those of a micro-batch. Repeated blocks
    are looked at in a few of their copies.
    """
    batch = batch_size(sizes)
    if batch is None or batch < 2:
        return "the batch has one row, or a size that forward fixes"
    count = next(k for k in range(2, batch + 1) if batch % k == 0)
    graph = shorten_blocks(graph)
    try:
        followed = micro_batched(
            graph, Mesh(()), count, sizes, rules_of, {}, {}, statistics=statistics
        )
        common = insert_reshards(
            propagate(followed.graph, followed.mesh, followed.rules, followed.choices, {})
        )
        split_step(lower_collectives(common, followed.mesh), followed.mesh)
    except UserError as error:
        where = f" ({error.where})" if error.where else ""
        return f"{error.what}{where}"
    return None
