"""One-process simulation of a step on micro-batches: every rank's programs, run on threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autopar.ir.lowered import GroupRef
from autopar.ir.mesh import Mesh
from autopar.ir.step import StepGraphs
from autopar.passes.lower_step import lower_part, micro_batched
from autopar.passes.rules_of import rules_of
from autopar.runtime.group import Group
from autopar.runtime.step import LocalEngine, Step, load_part
from autopar.runtime.thread_world import ThreadWorld, run_threads
from tests.simulate import (
    SEED,
    Decisions,
    Loss,
    RankResult,
    Result,
    Subject,
    leaves_of,
    together,
)


def step_graphs(
    subject: Subject,
    sizes: Mapping[Any, int],
    decisions: Decisions,
    micro_batches: int,
    statistics: bool = False,
) -> list[StepGraphs]:
    """The programs of every rank."""
    d = decisions
    followed = micro_batched(
        subject.graph,
        d.mesh,
        micro_batches,
        sizes,
        rules_of,
        d.choices,
        d.storage,
        d.regather,
        d.recompute,
        statistics,
    )
    return [
        lower_part(followed, followed.graph, rank, d.storage, d.regather).graphs
        for rank in range(d.mesh.size)
    ]


def groups_of(
    graphs: StepGraphs, mesh: Mesh, world: ThreadWorld, rank: int
) -> dict[tuple[str, ...], Group]:
    args: list[Any] = [
        a
        for graph in (graphs.prologue, graphs.body, graphs.tail)
        for n in graph.calls()
        for a in (*n.args, *n.kwargs.values())
    ]
    return {
        arg.axes: world.group(rank, mesh.group(rank, arg.axes), "&".join(arg.axes))
        for arg in args
        if isinstance(arg, GroupRef)
    }


def simulate_step(
    subject: Subject,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Loss,
    decisions: Decisions,
    micro_batches: int,
    seed: int = SEED,
    statistics: bool = False,
) -> Result:
    """Loss, gradients and buffers of one step in micro-batches on all ranks.

    Raises AssertionError where ranks that hold the same piece disagree.
    """
    inputs = subject.capture.flatten(tuple(args), dict(kwargs))
    sizes = subject.capture.bind(inputs)
    assert sizes is not None, "the capture does not cover this batch"
    mesh = decisions.mesh
    graphs = step_graphs(subject, sizes, decisions, micro_batches, statistics)
    world = ThreadWorld(mesh.size)
    buffers = dict(subject.module.named_buffers(remove_duplicate=False))
    read = [n.meta["fqns"][0] for n in subject.graph.placeholders("input")]

    def one_rank(rank: int) -> RankResult:
        part = load_part(graphs[rank], groups_of(graphs[rank], mesh, world, rank))
        step = Step([part], LocalEngine(), micro_batches)
        leaves = leaves_of(subject, decisions, rank)
        given: dict[tuple[str, str], Any] = {
            **{("input", name): x.clone() for name, x in zip(read, inputs, strict=True)},
            **{("buffer", name): b.clone() for name, b in buffers.items()},
            ("seed", "rng_seed"): seed,
        }
        outputs, updates = step.run(leaves, given)
        value = loss(subject.capture.unflatten(outputs))
        value.backward()  # type: ignore[no-untyped-call]
        made = {name: b.detach() for name, b in {**buffers, **updates}.items()}
        return value.detach(), {fqn: p.grad for fqn, p in leaves.items()}, made

    return together(subject, decisions, run_threads(world, one_rank))
