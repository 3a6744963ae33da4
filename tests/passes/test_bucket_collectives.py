"""Gradients and gathered shards of many parameters travel in one message."""

from __future__ import annotations

from typing import Any

import expecttest
import torch.fx

from autopar.ir.graph import Graph
from autopar.ir.lowered import BUCKET
from autopar.ir.verify import verify
from autopar.passes.bucket_collectives import bucket_collectives

from .helpers import dedent, lowered, program, show
from .test_propagate import COLUMN_ROW, MLP, STORED

DATA = {"h": {"dp": "b"}, "r": {"dp": "a"}, "y": {"dp": "b"}, "loss": {"dp": "a"}}


def _inputs(node: Any) -> list[torch.fx.Node]:
    return list(node.args[2])


def buckets(graph: Graph) -> list[tuple[str, str, list[str]]]:
    """(collective, axis, tensors) of every bucket."""
    return [
        (str(node.args[0]), node.args[1], [x.name for x in _inputs(node)])
        for node in graph.calls()
        if node.target is BUCKET
    ]


class TestBucketCollectives(expecttest.TestCase):
    def test_zero_and_data(self) -> None:
        """Sharded weights are gathered together, the gradients of whole ones reduced together."""
        mesh, graph = lowered(
            dedent(MLP).replace("dp=2 x tp=2", "dp=2"), DATA, {"w1": "[dp, -]", "w2": "[-, dp]"}
        )
        made = bucket_collectives(graph, mesh)
        verify(made, mesh, ("typed", "topological", "resharded", "types_follow", "no_dead_code"))
        self.assertExpectedInline(
            show(made),
            """\
%w1: param f32[16, 8] @ [dp, -] grad "w1"
%b1: param f32[16] @ [-] grad "b1"
%w2: param f32[8, 16] @ [-, dp] grad "w2"
%b2: param f32[8] @ [-] grad "b2"
%x: input f32[4, 8] @ [-, -] "x"
%collective: f32[4, 8] @ [dp, -] = collective(slice_inv, "dp", %x)
%bucket: (f32[16, 8] @ [-, -] ~dp, f32[8, 16] @ [-, -] ~dp) = bucket(gather_vary, "dp", [%w1, %w2])
%getitem: f32[16, 8] @ [-, -] ~dp = getitem(%bucket, 0)
%bucket_1: (f32[16] @ [-] ~dp, f32[8] @ [-] ~dp) = bucket(pvary, "dp", [%b1, %b2])
%getitem_2: f32[16] @ [-] ~dp = getitem(%bucket_1, 0)
%h: f32[4, 16] @ [dp, -] = aten.linear(%collective, %getitem, %getitem_2)
%r: f32[4, 16] @ [dp, -] = aten.relu(%h)
%getitem_1: f32[8, 16] @ [-, -] ~dp = getitem(%bucket, 1)
%getitem_3: f32[8] @ [-] ~dp = getitem(%bucket_1, 1)
%y: f32[4, 8] @ [dp, -] = aten.linear(%r, %getitem_1, %getitem_3)
%loss: f32[] @ [] +dp = aten.sum(%y)
%collective_5: f32[] @ [] = collective(psum, "dp", %loss)
return %collective_5""",
        )

    def test_two_axes(self) -> None:
        """All weights vary on dp, whether or not tp splits them; the bias is kept by one of tp."""
        mesh, graph = lowered(MLP, COLUMN_ROW, {**STORED, "b2": "[-]"})
        made = bucket_collectives(graph, mesh)
        verify(made, mesh, ("typed", "topological", "resharded", "types_follow"))
        assert buckets(made) == [("pvary", "dp", ["w1", "b1", "w2", "b2"])]


def test_limit() -> None:
    """A bucket holds about the limit of local bytes, in the order of first use."""
    mesh, graph = lowered(dedent(MLP).replace("dp=2 x tp=2", "dp=2"), DATA)
    assert buckets(bucket_collectives(graph, mesh)) == [("pvary", "dp", ["w1", "b1", "w2", "b2"])]
    assert buckets(bucket_collectives(graph, mesh, limit_bytes=600)) == [
        ("pvary", "dp", ["w1", "b1"]),
        ("pvary", "dp", ["w2", "b2"]),
    ]
    assert buckets(bucket_collectives(graph, mesh, limit_bytes=1)) == []


def test_regathered_parameters_travel_apart() -> None:
    stored = {"w1": "[dp, -]", "b1": "[dp]", "w2": "[dp, -]", "b2": "[dp]"}
    text = dedent(MLP).replace("dp=2 x tp=2", "dp=2")
    mesh, graph = lowered(text, DATA, stored, regather="w1 w2")
    assert buckets(bucket_collectives(graph, mesh)) == [
        ("gather_vary", "dp", ["w1", "w2"]),
        ("gather_vary", "dp", ["b1", "b2"]),
    ]


def test_what_needs_no_gradient_stays() -> None:
    mesh, graph = lowered(
        dedent(MLP).replace("dp=2 x tp=2", "dp=2").replace(" grad", ""),
        DATA,
        {"w1": "[dp, -]", "w2": "[-, dp]"},
    )
    assert buckets(bucket_collectives(graph, mesh)) == []


def test_nothing_to_do() -> None:
    text = dedent(
        """
        %w: param f32[8, 4] @ [-, -] grad "w"
        %x: input f32[2, 4] @ [dp, -] "x"
        %v: f32[8, 4] @ [-, -] ~dp = collective(pvary, "dp", %w)
        %y: f32[2, 8] @ [dp, -] = aten.linear(%x, %v)
        %z: f32[2, 8] @ [-, -] = collective(gather_inv, "dp", %y)
        return %z
        """
    )
    mesh, graph = program("mesh dp=2\n" + text)
    assert show(bucket_collectives(graph, mesh)) == text
