"""Parameters are not gathered again where only some devices would ask for them."""

from __future__ import annotations

import pytest

from autopar.ir.rule import Choice
from autopar.ir.sharding import Sharding
from autopar.passes.propagate import propagate
from autopar.passes.rules_of import rules_of
from autopar.passes.settle_regather import settle_regather

from .helpers import program

LAYERS = """
mesh dp={size}
%x: input f32[{rows}, 4] "x"
%w: param f32[4, 4] grad "w"
%table: param f32[4, 4] grad "table"
%t: f32[4, 4] grad = aten.t(%w)
%a: f32[{rows}, 4] grad = aten.mm(%x, %t)
return %a, %table
"""


def regathered(rows: int, size: int) -> set[str]:
    mesh, graph = program(LAYERS.format(rows=rows, size=size))
    rules = rules_of(graph)
    row = {"a": {"dp": Choice(rules["a"].outputs[0][0][0])}}
    storage = {n.name: Sharding.replicated(2) for n in graph.placeholders("param")}
    typed = propagate(graph, mesh, rules, row, storage, frozenset(storage))
    before = [n.meta["regather"] for n in typed.placeholders("param")]
    settled = settle_regather(typed, mesh)
    assert [n.meta["regather"] for n in typed.placeholders("param")] == before == [True, True]
    return {n.name for n in settled.placeholders("param") if n.meta["regather"]}


@pytest.mark.parametrize(
    ("rows", "size", "kept"),
    [
        (8, 4, False),
        (4, 4, False),  # one row on every device
        (8, 3, False),  # several rows on every device
        (3, 4, True),  # none on the last one
        (3, 2, True),  # two, and one
        (1, 2, True),
    ],
)
def test_kept_where_devices_differ_in_kind(rows: int, size: int, kept: bool) -> None:
    assert regathered(rows, size) == ({"table"} if kept else {"table", "w"})
