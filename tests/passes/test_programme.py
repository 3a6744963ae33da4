"""The integer programme against all assignments, one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autopar.errors import PassError
from autopar.passes import programme
from autopar.passes.options import Option

from .tiny import GRAPHS, LINEAR, REPEATED, SHARED, TWO_MATRICES, tiny

MESHES = ({"dp": 2}, {"dp": 4}, {"dp": 2, "tp": 2})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_the_optimum(name: str, sizes: dict[str, int]) -> None:
    """The solver's cost is the least of all assignments', with and without a memory limit."""
    case = tiny(GRAPHS[name], sizes, most=4 if name != "shared" else 3)
    every = case.assignments()
    assert len(every) > 20
    best = min(time_s for time_s, _ in every)
    found = case.solve()
    assert found is not None
    assert found.time_s == pytest.approx(best, rel=1e-5)
    memories = sorted({memory for _, memory in every})
    for limit in (memories[len(memories) // 4], memories[len(memories) // 2], memories[0]):
        limited = case.solve(limit * 1.0001)
        assert limited is not None
        assert limited.memory_bytes <= limit * 1.001
        best = min(time_s for time_s, memory in every if memory <= limit * 1.0001)
        assert limited.time_s == pytest.approx(best, rel=1e-4)
    assert case.solve(memories[0] * 0.99) is None
    lean = case.solve(0.0, minimise_memory=True)
    assert lean is not None
    assert lean.memory_bytes == pytest.approx(memories[0], rel=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.7])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_optimum_under_accounts(mode: str, micro_batches: int, overlap: float) -> None:
    """Micro-batches, recomputation and overlap change prices; the optimum stays one."""
    case = replace(
        tiny(REPEATED, {"dp": 2, "tp": 2}, most=4),
        mode=mode,
        micro_batches=micro_batches,
        overlap=overlap,
    )
    every = case.assignments()
    found = case.solve()
    assert found is not None
    assert found.time_s == pytest.approx(min(time_s for time_s, _ in every), rel=1e-5)
    memories = sorted({memory for _, memory in every})
    limit = memories[len(memories) // 4] * 1.0001
    limited = case.solve(limit)
    assert limited is not None
    best = min(time_s for time_s, memory in every if memory <= limit)
    assert limited.time_s <= best / (1 - limited.gap) * (1 + 1e-5)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_bound_leaves_the_optimum(name: str) -> None:
    """Pruning by a bound keeps what is below it, and says so where nothing is."""
    case = tiny(GRAPHS[name], {"dp": 2, "tp": 2})
    best = case.solve()
    assert best is not None
    for factor in (1.0001, 1.1, 3.0):
        found = case.solve(better_than_s=best.time_s * factor)
        assert found is not None
        assert found.time_s == pytest.approx(best.time_s, rel=1e-5)
    assert case.solve(better_than_s=best.time_s * 0.999) is None


def test_copies_of_a_block_decide_together() -> None:
    """One copy's columns, its cost times the copies: as good as the same choices everywhere."""
    case = tiny(REPEATED, {"dp": 2})
    assert [copies for _, _, copies in case.blocks.regions] == [2]
    found = case.solve()
    assert found is not None
    by_name = {node.name: option for node, option in found.option.items()}
    assert by_name["b"] == by_name["d"]
    assert by_name["w0"] == by_name["w1"]
    free = tiny(REPEATED, {"dp": 2}, blocks=False).solve()
    assert free is not None
    assert free.time_s <= found.time_s * (1 + 1e-6)


def test_a_wrong_evaluation_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objective is compared with the plan's cost from scratch: neither may drift alone."""
    case = tiny(LINEAR, {"dp": 2})
    right = programme.evaluate
    monkeypatch.setattr(programme, "evaluate", lambda *a: (right(*a)[0] * 1.001, right(*a)[1]))
    with pytest.raises(PassError, match="objective_is_cost fails: the programme says"):
        case.solve()


