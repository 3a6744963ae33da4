"""ZeRO-3 holds the gathered parameters of about two blocks at a time, whatever the depth."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Split
from autopar.passes.blocks import find_blocks
from autopar.passes.rules_of import rules_of
from autopar.plan import Recompute
from autopar.runtime import collectives
from autopar.runtime.group import Group
from autopar.runtime.placements import local_shard
from autopar.runtime.program import load_program
from autopar.runtime.regather import Regather
from autopar.runtime.thread_world import ThreadWorld, run_threads
from tests.followed_plans import following
from tests.runtime.test_recompute import no_collector
from tests.simulate import (
    Decisions,
    Subject,
    assert_equivalent,
    concrete,
    groups_of,
    lower_all,
    simulate,
    single_device,
    subject_of,
)

LAYERS, DIM, HIDDEN, ROWS = 6, 16, 48, 4
DOUBLE = 8  # bytes
BLOCK = (2 * DIM * HIDDEN + HIDDEN + 3 * DIM) * DOUBLE  # two products, their biases, a norm


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class Stack(nn.Module):
    """Blocks between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.last = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x).square().mean()


def batch() -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@cache
def subject() -> Subject:
    torch.manual_seed(0)
    return subject_of(Stack().double(), (batch(),), {})


def zero(made: Subject, mesh: Mesh) -> Decisions:
    """The batch is split on every axis; parameters are stored split on all of them."""
    graph = concrete(made)
    found = following(graph, rules_of(graph), mesh, dict.fromkeys(mesh.names, 0))
    whole = found.storage
    storage = {
        name: replace(s, splits=(Split(mesh.names), *s.splits[1:])) for name, s in whole.items()
    }
    return replace(found, storage=storage, regather=frozenset(storage))


@dataclass
class Gathered:
    """Bytes of gathered parameters of one thread: those there, and those on their way."""

    there: list[tuple[Any, int]] = field(default_factory=list)
    coming: int = 0
    peak: int = 0

    def note(self, made: Sequence[Tensor]) -> None:
        for x in made:
            storage = x.untyped_storage()
            reference: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self.there.append((reference, storage.nbytes()))

    def look(self) -> None:
        self.there = [(r, n) for r, n in self.there if not r.expired()]
        self.peak = max(self.peak, self.coming + sum(n for _, n in self.there))

    def bytes_now(self) -> int:
        self.look()
        return self.coming + sum(n for _, n in self.there)


def watched(monkeypatch: pytest.MonkeyPatch, seen: dict[int, Gathered]) -> None:
    """Note what the gathers of parameters make in each thread."""
    original = collectives._FORWARD["gather_vary"]

    def start(xs: list[Tensor], specs: Sequence[Any], group: Group, *rest: Any) -> Any:
        mine = seen[threading.get_ident()]
        finish = original(xs, specs, group, *rest)
        nbytes = sum(x.nbytes for x in xs) * group.size
        mine.coming += nbytes
        mine.look()

        def finished() -> list[Tensor]:
            made = finish()
            mine.coming -= nbytes
            mine.note(made)
            mine.look()
            return made

        return finished

    monkeypatch.setitem(collectives._FORWARD, "gather_vary", start)


@dataclass(frozen=True)
class Peaks:
    """Most bytes of gathered parameters, and those left after the forward and the backward."""

    forward: int
    kept: int
    backward: int
    left: int


def peaks(
    made: Subject, what: Decisions, monkeypatch: pytest.MonkeyPatch, ahead: bool = True
) -> Peaks:
    """One step on threads; what its first rank held."""
    graphs = lower_all(made.graph, made.capture.symbols, what, ahead=ahead)
    world = ThreadWorld(what.mesh.size)
    parameters = dict(made.module.named_parameters())
    names = {n.meta["fqns"][0]: n.name for n in made.graph.placeholders("param")}
    seen: dict[int, Gathered] = {}

    def one_rank(rank: int) -> Peaks:
        mine = seen[threading.get_ident()] = Gathered()
        groups = groups_of(graphs[rank], what.mesh, world, rank)
        program = load_program(graphs[rank], groups, ahead=ahead)
        leaves = {
            fqn: local_shard(
                parameters[fqn].detach(), what.storage[name], what.mesh, rank
            ).requires_grad_()
            for fqn, name in names.items()
        }
        arguments = [
            leaves[fqns[0]] if role == "param" else batch() for role, fqns in program.placeholders
        ]
        (loss,) = program.run(*arguments)
        kept, forward, mine.peak = mine.bytes_now(), mine.peak, 0
        loss.backward()
        del loss
        return Peaks(forward, kept, mine.peak, mine.bytes_now())

    watched(monkeypatch, seen)
    with no_collector():
        return run_threads(world, one_rank)[0]


MESHES = [Mesh.of(dp=4), Mesh.of(dp=2, fsdp=2)]
# On two axes a block's parameters are gathered twice: half of each, then all.
PARTLY = {1: 0, 2: BLOCK // 2}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("full", "selective"), [(0, 0), (2, 0), (0, 2), (LAYERS, 0)])
def test_peak_of_gathered_parameters(
    mesh: Mesh, full: int, selective: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block in use, one on its way: never the model, and nothing after either pass."""
    made = subject()
    found = peaks(made, recomputed(made, zero(made, mesh), full, selective), monkeypatch)
    partly = PARTLY[len(mesh.names)]
    assert BLOCK <= found.forward <= 2 * BLOCK + partly, found.forward / BLOCK
    assert BLOCK <= found.backward <= 2 * BLOCK + partly, found.backward / BLOCK
    assert (found.kept, found.left) == (0, 0)
    if not full and not selective and not partly:  # the next block is on its way, both times
        assert found.forward == found.backward == 2 * BLOCK


def test_right_before_use_where_nothing_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    made = subject()
    found = peaks(made, zero(made, MESHES[0]), monkeypatch, ahead=False)
    assert found.forward == found.backward == BLOCK
    assert (found.kept, found.left) == (0, 0)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("full", "selective"), [(0, 0), (1, 1)])
def test_numbers_are_those_of_one_device(
    mesh: Mesh, full: int, selective: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopar.runtime.program.Regather", lambda _: Regather(ahead))
    made = subject()
    what = recomputed(made, zero(made, mesh), full, selective)
    found = simulate(made, (batch(),), {}, value, what)
    assert_equivalent(found, single_device(made.module, (batch(),), {}, value))


def value(output: Any) -> Tensor:
    assert isinstance(output, Tensor)
    return output


def recomputed(made: Subject, what: Decisions, full: int, selective: int) -> Decisions:
    ((first, _, copies),) = find_blocks(concrete(made)).regions
    if not full and not selective:
        return what
    return replace(what, recompute=(Recompute(first.name, copies, full, selective),))
