"""Every value gets the sharding that the choices imply, every op says what it wants."""

from __future__ import annotations

import expecttest
import pytest

from autopar.errors import PassError
from autopar.ir.graph import Graph

from .helpers import dedent, propagated, show

MLP = """
mesh dp=2 x tp=2
%w1: param f32[16, 8] grad "w1"
%b1: param f32[16] grad "b1"
%w2: param f32[8, 16] grad "w2"
%b2: param f32[8] grad "b2"
%x: input f32[4, 8] "x"
%h: f32[4, 16] = aten.linear(%x, %w1, %b1)
%r: f32[4, 16] = aten.relu(%h)
%y: f32[4, 8] = aten.linear(%r, %w2, %b2)
%loss: f32[] = aten.sum(%y)
return %loss
"""
COLUMN_ROW = {
    "h": {"dp": "b", "tp": "c"},
    "r": {"dp": "a", "tp": "b"},
    "y": {"dp": "b", "tp": "a"},
    "loss": {"dp": "a"},
}
STORED = {"w1": "[tp, -]", "b1": "[tp]", "w2": "[-, tp]"}


def wants(graph: Graph) -> str:
    return "\n".join(
        f"{node.name}: {', '.join(map(str, node.meta['wants']))}"
        for node in graph.fx.nodes
        if "wants" in node.meta
    )