def test_a_wrong_objective_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge priced otherwise in the programme than in the evaluation is found out."""
    case = tiny(TWO_MATRICES, {"dp": 2}, family="zero")
    right = case.pricer.edge_time_s
    calls = iter(range(10**9))

    def drifting(*args: object) -> float:
        return right(*args) + 1e-3 * next(calls)  # type: ignore[arg-type]

    monkeypatch.setattr(case.pricer, "edge_time_s", drifting)
    with pytest.raises(PassError, match="objective_is_cost"):
        case.solve()


def test_exact_where_the_relaxation_is_not_integral() -> None:
    """A tight memory limit makes the relaxation mix options: the rest is solved exactly."""
    case = tiny(TWO_MATRICES, {"dp": 2, "tp": 2})
    every = case.assignments()
    statuses = set()
    for limit in sorted({memory for _, memory in every})[::3]:
        found = case.solve(limit * 1.0001)
        assert found is not None
        best = min(time_s for time_s, memory in every if memory <= limit * 1.0001)
        # Fixing what the relaxation decides is a heuristic: the gap says how good it is.
        assert found.time_s <= best / (1 - found.gap) * (1 + 1e-5)
        assert found.time_s >= best * (1 - 1e-5)
        statuses.add(found.status.lstrip("0123456789 "))
    assert "nodes solved exactly" in statuses
    assert "integral relaxation" in statuses


def test_the_fallback_to_all_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fixing the decided nodes leaves nothing, the whole programme is solved exactly."""
    case = tiny(TWO_MATRICES, {"dp": 2, "tp": 2})
    best = case.solve()
    assert best is not None
    solve_lp = programme._highs
    seen: list[int] = []

    def stub(lp: object, time_limit_s: float) -> object:
        seen.append(len(seen))
        values = solve_lp(lp, time_limit_s)  # type: ignore[arg-type]
        if len(seen) == 1:
            assert values is not None
            return values * 0.5  # undecided everywhere
        return None if len(seen) == 2 else values

    monkeypatch.setattr(programme, "_highs", stub)
    found = case.solve()
    assert len(seen) == 3
    assert found is not None
    assert found.status == "solved exactly"
    assert found.time_s == pytest.approx(best.time_s, rel=1e-5)


def test_a_node_without_options_has_no_assignment() -> None:
    case = tiny(LINEAR, {"dp": 2})
    options = {n: list(o) for n, o in case.options.items()}
    options[next(iter(options))] = []
    assert programme.solve(case.graph, case.blocks, options, case.pricer, math.inf) is None


def test_a_reshard_that_readers_share_is_paid_once() -> None:
    """Gathering one weight for two readers costs one gather."""
    case = tiny(SHARED, {"dp": 2}, family="zero", most=10)
    found = case.solve()
    assert found is not None
    w = next(node for node in found.option if node.name == "w")
    edges = [e for e in programme.edges_of(case.graph) if e.producer is w]
    assert len(edges) == 2
    wants = {found.option[e.consumer].wants[e.slot] for e in edges}
    assert len(wants) == 1
    once = case.pricer.edge_time_s(
        w, 0, found.option[w].gives[0], wants.pop(), found.option[w].regather
    )
    assert once > 0
    others = sum(
        case.pricer.edge_time_s(
            e.producer,
            e.port,
            found.option[e.producer].gives[e.port],
            found.option[e.consumer].wants[e.slot],
        )
        for e in {
            (e.producer, e.port, found.option[e.consumer].wants[e.slot]): e
            for e in programme.edges_of(case.graph)
            if e.producer is not w
        }.values()
    )
    ops = sum(option.time_s for option in found.option.values())
    assert found.time_s == pytest.approx(ops + others + once)


def test_items_of_an_op_are_looked_through() -> None:
    case = tiny(
        """
        %x: input f32[8, 8] "x"
        %t: (f32[8], i64[8]) = aten.max.dim(%x, 1)
        %i: i64[8] = getitem(%t, 1)
        %y: i64[8] = aten.add.Tensor(%i, 1)
        return %y
        """,
        {"dp": 2},
    )
    edges = [(e.producer.name, e.port, e.consumer.name) for e in programme.edges_of(case.graph)]
    assert edges == [("x", 0, "t"), ("t", 1, "y"), ("y", 0, "output")]
    assert isinstance(next(iter(case.options.values()))[0], Option)
