"""The runner verifies every live invariant after every pass, and keeps what each pass made."""

from __future__ import annotations

import pytest

from autopar.errors import PassError
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_sharding
from autopar.ir.rule import Choice
from autopar.ir.sharding import Sharding
from autopar.ir.verify import INVARIANTS
from autopar.passes.pipeline import Pass, last_of, lowering, run_passes
from autopar.passes.rules_of import rules_of

from .helpers import graph_of, show
from .test_propagate import COLUMN_ROW, MLP, STORED

TEXT = """
%x: input f32[4, 8] @ [dp, -] "x"
%y: f32[4, 8] @ [dp, -] = aten.neg(%x)
%z: f32[4, 8] @ [-, -] = collective(gather_inv, "dp", %y)
return %z
"""
MESH = Mesh.of(dp=2)


def same(graph: Graph) -> Graph:
    return graph


def resharded_wrongly(graph: Graph) -> Graph:
    """Somebody's pass that types %y with an axis that there is not."""
    new = graph.copy()
    for node in new.fx.nodes:
        if node.name == "y":
            node.meta["value"] = node.meta["value"].with_sharding(Sharding.on(2, ep=0))
    return new


def test_stages_are_kept() -> None:
    graph = graph_of(TEXT)
    stages = run_passes(graph, [Pass("first", same), Pass("second", same)], MESH)
    assert [stage.name for stage in stages] == ["capture", "first", "second"]
    assert stages[0].graph is graph
    assert all(stage.time_s >= 0 for stage in stages)


def test_a_failing_invariant_names_pass_invariant_and_node() -> None:
    passes = [Pass("sound", same, establishes=("axes_exist",)), Pass("unsound", resharded_wrongly)]
    with pytest.raises(PassError) as caught:
        run_passes(graph_of(TEXT), passes, MESH)
    assert str(caught.value) == (
        "after unsound: axes_exist fails: %y @ [ep, -] names axis 'ep', which mesh dp=2 lacks\n"
        "  node: %y: f32[4, 8] @ [ep, -] = aten.neg(%x)"
    )


def test_all_live_invariants_are_checked_after_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[str, tuple[str, ...]]] = []
    monkeypatch.setattr(
        "autopar.passes.pipeline.verify",
        lambda graph, mesh, names, pass_name: checked.append((pass_name, names)),
    )
    passes = [
        Pass("a", same, establishes=("typed",)),
        Pass("b", same, establishes=("axes_exist", "resharded")),
        Pass("c", same, ends=("typed", "resharded")),
    ]
    run_passes(graph_of(TEXT), passes, MESH)
    assert checked == [
        ("a", ("typed",)),
        ("b", ("typed", "axes_exist", "resharded")),
        ("c", ("axes_exist",)),
    ]


def test_an_invariant_that_a_pass_ends_may_fail() -> None:
    passes = [
        Pass("sound", same, establishes=("axes_exist",)),
        Pass("unsound", resharded_wrongly, ends=("axes_exist",)),
    ]
    assert len(run_passes(graph_of(TEXT), passes, MESH)) == 3


def mlp_lowering(rank: int) -> list[Pass]:
    return lowering(
        Mesh.of(dp=2, tp=2),
        rank,
        {},
        rules_of,
        {n: {a: Choice.parse(c) for a, c in chosen.items()} for n, chosen in COLUMN_ROW.items()},
        {name: parse_sharding(sharding) for name, sharding in STORED.items()},
    )


def test_the_lowering_is_the_table_of_contents() -> None:
    passes = mlp_lowering(0)
    assert [p.name for p in passes] == [
        "specialise",
        "mark_blocks",
        "mark_recompute",
        "propagate",
        "settle_regather",
        "cast_before_gather",
        "insert_reshards",
        "lower_collectives",
        "bucket_collectives",
        "settle_recompute",
        "localise_shapes",
        "overlap_collectives",
    ]
    for step in passes:
        assert set(step.establishes) | set(step.ends) <= set(INVARIANTS)


@pytest.mark.parametrize("rank", range(4))
def test_every_rank_is_lowered(rank: int) -> None:
    stages = run_passes(graph_of(MLP), mlp_lowering(rank), Mesh.of(dp=2, tp=2))
    assert "collective(" not in show(stages[-1].graph)
    assert show(stages[0].graph) == show(graph_of(MLP))  # no pass writes to its input


def test_the_last_graph_alone_is_the_same() -> None:
    graph, passes = graph_of(MLP), mlp_lowering(1)
    found = last_of(graph, passes)
    assert show(found) == show(run_passes(graph, passes, Mesh.of(dp=2, tp=2))[-1].graph)
    assert show(graph) == show(graph_of(MLP))
    assert found.copy() is not found
