"""The outer search against every mesh under every variant, each solved exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.cost.cluster import parse_cluster
from autopar.passes.accounts import Accounts, overlap_of, regions_of
from autopar.passes.frame import Variant
from autopar.passes.price import Pricer
from autopar.passes.problem import Problem, options_of, problem_of
from autopar.passes.programme import solve
from autopar.passes.propose import (
    WORTH,
    Frames,
    Proposal,
    Request,
    meshes_of,
    propose,
    role_sets,
)
from autopar.passes.settle import Settled, settle
from tests.simulate import Subject, subject_of

MODES = ("none", "selective", "full")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Stack(nn.Module):
    """Residual blocks of two matrices: as much state as activations at a batch of 64 * 16 rows."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x).square().mean()
        return out


@cache
def stack() -> Subject:
    torch.manual_seed(0)
    return subject_of(Stack(), (torch.randn(64, 16, 64),), {})


@cache
def problem(spec: str, batch: int = 64) -> Problem:
    made = stack()
    (symbol,) = made.capture.symbols
    return problem_of(made.graph, {symbol: batch}, parse_cluster(spec), "adamw")


def request(spec: str, limit: float, batch: int = 64, **how: Any) -> Request:
    (symbol,) = stack().capture.symbols
    made = Request(parse_cluster(spec), {symbol: batch}, limit)
    return replace(made, **how)


def better(wanted: Request, than_s: float) -> list[tuple[str, Variant, float]]:
    """Every mesh of every set of axes under every variant that has a faster assignment."""
    found = []
    for k in wanted.micro_batches:
        small = problem_of(stack().graph, wanted.at(k), wanted.cluster, "adamw")
        regions = regions_of(small.graph, small.blocks)
        for roles in role_sets(small, wanted):
            family = small.family("auto", dict(roles))
            for mesh in meshes_of(roles, wanted.cluster):
                pricer = Pricer(wanted.cluster, mesh, micro_batches=k)
                options = options_of(small, mesh, pricer, family)
                for mode in wanted.modes:
                    modes = dict.fromkeys(range(len(regions.copies)), mode)
                    made = solve(
                        small.graph,
                        small.blocks,
                        options,
                        pricer,
                        wanted.memory_limit,
                        better_than_s=than_s,
                        accounts=Accounts(
                            pricer, regions, k, modes, overlap_of(wanted.cluster, mesh)
                        ),
                    )
                    if made is not None and made.time_s < than_s:
                        found.append((str(mesh), Variant(k, mode), made.time_s))
    return found


def settled(proposal: Proposal, wanted: Request) -> Settled | None:
    k = proposal.variant.micro_batches
    small = problem_of(stack().graph, wanted.at(k), wanted.cluster, "adamw")
    family = small.family("auto", proposal.frame.roles)
    limit = wanted.memory_limit + small.given_bytes(k)  # of the programme alone
    return settle("auto", small, proposal.mesh, family, proposal.variant, limit, near=proposal)


def best_of(proposals: list[Proposal], wanted: Request) -> Settled:
    """The best of the first few proposals, settled."""
    made = [settled(p, wanted) for p in proposals[:4] if p.relaxed is not None]
    return min((s for s in made if s is not None), key=lambda s: s.assignment.time_s)


# Share of the memory that the fastest assignment without a limit keeps.
CASES: list[tuple[str, float, dict[str, Any]]] = [
    ("cpu:4", 0.6, {"micro_batches": (1, 2, 4), "modes": MODES}),
    ("cpu:8", 0.5, {"micro_batches": (1, 2)}),
    ("8xH100", math.inf, {}),
    ("8xH100", 0.6, {"modes": ("none", "full")}),
    ("2x4xH100", 0.5, {"micro_batches": (1, 2)}),
]


@cache
def needed(spec: str) -> float:
    """Bytes that the fastest assignment without a limit keeps."""
    free = request(spec, math.inf)
    return best_of(propose(Frames(problem(spec)), free), free).assignment.memory_bytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_better_than_the_best(case: tuple[str, float, dict[str, Any]]) -> None:
    """Without a limit, and where ZeRO, micro-batches or recomputation must make room."""
    spec, share, how = case
    limit = math.inf if share == math.inf else share * needed(spec)
    wanted = request(spec, limit, **how)
    found = best_of(propose(Frames(problem(spec)), wanted), wanted)
    assert found.assignment.memory_bytes <= limit * (1 + 1e-6)
    assert better(wanted, found.assignment.time_s * (1 - 2 * WORTH)) == []
    if share < math.inf:
        assert better(request(spec, math.inf), found.assignment.time_s)


def test_a_relaxation_is_that_of_its_mesh() -> None:
    """Of candidates near the best, the relaxation is not above what the mesh can do."""
    wanted = request("cpu:8", 0.6 * needed("cpu:8"), micro_batches=(1, 2))
    near = [p for p in propose(Frames(problem("cpu:8")), wanted) if p.relaxed is not None]
    near = [p for p in near if p.relaxed and p.relaxed.time_s < 1.05 * near[0].bound_s]
    assert near
    for proposal in near:
        made = settled(proposal, wanted)
        assert made is not None and proposal.relaxed is not None
        assert proposal.relaxed.time_s <= made.assignment.time_s * (1 + 1e-6)
        assert proposal.bound_s == pytest.approx(proposal.relaxed.time_s, rel=1e-5)


@cache
def used() -> Frames:
    """Frames that a search has made."""
    frames = Frames(problem("2x4xH100"))
    propose(frames, request("2x4xH100", math.inf))
    return frames


REPLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "another batch": ("2x4xH100", {"batch": 256}),
    "a smaller cluster": ("4xH100", {}),
    "another limit": ("2x4xH100", {"share": 0.95}),
    "another batch that does not divide": ("2x4xH100", {"batch": 24}),
}


@pytest.mark.parametrize("name", REPLANS)
def test_a_plan_anew_is_that_of_a_fresh_search(name: str) -> None:
    """Frames of one search serve another batch, cluster or limit."""
    spec, how = REPLANS[name]
    frames = used()
    made = dict(frames.made)
    batch = int(how.get("batch", 64))
    limit = how.get("share", math.inf) * needed("2x4xH100")
    wanted = request(spec, limit, batch)
    again = propose(frames, wanted)
    assert all(frames.made[roles] is frame for roles, frame in made.items())
    fresh = propose(Frames(problem(spec, batch)), wanted)
    assert [str(p.mesh) for p in again] == [str(p.mesh) for p in fresh]
    for one, other in zip(again, fresh, strict=True):
        assert one.bound_s == pytest.approx(other.bound_s, rel=1e-6)
    a, b = best_of(again, wanted), best_of(fresh, wanted)
    # Assignments that take as long by the programme may differ by some thousandths in a timeline.
    assert a.assignment.time_s == pytest.approx(b.assignment.time_s, rel=1e-4)
    assert a.timeline.step_s == pytest.approx(b.timeline.step_s, rel=1e-2)
