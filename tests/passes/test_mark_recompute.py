"""Blocks of a plan and users' checkpoints are marked, and what later passes insert with them."""

from __future__ import annotations

import pytest

from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.ir.recomputed import mark_of
from autopar.ir.rule import Choice
from autopar.ir.sharding import Sharding
from autopar.passes.blocks import find_blocks
from autopar.passes.insert_reshards import insert_reshards
from autopar.passes.lower_collectives import lower_collectives
from autopar.passes.mark_recompute import mark_recompute, matching_recompute, settle_recompute
from autopar.passes.propagate import propagate
from autopar.passes.rules_of import rules_of
from autopar.plan import Recompute

from .helpers import graph_of, program

LAYERS = """
mesh tp=2
%x: input f32[3, 8] grad "x"
%a0: param f32[16, 8] grad "a0"
%b0: param f32[8, 16] grad "b0"
%a1: param f32[16, 8] grad "a1"
%b1: param f32[8, 16] grad "b1"
%a2: param f32[16, 8] grad "a2"
%b2: param f32[8, 16] grad "b2"
%h: f32[3, 8] grad = aten.silu(%x)
%u0: f32[3, 16] grad = aten.linear(%h, %a0)
%v0: f32[3, 8] grad = aten.linear(%u0, %b0)
%y0: f32[3, 8] grad = aten.gelu(%v0)
%u1: f32[3, 16] grad = aten.linear(%y0, %a1)
%v1: f32[3, 8] grad = aten.linear(%u1, %b1)
%y1: f32[3, 8] grad = aten.gelu(%v1)
%u2: f32[3, 16] grad = aten.linear(%y1, %a2)
%v2: f32[3, 8] grad = aten.linear(%u2, %b2)
%y2: f32[3, 8] grad = aten.gelu(%v2)
return %y2
"""


def marks(graph: Graph) -> dict[str, str]:
    found = {node.name: mark_of(node) for node in graph.calls()}
    return {
        name: f"{mark.region} {mark.mode}{' to the end' if mark.to_the_end else ''}"
        for name, mark in found.items()
        if mark is not None
    }


def test_blocks_and_modes() -> None:
    graph = program(LAYERS)[1]
    ((first, ops, copies),) = find_blocks(graph).regions
    assert (first.name, ops, copies) == ("u0", 3, 3)
    found = marks(mark_recompute(graph, [Recompute("u0", 3, 1, 1)]))
    assert found == {
        **dict.fromkeys(("u0", "v0", "y0"), "block_0_0 full"),
        **dict.fromkeys(("u1", "v1", "y1"), "block_0_1 selective"),
    }
    assert not marks(graph)
    assert not marks(mark_recompute(graph))


def test_a_block_that_there_is_not() -> None:
    graph = program(LAYERS)[1]
    for wrong in (Recompute("u1", 3, 1), Recompute("u0", 2, 1)):
        with pytest.raises(UserError, match="the model has no such block"):
            mark_recompute(graph, [wrong])


def test_another_capture_is_matched_by_its_copies() -> None:
    graph = program(LAYERS.replace("%u", "%w"))[1]
    asked = (Recompute("z", 7, 1), Recompute("u0", 3, 2, 1))
    assert matching_recompute(graph, asked) == (Recompute("w0", 3, 2, 1),)


def test_users_regions_win() -> None:
    text = LAYERS.replace("aten.gelu(%v1)", "aten.gelu(%v1) region=4")
    graph = graph_of(text)
    found = marks(mark_recompute(graph, [Recompute("u0", 3, 3)]))
    assert found["y1"] == "checkpoint_4 full"
    assert "u1" not in found
    assert found["u2"] == "block_0_2 full"


def test_a_reshard_is_recomputed_with_both_its_ends() -> None:
    """The all-reduce inside a copy is in its region, and what comes in from outside is not."""
    mesh, graph = program(LAYERS)
    marked = mark_recompute(graph, [Recompute("u0", 3, 3)])
    chosen = {}
    for i in range(3):
        rules = rules_of(graph)
        column, row = rules[f"u{i}"].outputs[0][1][0], rules[f"v{i}"].inputs[0][1][0]
        chosen |= {f"u{i}": {"tp": Choice(column)}, f"v{i}": {"tp": Choice(row)}}
    storage = {n.name: Sharding.replicated(2) for n in graph.placeholders("param")}
    typed = propagate(marked, mesh, rules_of(graph), chosen, storage)
    lowered = lower_collectives(insert_reshards(typed), mesh)
    inside, outside = [], []
    for node in lowered.calls():
        if "collective" in node.name:
            op, _, source = node.args
            (inside if mark_of(node) else outside).append(f"{op} {source}")
            assert mark_of(node) in (None, mark_of(source))
    assert inside == ["psum v0", "psum v1", "psum v2"]
    assert [text for text in outside if "slice" not in text] == [
        *("pvary h", "pvary y0", "pvary y1")
    ]


def test_an_empty_shard_makes_regions_run_to_their_end() -> None:
    mesh, graph = program(LAYERS.replace("tp=2", "tp=4"))  # three rows on four devices
    marked = mark_recompute(graph, [Recompute("u0", 3, 1, 1)])
    rules = rules_of(graph)
    row = {
        name: {"tp": Choice(rules[name].outputs[0][0][0])}
        for name in (f"{n}{i}" for n in "uvy" for i in range(2))
    }
    storage = {n.name: Sharding.replicated(2) for n in graph.placeholders("param")}
    typed = propagate(marked, mesh, rules, row, storage)
    found = marks(settle_recompute(insert_reshards(typed), mesh))
    assert found["v0"] == "block_0_0 full to the end"
    assert found["v1"] == "block_0_1 selective to the end"