class TestPropagate(expecttest.TestCase):
    def test_column_then_row(self) -> None:
        """The row-parallel bias is an addend: wanted partial on tp, and varying on dp."""
        _, graph = propagated(MLP, COLUMN_ROW, STORED)
        self.assertExpectedInline(
            show(graph),
            """\
%w1: param f32[16, 8] @ [tp, -] grad "w1"
%b1: param f32[16] @ [tp] grad "b1"
%w2: param f32[8, 16] @ [-, tp] grad "w2"
%b2: param f32[8] @ [-] grad "b2"
%x: input f32[4, 8] @ [-, -] "x"
%h: f32[4, 16] @ [dp, tp] = aten.linear(%x, %w1, %b1)
%r: f32[4, 16] @ [dp, tp] = aten.relu(%h)
%y: f32[4, 8] @ [dp, -] +tp = aten.linear(%r, %w2, %b2)
%loss: f32[] @ [] +dp = aten.sum(%y)
return %loss""",
        )
        self.assertExpectedInline(
            wants(graph),
            """\
h: [dp, -], [tp, -] ~dp, [tp] ~dp
r: [dp, tp]
y: [dp, tp], [-, tp] ~dp, [-] +tp ~dp
loss: [dp, -]
output: []""",
        )

    def test_norm_weight_varies_on_tp(self) -> None:
        """Under sequence parallelism each rank of tp has a part of the norm's gradient."""
        _, graph = propagated(
            """
            mesh dp=2 x tp=2
            %w: param f32[8] grad "w"
            %x: input f32[4, 6, 8] grad "x"
            %y: f32[4, 6, 8] = aten.layer_norm(%x, [8], %w)
            %z: f32[4, 6, 8] = aten.mul.Tensor(%y, %w)
            return %z
            """,
            {"y": {"dp": "a", "tp": "b"}, "z": {"dp": "a"}},
        )
        self.assertExpectedInline(
            wants(graph),
            """\
y: [dp, tp, -], [-] ~dp ~tp
z: [dp, -, -], [-] ~dp
output: [-, -, -]""",
        )

    def test_strided_qkv(self) -> None:
        """A third of each part of a fused projection: the weight is split in three places."""
        _, graph = propagated(
            """
            mesh tp=2
            %w: param f32[24, 8] grad "w"
            %x: input f32[4, 8] "x"
            %h: f32[4, 24] = aten.linear(%x, %w)
            %s: (f32[4, 8], f32[4, 8], f32[4, 8]) = aten.split.Tensor(%h, 8, 1)
            %q: f32[4, 8] = getitem(%s, 0)
            %y: f32[4, 2, 4] = aten.reshape(%q, [4, 2, 4])
            return %y
            """,
            {"h": {"tp": "c"}, "s": {"tp": "b"}, "y": {"tp": "b"}},
            {"w": "[3:tp, -]"},
        )
        self.assertExpectedInline(
            show(graph),
            """\
%w: param f32[24, 8] @ [3:tp, -] grad "w"
%x: input f32[4, 8] @ [-, -] "x"
%h: f32[4, 24] @ [-, tp] = aten.linear(%x, %w)
%s: (f32[4, 8] @ [-, tp], f32[4, 8] @ [-, tp], f32[4, 8] @ [-, tp]) = aten.split.Tensor(%h, 8, 1)
%q: f32[4, 8] @ [-, tp] = getitem(%s, 0)
%y: f32[4, 2, 4] @ [-, tp, -] = aten.reshape(%q, [4, 2, 4])
return %y""",
        )
        self.assertExpectedInline(
            wants(graph),
            """\
h: [-, -], [tp, -]
s: [-, 3:tp]
y: [-, tp]
output: [-, -, -]""",
        )

    def test_flattened_batch_keeps_runs_together(self) -> None:
        """Seven samples over four: their tokens move in blocks of a sample."""
        _, graph = propagated(
            """
            mesh dp=4
            %x: input f32[7, 5, 8] "x"
            %y: f32[35, 8] = aten.reshape(%x, [35, 8])
            return %y
            """,
            {"y": {"dp": "a"}},
        )
        self.assertExpectedInline(
            show(graph),
            """\
%x: input f32[7, 5, 8] @ [-, -, -] "x"
%y: f32[35, 8] @ [dp*5, -] = aten.reshape(%x, [35, 8])
return %y""",
        )

    def test_two_axes_on_one_dim(self) -> None:
        _, graph = propagated(
            """
            mesh dp=2 x tp=2
            %x: input f32[8, 4] "x"
            %y: f32[8] = aten.sum.dim_IntList(%x, [1])
            %m: f32[] = aten.amax(%y)
            return %m
            """,
            {"y": {"dp": "a", "tp": "a"}, "m": {"dp": "a", "tp": "a"}},
        )
        self.assertExpectedInline(
            show(graph),
            """\
%x: input f32[8, 4] @ [-, -] "x"
%y: f32[8] @ [dp&tp] = aten.sum.dim_IntList(%x, [1])
%m: f32[] @ [] max(dp) max(tp) = aten.amax(%y)
return %m""",
        )

    def test_only_what_flows_needs_a_gradient(self) -> None:
        """Without gradients nothing is wanted varying."""
        text = dedent(MLP).replace(" grad", "")
        _, graph = propagated(text, COLUMN_ROW, STORED)
        assert "~" not in wants(graph)

    def test_regather_is_noted(self) -> None:
        _, graph = propagated(MLP, {}, {"w1": "[dp, -]"}, regather="w1")
        noted = [node.name for node in graph.placeholders() if node.meta["regather"]]
        assert noted == ["w1"]


def test_nothing_to_do() -> None:
    text = dedent(
        """
        %w: param f32[8, 4] @ [-, -] grad "w"
        %x: input f32[2, 4] @ [-, -] "x"
        %y: f32[2, 8] @ [-, -] = aten.linear(%x, %w)
        return %y
        """
    )
    _, graph = propagated("mesh dp=2\n" + text, {})
    assert show(graph) == text
    assert wants(graph) == "y: [-, -], [-, -]\noutput: [-, -]"


def test_illegal_choices() -> None:
    text = """
        mesh dp=2 x tp=2
        %x: input f32[4, 6] "x"
        %y: f32[24] = aten.reshape(%x, [24])
        return %y
        """
    with pytest.raises(PassError) as caught:
        propagated(text, {"y": {"dp": "a", "tp": "b"}})
    assert str(caught.value) == (
        "after propagate: rule_allows fails: "
        "%y cannot do dp=a tp=b under ab->(ab); linear(0)\n"
        "  node: %y: f32[24] = aten.reshape(%x, [24])"
    )
