"""One-process simulation of a step on micro-batches: every rank's programs, run on threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.ir.lowered import GroupRef
from autopar.ir.mesh import Mesh
from autopar.ir.step import StepGraphs
from autopar.passes.lower_step import lower_part, micro_batched
from autopar.passes.rules_of import rules_of
from autopar.runtime.group import Group, ThreadWorld, run_threads
from autopar.runtime.placements import local_shard
from autopar.runtime.step import LocalEngine, Step, load_part
from tests.simulate import SEED, Decisions, Loss, Result, Subject, assemble


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
    parameters = dict(subject.module.named_parameters(remove_duplicate=False))
    buffers = dict(subject.module.named_buffers(remove_duplicate=False))
    names = {n.meta["fqns"][0]: n.name for n in subject.graph.placeholders("param")}
    read = [n.meta["fqns"][0] for n in subject.graph.placeholders("input")]

    def one_rank(rank: int) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
        part = load_part(graphs[rank], groups_of(graphs[rank], mesh, world, rank))
        step = Step([part], LocalEngine(), micro_batches)
        leaves = {
            fqn: local_shard(parameters[fqn], decisions.storage[name], mesh, rank).requires_grad_(
                parameters[fqn].requires_grad
            )
            for fqn, name in names.items()
            if name in decisions.storage
        }
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

    results = run_threads(world, one_rank)
    gradients = {}
    for fqn, name in names.items():
        shards = [gradients_of[fqn] for _, gradients_of, _ in results]
        shape = parameters[fqn].shape
        gradients[fqn] = assemble(shards, shape, decisions.storage[name], mesh, fqn)
    for value, _, made in results:
        torch.testing.assert_close(value, results[0][0], rtol=1e-12, atol=1e-12)
        for name, buffer in made.items():
            torch.testing.assert_close(buffer, results[0][2][name], rtol=1e-12, atol=1e-12)
    return Result(results[0][0], gradients, results[0][2])
