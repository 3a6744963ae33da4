"""One-process simulation: a module's plan, lowered for every rank and run on threads.

`simulate` gives what all ranks together computed: the loss, whole gradients (put together from the
shards of all ranks, replicas compared) and new buffers. `single_device` gives what the undecorated
module computes, and `assert_equivalent` compares the two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from autopar.capture import Capture, capture
from autopar.cost.cluster import Cluster, parse_cluster
from autopar.ir.graph import Graph
from autopar.ir.lowered import GroupRef
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_sharding
from autopar.ir.rule import Choice, ShardingRule
from autopar.ir.sharding import Sharding
from autopar.kernel_use import NOWHERE, Places
from autopar.passes.pipeline import lowering, run_passes
from autopar.passes.prepare import prepare
from autopar.passes.rules_of import rules_of
from autopar.passes.search import search
from autopar.passes.specialise import specialise
from autopar.plan import Plan, Recompute
from autopar.runtime.eager_random import PartitionInvariantDropout
from autopar.runtime.group import Group
from autopar.runtime.placements import local_shard
from autopar.runtime.program import Program, load_program
from autopar.runtime.thread_world import ThreadWorld, run_threads
from tests.zoo import ZOO, Entry

SEED = 20240607
TOLERANCE = 1e-9

Choices = Mapping[str, Mapping[str, Choice]]
Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Decisions:
    """What the lowering needs of a plan; `storage` and `regather` are by placeholder name."""

    mesh: Mesh
    choices: Choices
    storage: Mapping[str, Sharding]
    regather: frozenset[str] = frozenset()
    recompute: tuple[Recompute, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A module in float64 with its capture, prepared for planning."""

    module: nn.Module
    capture: Capture

    @property
    def graph(self) -> Graph:
        return self.capture.graph


@dataclass(frozen=True)
class Result:
    """Loss, whole gradients by the parameter's first name, and buffers by theirs."""

    loss: Tensor
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor]


def subject_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Subject:
    """Capture a module on a batch."""
    made = capture(module, tuple(args), dict(kwargs))
    return Subject(module, replace(made, graph=prepare(made.graph)))


def module_of(entry: Entry, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A zoo entry's module in float64, the same at every call."""
    torch.manual_seed(0)
    return entry.double((build or entry.build)())


@cache
def zoo_subject(name: str, batch_size: int | None = None) -> Subject:
    """A zoo entry captured in float64 at its usual batch size (symbolic where it can be)."""
    entry = ZOO[name]
    args, kwargs = entry.inputs(0, torch.float64, batch_size)
    return subject_of(module_of(entry), args, kwargs)


def zoo_loss(entry: Entry, batch_size: int | None = None, step: int = 0) -> Loss:
    """The entry's loss as a function of the module's output alone."""
    if entry.target is None:
        return entry.loss
    target = entry.target(step, batch_size or entry.batch_size)
    target = target.double() if target.is_floating_point() else target
    return lambda output: entry.loss(output, target)


def cpu(ranks: int) -> Cluster:
    return parse_cluster(f"cpu:{ranks}")


def plan_of(subject: Subject, ranks: int, strategy: str = "auto", **options: Any) -> Plan:
    """The search's plan for a captured module on `ranks` CPU ranks."""
    made = subject.capture
    return search(
        made.graph, made.fingerprint, made.symbols, cpu(ranks), strategy=strategy, **options
    )


def decisions_of(subject: Subject, plan: Plan) -> Decisions:
    """What a plan decides, in terms of the captured graph."""
    storage: dict[str, Sharding] = {}
    regather: set[str] = set()
    for node in subject.graph.placeholders("param"):
        stored = plan.params[node.meta["fqns"][0]]
        storage[node.name] = parse_sharding(stored.sharding)
        if stored.regather:
            regather.add(node.name)
    choices = {
        name: {axis: Choice.parse(text) for axis, text in chosen.items()}
        for name, chosen in plan.choices.items()
    }
    return Decisions(plan.mesh, choices, storage, frozenset(regather), plan.recompute)


# Running --------------------------------------------------------------------------------------


def single_device(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Loss,
    seed: int = SEED,
) -> Result:
    """Forward and backward of the undecorated module; dropout draws the masks of `seed`."""
    twin = copy.deepcopy(module)
    twin.zero_grad(set_to_none=True)
    with PartitionInvariantDropout(seed):
        value = loss(twin(*args, **dict(kwargs)))
    value.backward()  # type: ignore[no-untyped-call]
    return Result(
        value.detach(),
        {name: p.grad for name, p in twin.named_parameters()},
        {name: b.detach() for name, b in twin.named_buffers()},
    )


def leaves_of(subject: Subject, decisions: Decisions, rank: int) -> dict[str, Tensor]:
    """A rank's pieces of the parameters, by name: leaves that want a gradient as the whole does."""
    parameters = dict(subject.module.named_parameters(remove_duplicate=False))
    return {
        fqn: local_shard(
            parameters[fqn], decisions.storage[name], decisions.mesh, rank
        ).requires_grad_(parameters[fqn].requires_grad)
        for fqn, name in names_of(subject).items()
        if name in decisions.storage
    }


def names_of(subject: Subject) -> dict[str, str]:
    """The placeholder of every parameter, by its first name."""
    return {n.meta["fqns"][0]: n.name for n in subject.graph.placeholders("param")}


RankResult = tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]


