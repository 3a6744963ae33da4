"""Shares of recomputation against every split of few copies, and against a greedy baseline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost.cluster import make_mesh, parse_cluster
from autopar.passes.accounts import FULL, MODES, NONE, SELECTIVE, Accounts, overlap_of, regions_of
from autopar.passes.price import Pricer
from autopar.passes.problem import Problem, options_of, problem_of
from autopar.passes.programme import Assignment, solve
from autopar.passes.share_recompute import Shares, best_shares, share_recompute, shares_of
from tests.simulate import Subject, subject_of
from tests.zoo.language import GPT, Llama

MIB = 2.0**20
Counts = Sequence[dict[str, int]]


def time_of(shares: Sequence[Shares], counts: Counts) -> float:
    return sum(
        n[mode] * t
        for s, n in zip(shares, counts, strict=True)
        for mode, t in zip(MODES, s.time_s, strict=True)
    )


def bytes_of(shares: Sequence[Shares], counts: Counts) -> float:
    return sum(
        n[mode] * m
        for s, n in zip(shares, counts, strict=True)
        for mode, m in zip(MODES, s.memory_bytes, strict=True)
    )


def greedy(shares: Sequence[Shares], room: float) -> list[dict[str, int]] | None:
    """Recompute one whole copy at a time, the most bytes per second first, until it fits."""
    counts = [{NONE: s.copies, SELECTIVE: 0, FULL: 0} for s in shares]
    while bytes_of(shares, counts) > room:
        open_ = [i for i, n in enumerate(counts) if n[NONE]]
        if not open_:
            return None

        def gain(i: int) -> float:
            bytes_ = shares[i].memory_bytes[0] - shares[i].memory_bytes[2]
            return bytes_ / max(shares[i].time_s[2] - shares[i].time_s[0], 1e-12)

        best = max(open_, key=gain)
        counts[best][NONE] -= 1
        counts[best][FULL] += 1
    return counts


def every(shares: Sequence[Shares]) -> list[list[dict[str, int]]]:
    """All ways to give every copy a mode."""
    ways = [
        [
            {NONE: s.copies - full - some, SELECTIVE: some, FULL: full}
            for full in range(s.copies + 1)
            for some in range(s.copies + 1 - full)
        ]
        for s in shares
    ]
    return [list(pick) for pick in itertools.product(*ways)]


@st.composite
def blocks(draw: st.DrawFn, most: int) -> Shares:
    """A block whose full recomputation takes longest and keeps least."""
    some, all_ = sorted(draw(st.lists(st.floats(1e-5, 1e-1), min_size=2, max_size=2)))
    low, mid, high = sorted(draw(st.lists(st.floats(0, 2e3), min_size=3, max_size=3)))
    memory = ((high - low) * MIB, (mid - low) * MIB, 0.0)
    return Shares(draw(st.integers(1, most)), (0.0, some, all_), memory)


@settings(max_examples=60, deadline=None)
@given(st.lists(blocks(5), min_size=1, max_size=2), st.floats(0, 1.1))
def test_exact_for_few_copies(shares: list[Shares], share: float) -> None:
    room = share * sum(s.copies * s.memory_bytes[0] for s in shares)
    found = best_shares(shares, room)
    assert [sum(n.values()) for n in found] == [s.copies for s in shares]
    assert bytes_of(shares, found) <= room + 16  # bytes: the solver's tolerance
    fitting = [c for c in every(shares) if bytes_of(shares, c) <= room]
    best = min(time_of(shares, c) for c in fitting)
    assert time_of(shares, found) <= best + 1e-4 * max(best, 1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(blocks(96), min_size=1, max_size=4), st.floats(0, 1.1))
def test_no_worse_than_greedy(shares: list[Shares], share: float) -> None:
    room = share * sum(s.copies * s.memory_bytes[0] for s in shares)
    baseline, found = greedy(shares, room), best_shares(shares, room)
    assert baseline is not None
    assert bytes_of(shares, found) <= room + 64
    baseline_s = time_of(shares, baseline)
    assert time_of(shares, found) <= baseline_s + 1e-4 * max(baseline_s, 1e-4)


def test_nothing_fits() -> None:
    """Without room, all copies are recomputed in full; without blocks there is nothing to share."""
    shares = [Shares(4, (0.0, 1e-3, 2e-3), (3e6, 2e6, 0.0))]
    assert best_shares(shares, -1.0) == [{NONE: 0, SELECTIVE: 0, FULL: 4}]
    assert best_shares([], 1.0) == []


def test_free_room_recomputes_nothing() -> None:
    shares = [Shares(3, (0.0, 1e-3, 2e-3), (3e6, 2e6, 0.0))]
    assert best_shares(shares, 9e6 + 1) == [{NONE: 3, SELECTIVE: 0, FULL: 0}]


# Real models --------------------------------------------------------------------------------------

MODELS = {"gpt": GPT, "llama": Llama}


@cache
def captured(name: str) -> Subject:
    torch.manual_seed(0)
    model = MODELS[name](vocab=128, layers=8)
    batch = torch.zeros(16, 16, dtype=torch.long)
    return subject_of(model, (batch, batch), {})


@cache
def solved(name: str, spec: str) -> tuple[Problem, Accounts, Assignment]:
    """The fastest assignment on a mesh of one axis, and its accounts."""
    made, cluster = captured(name), parse_cluster(spec)
    problem = problem_of(made.graph, made.capture.symbols, cluster, "adamw")
    mesh = make_mesh(cluster, {"dp": cluster.size})
    pricer = Pricer(cluster, mesh)
    options = options_of(problem, mesh, pricer, problem.family("auto", {"dp": "any"}))
    regions = regions_of(problem.graph, problem.blocks)
    accounts = Accounts(pricer, regions, 1, {}, overlap_of(cluster, mesh))
    found = solve(problem.graph, problem.blocks, options, pricer, math.inf, accounts=accounts)
    assert found is not None
    return problem, accounts, found


@pytest.mark.parametrize("spec", [pytest.param("cpu:4", marks=pytest.mark.slow), "8xH100"])
@pytest.mark.parametrize("name", MODELS)
def test_real_blocks_from_tight_to_loose(name: str, spec: str) -> None:
    """Whatever the limit: within it, no worse than greedy, and as good as any split of the copies."""
    problem, accounts, found = solved(name, spec)
    shares, least = shares_of(problem.graph, problem.blocks, found.option, accounts)
    base = least.memory_bytes
    assert len(shares) == len(problem.blocks.regions) >= 1
    assert max(s.copies for s in shares) >= 6
    whole = sum(s.copies * s.memory_bytes[0] for s in shares)
    assert whole > 0
    modes, last = set(), math.inf
    for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        limit = base + share * whole + 1.0
        recompute = share_recompute(
            problem.graph, problem.blocks, found.option, accounts, limit
        ).recompute
        by_block = {r.block: r for r in recompute}
        counts = []
        for first, _, copies in problem.blocks.regions:
            r = by_block.get(first.name)
            full, some = (r.full, r.selective) if r else (0, 0)
            counts.append({NONE: copies - full - some, SELECTIVE: some, FULL: full})
        assert bytes_of(shares, counts) <= limit - base + 16
        baseline = greedy(shares, limit - base)
        assert baseline is not None
        time_s = time_of(shares, counts)
        assert time_s <= time_of(shares, baseline) * (1 + 1e-6) + 1e-12
        if len(shares) == 1:
            fitting = [c for c in every(shares) if bytes_of(shares, c) <= limit - base]
            assert time_s <= min(time_of(shares, c) for c in fitting) * (1 + 1e-6) + 1e-12
        assert time_s <= last * (1 + 1e-6) + 1e-12
        last = time_s
        modes |= {mode for n in counts for mode, k in n.items() if k}
    assert {NONE, FULL} <= modes
