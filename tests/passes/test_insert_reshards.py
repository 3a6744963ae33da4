"""A reshard wherever a value is not where its reader wants it."""

from __future__ import annotations

import expecttest
import pytest

from autopar.errors import PassError
from autopar.ir.lowered import RESHARD
from autopar.ir.verify import verify

from .helpers import dedent, propagated, resharded, show
from .test_propagate import COLUMN_ROW, MLP, STORED

ZERO = """
mesh dp=2
%w: param f32[8, 4] grad "w"
%x: input f32[2, 4] "x"
%y: f32[2, 8] = aten.linear(%x, %w)
%z: f32[2, 8] = aten.linear(%x, %w)
%s: f32[2, 8] = aten.add.Tensor(%y, %z)
return %s
"""
ON_BATCH = {"y": {"dp": "b"}, "z": {"dp": "b"}, "s": {"dp": "a"}}


class TestInsertReshards(expecttest.TestCase):
    def test_column_then_row(self) -> None:
        _, graph = resharded(MLP, COLUMN_ROW, STORED)
        self.assertExpectedInline(
            show(graph),
            """\
%w1: param f32[16, 8] @ [tp, -] grad "w1"
%b1: param f32[16] @ [tp] grad "b1"
%w2: param f32[8, 16] @ [-, tp] grad "w2"
%b2: param f32[8] @ [-] grad "b2"
%x: input f32[4, 8] @ [-, -] "x"
%reshard: f32[4, 8] @ [dp, -] = reshard(%x, @ [dp, -])
%reshard_1: f32[16, 8] @ [tp, -] ~dp = reshard(%w1, @ [tp, -] ~dp)
%reshard_2: f32[16] @ [tp] ~dp = reshard(%b1, @ [tp] ~dp)
%h: f32[4, 16] @ [dp, tp] = aten.linear(%reshard, %reshard_1, %reshard_2)
%r: f32[4, 16] @ [dp, tp] = aten.relu(%h)
%reshard_3: f32[8, 16] @ [-, tp] ~dp = reshard(%w2, @ [-, tp] ~dp)
%reshard_4: f32[8] @ [-] +tp ~dp = reshard(%b2, @ [-] +tp ~dp)
%y: f32[4, 8] @ [dp, -] +tp = aten.linear(%r, %reshard_3, %reshard_4)
%reshard_5: f32[4, 8] @ [dp, -] = reshard(%y, @ [dp, -])
%loss: f32[] @ [] +dp = aten.sum(%reshard_5)
%reshard_6: f32[] @ [] = reshard(%loss, @ [])
return %reshard_6""",
        )

    def test_readers_share(self) -> None:
        """Two readers that want the same read one gathered copy, made before the first."""
        _, graph = resharded(ZERO, ON_BATCH, {"w": "[dp, -]"})
        self.assertExpectedInline(
            show(graph),
            """\
%w: param f32[8, 4] @ [dp, -] grad "w"
%x: input f32[2, 4] @ [-, -] "x"
%reshard: f32[2, 4] @ [dp, -] = reshard(%x, @ [dp, -])
%reshard_1: f32[8, 4] @ [-, -] ~dp = reshard(%w, @ [-, -] ~dp)
%y: f32[2, 8] @ [dp, -] = aten.linear(%reshard, %reshard_1)
%z: f32[2, 8] @ [dp, -] = aten.linear(%reshard, %reshard_1)
%s: f32[2, 8] @ [dp, -] = aten.add.Tensor(%y, %z)
%reshard_2: f32[2, 8] @ [-, -] = reshard(%s, @ [-, -])
return %reshard_2""",
        )

    def test_arguments_in_lists(self) -> None:
        _, graph = resharded(
            """
            mesh dp=2
            %x: input f32[4, 2] "x"
            %y: input f32[4, 2] "y"
            %z: f32[4, 4] = aten.cat([%x, %y], 1)
            return %z
            """,
            {"z": {"dp": "a"}},
        )
        self.assertExpectedInline(
            show(graph),
            """\
%x: input f32[4, 2] @ [-, -] "x"
%y: input f32[4, 2] @ [-, -] "y"
%reshard: f32[4, 2] @ [dp, -] = reshard(%x, @ [dp, -])
%reshard_1: f32[4, 2] @ [dp, -] = reshard(%y, @ [dp, -])
%z: f32[4, 4] @ [dp, -] = aten.cat([%reshard, %reshard_1], 1)
%reshard_2: f32[4, 4] @ [-, -] = reshard(%z, @ [-, -])
return %reshard_2""",
        )


def test_nothing_to_do() -> None:
    text = dedent(
        """
        %w: param f32[8, 4] @ [-, -] grad "w"
        %x: input f32[2, 4] @ [-, -] "x"
        %y: f32[2, 8] @ [-, -] = aten.linear(%x, %w)
        return %y
        """
    )
    _, graph = resharded("mesh dp=2\n" + text, {})
    assert show(graph) == text


def test_wants_are_used_up() -> None:
    _, graph = resharded(ZERO, ON_BATCH, {"w": "[dp, -]"})
    assert not any("wants" in node.meta for node in graph.fx.nodes)


def test_the_invariant_sees_a_missing_reshard() -> None:
    mesh, graph = propagated(ZERO, ON_BATCH, {"w": "[dp, -]"})
    with pytest.raises(PassError) as caught:
        verify(graph, mesh, ["resharded"], pass_name="insert_reshards")
    assert str(caught.value) == (
        "after insert_reshards: resharded fails: %y takes [-, -], [dp, -] to [dp, -], "
        "which rule ba,ca->bc; linear(0) linear(1) does not allow\n"
        "  node: %y: f32[2, 8] @ [dp, -] = aten.linear(%x, %w)"
    )


def test_every_reshard_changes_something() -> None:
    _, graph = resharded(MLP, COLUMN_ROW, STORED)
    made = [node for node in graph.calls() if node.target is RESHARD]
    assert made
    for node in made:
        assert node.args[0].meta["value"].sharding != node.args[1]