def together(subject: Subject, decisions: Decisions, results: Sequence[RankResult]) -> Result:
    """Loss, gradients and buffers of all ranks; raises AssertionError where they disagree."""
    parameters = dict(subject.module.named_parameters(remove_duplicate=False))
    gradients = {}
    for fqn, name in names_of(subject).items():
        shards = [gradients_of[fqn] for _, gradients_of, _ in results]
        shape = parameters[fqn].shape
        gradients[fqn] = assemble(shards, shape, decisions.storage[name], decisions.mesh, fqn)
    for value, _, made in results:
        torch.testing.assert_close(value, results[0][0], rtol=1e-12, atol=1e-12)
        for name, buffer in made.items():
            torch.testing.assert_close(buffer, results[0][2][name], rtol=1e-12, atol=1e-12)
    return Result(results[0][0], gradients, results[0][2])


def simulate(
    subject: Subject,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Loss,
    decisions: Decisions,
    seed: int = SEED,
    rules: Mapping[str, ShardingRule] | None = None,
    kernels: Places = NOWHERE,
) -> Result:
    """Loss, gradients and buffers of one step on all ranks of the decisions' mesh.

    Every rank's program is lowered with all invariants verified. Raises AssertionError where
    ranks that hold the same piece disagree.
    """
    inputs = subject.capture.flatten(tuple(args), dict(kwargs))
    sizes = subject.capture.bind(inputs)
    assert sizes is not None, "the capture does not cover this batch"
    mesh = decisions.mesh
    graphs = lower_all(subject.graph, sizes, decisions, rules, kernels=kernels)
    world = ThreadWorld(mesh.size)
    buffers = dict(subject.module.named_buffers(remove_duplicate=False))

    def one_rank(rank: int) -> RankResult:
        program = load_program(graphs[rank], groups_of(graphs[rank], mesh, world, rank))
        leaves = leaves_of(subject, decisions, rank)
        outputs = program.run(*_arguments(program, leaves, buffers, inputs, seed))
        user = outputs[: program.outputs]
        value = loss(subject.capture.unflatten(user))
        value.backward()  # type: ignore[no-untyped-call]
        new = dict(zip(program.mutated, outputs[program.outputs :], strict=True))
        made = {name: b.detach() for name, b in {**buffers, **new}.items()}
        return value.detach(), {fqn: p.grad for fqn, p in leaves.items()}, made

    return together(subject, decisions, run_threads(world, one_rank))


def _arguments(
    program: Program,
    leaves: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    seed: int,
) -> list[Any]:
    """The values of a program's placeholders; every rank has its own copy of the batch."""
    queue = iter(inputs)
    found: list[Any] = []
    for role, names in program.placeholders:
        if role == "param":
            found.append(leaves[names[0]])
        elif role == "buffer":
            found.append(buffers[names[0]].clone())
        elif role == "constant":
            found.append(program.constants[names[0]])
        elif role == "seed":
            found.append(seed)
        else:
            found.append(next(queue).clone())
    return found


def lower_all(
    graph: Graph,
    sizes: Mapping[sympy.Symbol, int],
    decisions: Decisions,
    rules: Mapping[str, ShardingRule] | None = None,
    ahead: bool = True,
    kernels: Places = NOWHERE,
) -> list[Graph]:
    """Every rank's program; the passes before `localise_shapes` run once, as they are the same."""
    mesh, known = decisions.mesh, rules
    made = []
    common: Graph | None = None
    for rank in range(mesh.size):
        passes = lowering(
            mesh,
            rank,
            sizes,
            (lambda g: known) if known is not None else rules_of,
            decisions.choices,
            decisions.storage,
            decisions.regather,
            decisions.recompute,
            ahead,
            kernels,
        )
        cut = next(i for i, p in enumerate(passes) if p.name == "localise_shapes")
        if common is None:
            common = run_passes(graph, passes[:cut], mesh)[-1].graph
        made.append(run_passes(common, passes[cut:], mesh)[-1].graph)
    orders = [_order(graph) for graph in made]
    assert orders.count(orders[0]) == len(orders), "ranks differ in the order of their ops"
    return made


