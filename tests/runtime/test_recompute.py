"""Recomputed regions keep exactly what they promise, and the numbers of a backward that keeps all."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from autopar.compat import TorchDispatchMode
from autopar.ir.mesh import Mesh
from autopar.ir.recomputed import mark_of
from autopar.passes.blocks import find_blocks
from autopar.passes.rules_of import rules_of
from autopar.plan import Recompute
from autopar.runtime.group import Group
from autopar.runtime.placements import local_shard
from autopar.runtime.program import Program, load_program
from autopar.runtime.thread_world import ThreadWorld, run_threads
from tests.random_plans import MESHES, random_decisions
from tests.simulate import (
    Decisions,
    Subject,
    assert_equivalent,
    check_zoo,
    concrete,
    decisions_of,
    groups_of,
    lower_all,
    plan_of,
    simulate,
    single_device,
    subject_of,
    zoo_subject,
)

RANKS, COPIES = 2, 3
ROWS, DIM, HIDDEN = 8, 6, 10
DOUBLE = 8  # bytes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


class Blocks(nn.Module):
    """Blocks of which a user checkpoints the first ones."""

    def __init__(self, checkpointed: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(COPIES))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if i < self.checkpointed else block(x)
        return x.square().mean()


@cache
def subject(checkpointed: int = 0) -> Subject:
    torch.manual_seed(0)
    return subject_of(Blocks(checkpointed).double(), (batch(),), {})


def batch() -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def decisions(made: Subject, strategy: str, full: int = 0, selective: int = 0) -> Decisions:
    found = decisions_of(made, plan_of(made, RANKS, strategy))
    if not full and not selective:
        return found
    ((first, _, copies),) = find_blocks(concrete(made)).regions
    assert copies == COPIES
    return replace(found, recompute=(Recompute(first.name, copies, full, selective),))


# Bytes ----------------------------------------------------------------------------------------


class Storages(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """Weak references to the memory of all that was made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                reference: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self.made[reference.cdata] = (reference, storage.nbytes())
        return out

    def alive(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@dataclass(frozen=True)
class Measured:
    """Bytes alive after the forward and after the backward, and calls of a group's methods."""

    forward: int
    backward: int
    calls: Counter[str]

    @property
    def kept(self) -> int:
        """What the backward let go of: parameters and gradients stay."""
        return self.forward - self.backward


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Counting:
    """A group that counts its calls."""

    def __init__(self, group: Group, calls: Counter[str]) -> None:
        self._group, self._calls = group, calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._group, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls[name] += 1
            return found(*args, **kwargs)

        return call


def measure(made: Subject, what: Decisions) -> Measured:
    """One step on threads; of rank 0, what autograd kept."""
    sizes = made.capture.symbols
    graphs = lower_all(made.graph, sizes, what)
    world = ThreadWorld(RANKS)
    parameters = dict(made.module.named_parameters())
    names = {n.meta["fqns"][0]: n.name for n in made.graph.placeholders("param")}

    def one_rank(rank: int) -> Measured:
        calls: Counter[str] = Counter()
        groups: dict[tuple[str, ...], Any] = {
            axes: Counting(group, calls)
            for axes, group in groups_of(graphs[rank], what.mesh, world, rank).items()
        }
        program = load_program(graphs[rank], groups)
        leaves = {
            name: local_shard(
                parameters[fqn].detach(), what.storage[name], what.mesh, rank
            ).requires_grad_()
            for fqn, name in names.items()
        }
        arguments = [
            leaves[names[fqns[0]]] if role == "param" else batch()
            for role, fqns in program.placeholders
        ]
        with Storages() as storages:
            (loss,) = program.run(*arguments)
        del arguments
        before = storages.alive()
        loss.backward()
        del loss
        return Measured(before, storages.alive(), calls)

    with no_collector():
        return run_threads(world, one_rank)[0]


def test_bytes_of_every_mode() -> None:
    """Per copy: `full` keeps x, `selective` x and the first product, none x, both sides of gelu."""
    made = subject()
    none = measure(made, decisions(made, "data"))
    rows = ROWS // RANKS
    for full, selective in ((1, 0), (3, 0), (0, 2), (1, 2), (2, 1)):
        some = measure(made, decisions(made, "data", full, selective))
        less = full * 2 * HIDDEN + selective * HIDDEN
        assert none.kept - some.kept == less * rows * DOUBLE, (full, selective)
        assert some.backward == none.backward


def test_gathered_parameters_are_not_kept() -> None:
    """Under ZeRO-3 nothing gathered outlives the forward, whatever is recomputed."""
    made = subject()
    data, zero = (measure(made, decisions(made, s, 2, 1)) for s in ("data", "zero"))
    none = measure(made, decisions(made, "zero"))
    assert zero.kept == data.kept
    assert none.kept - zero.kept == (2 * 2 * HIDDEN + HIDDEN) * (ROWS // RANKS) * DOUBLE


def test_gathers_per_region() -> None:
    """Every copy's parameters travel in one message: forward, and once more in the backward."""
    made = subject()
    calls = measure(made, decisions(made, "zero", COPIES)).calls
    first_layer = 1  # its input wants no gradient: the backward does not need its weight
    assert calls["all_gather"] == first_layer + 2 * COPIES, calls


def test_collectives_run_again_only_if_something_after_them_is_wanted() -> None:
    """A block's last all-reduce is beyond what the backward needs; kept ones never run again."""
    made = subject()
    none = measure(made, decisions(made, "tensor")).calls
    for full, selective in ((3, 0), (0, 3)):
        assert measure(made, decisions(made, "tensor", full, selective)).calls == none


def test_users_checkpoints_are_applied() -> None:
    none, two = subject(0), subject(2)
    kept = [measure(made, decisions(made, "data")).kept for made in (none, two)]
    assert kept[0] - kept[1] == 2 * 2 * HIDDEN * (ROWS // RANKS) * DOUBLE


# Numbers --------------------------------------------------------------------------------------


def value(output: Any) -> Tensor:
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("checkpointed", [0, 2])
@pytest.mark.parametrize("strategy", ["data", "zero", "tensor"])
def test_equals_one_device(strategy: str, checkpointed: int) -> None:
    made = subject(checkpointed)
    what = decisions(made, strategy)
    if not checkpointed:
        what = decisions(made, strategy, 1, 1)
    got = simulate(made, (batch(),), {}, value, what)
    assert_equivalent(got, single_device(made.module, (batch(),), {}, value), strategy)


@pytest.mark.parametrize(("full", "selective"), [(3, 0), (0, 3)])
def test_a_graph_that_is_retained_runs_backward_twice(full: int, selective: int) -> None:
    made = subject()
    what = decisions(made, "data", full, selective)
    graphs = lower_all(made.graph, made.capture.symbols, what)
    world = ThreadWorld(RANKS)
    parameters = dict(made.module.named_parameters())

    def one_rank(rank: int) -> bool:
        program: Program = load_program(
            graphs[rank], groups_of(graphs[rank], what.mesh, world, rank)
        )
        arguments = [
            parameters[fqns[0]].detach().clone().requires_grad_() if role == "param" else batch()
            for role, fqns in program.placeholders
        ]
        (loss,) = program.run(*arguments)
        leaves = [x for x in arguments if x.requires_grad]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        return all(map(torch.equal, first, second))

    assert all(run_threads(world, one_rank))


def test_the_program_shows_its_regions() -> None:
    made = subject()
    graph = lower_all(made.graph, made.capture.symbols, decisions(made, "data", 1, 1))[0]
    world = ThreadWorld(RANKS)
    source = load_program(graph, groups_of(graph, Mesh.of(dp=RANKS), world, 0)).source
    assert "def block_0_0(" in source and "def block_0_1(kept, " in source
    assert "kept.matmul(linear, " in source
    assert source.count("run_region(block_0_") == 2


@pytest.mark.parametrize("strategy", ["data", "zero"])
def test_ranks_with_nothing_to_compute(strategy: str) -> None:
    """Three rows on four ranks: the last one recomputes, and communicates, as the others do."""
    made = zoo_subject("gpt_attention_dropout")
    ((first, _, copies),) = find_blocks(concrete(made)).regions
    what = decisions_of(made, plan_of(made, 4, strategy))
    what = replace(what, recompute=(Recompute(first.name, copies, 1, 1),))
    marks = {mark_of(n) for n in lower_all(made.graph, three(made), what)[3].calls()}
    assert {m.to_the_end for m in marks if m is not None} == {True}
    check_zoo("gpt_attention_dropout", what, 3)


def three(made: Subject) -> dict[Any, int]:
    (symbol,) = made.capture.symbols
    return {symbol: 3}


@pytest.mark.parametrize("seed", range(2))
def test_random_plans_and_modes(seed: int) -> None:
    random = Random(seed)
    made = zoo_subject("llama")
    graph = concrete(made)
    what = random_decisions(graph, rules_of(graph), random.choice(MESHES), random)
    modes = [(1, 1), (2, 0), (0, 2)]
    blocks = [
        Recompute(first.name, copies, *random.choice(modes))
        for first, _, copies in find_blocks(graph).regions
    ]
    check_zoo("llama", replace(what, recompute=tuple(blocks)))