def _order(graph: Graph) -> list[tuple[str, list[str]]]:
    """Ops and what they read, in order: in the backward, too, collectives follow it."""
    return [(n.name, [i.name for i in n.all_input_nodes]) for n in graph.fx.nodes]


def groups_of(
    graph: Graph, mesh: Mesh, world: ThreadWorld, rank: int
) -> dict[tuple[str, ...], Group]:
    """Groups of simulated ranks for every `GroupRef` of a program."""
    args: list[Any] = [a for n in graph.calls() for a in (*n.args, *n.kwargs.values())]
    return {
        arg.axes: world.group(rank, mesh.group(rank, arg.axes), "&".join(arg.axes))
        for arg in args
        if isinstance(arg, GroupRef)
    }


def assemble(
    shards: Sequence[Tensor | None],
    shape: Sequence[int],
    sharding: Sharding,
    mesh: Mesh,
    name: str = "",
) -> Tensor | None:
    """The whole tensor from every rank's piece; replicas must agree, all elements must be there."""
    present = [shard for shard in shards if shard is not None]
    if not present:
        return None
    whole = torch.full(tuple(shape), math.nan, dtype=present[0].dtype)
    scale = max((float(s.abs().max()) for s in present if s.numel()), default=0.0)
    for rank, shard in enumerate(shards):
        here = mesh.coordinates(rank)
        index = [
            torch.tensor([i for run in split.runs(size, mesh, here) for i in run], dtype=torch.long)
            for split, size in zip(sharding.splits, shape, strict=True)
        ]
        if any(len(i) == 0 for i in index):
            continue
        at = torch.meshgrid(*index, indexing="ij") if index else ()
        got = torch.zeros([len(i) for i in index], dtype=whole.dtype) if shard is None else shard
        old = whole[at]
        known = ~torch.isnan(old)
        assert got.shape == old.shape, f"{name}: rank {rank} has {got.shape}, not {old.shape}"
        difference = float((got - old)[known].abs().max()) if bool(known.any()) else 0.0
        assert difference <= 1e-11 * max(scale, 1.0), f"{name}: rank {rank} differs by {difference}"
        whole[at] = got
    assert not bool(torch.isnan(whole).any()), f"{name}: some elements belong to no rank"
    return whole


# Comparing ------------------------------------------------------------------------------------


def differences(got: Result, expected: Result, tolerance: float = TOLERANCE) -> list[str]:
    """One sentence per loss, gradient or buffer that differs by more than `tolerance` of its scale."""
    found = []
    pairs: list[tuple[str, Tensor | None, Tensor | None]] = [
        ("loss", got.loss, expected.loss),
        *((f"gradient of {n}", got.gradients[n], g) for n, g in expected.gradients.items()),
        *((f"buffer {n}", got.buffers[n], b) for n, b in expected.buffers.items()),
    ]
    largest = max(
        (float(g.abs().max()) for g in expected.gradients.values() if g is not None and g.numel()),
        default=1.0,
    )
    for name, a, b in pairs:
        a, b = _whole(a, b), _whole(b, a)
        if a is None or b is None or a.numel() == 0:
            continue
        # Some gradients (a key's bias) are zero but for rounding: their scale is the model's.
        floor = 1e-3 * largest if name.startswith("gradient") else 1e-6
        scale = max(float(b.abs().max()), floor)
        error = float((a.double() - b.double()).abs().max()) / scale
        if not error <= tolerance:
            found.append(f"{name} differs by {error:.3g} of its scale {scale:.3g}")
    return found


def _whole(value: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A missing gradient is a gradient of zeros."""
    return torch.zeros_like(like) if value is None and like is not None else value


def assert_equivalent(got: Result, expected: Result, what: str = "") -> None:
    """Raise AssertionError with what differs."""
    found = differences(got, expected)
    assert not found, f"{what}: " + "; ".join(found[:6])


def check_zoo(
    name: str, decisions: Decisions, batch_size: int | None = None, what: str = ""
) -> None:
    """One step of a zoo model on the simulated ranks against the undecorated model."""
    subject, entry = zoo_subject(name), ZOO[name]
    args, kwargs = entry.inputs(0, torch.float64, batch_size)
    if subject.capture.bind(subject.capture.flatten(args, kwargs)) is None:
        subject = zoo_subject(name, batch_size)
    loss = zoo_loss(entry, batch_size)
    expected = single_device(subject.module, args, kwargs, loss)
    got = simulate(subject, args, kwargs, loss, decisions)
    assert_equivalent(got, expected, f"{name} {what} on {decisions.mesh}")


def concrete(subject: Subject) -> Graph:
    """The captured graph at the sizes of its capture."""
    return specialise(subject.graph, subject.capture.symbols)
