"""Reshards become typed collectives, one axis at a time."""

from __future__ import annotations

import expecttest
import pytest

from autopar.errors import PassError
from autopar.ir.verify import verify
from autopar.passes.lower_collectives import lower_collectives

from .helpers import dedent, lowered, program, resharded, show
from .test_insert_reshards import ON_BATCH, ZERO
from .test_propagate import COLUMN_ROW, MLP, STORED

TIED = """
mesh dp=2 x tp=2
%w: param f32[7, 4] grad "wte.weight", "head.weight"
%ids: input i64[6] "ids"
%x: f32[6, 4] = aten.embedding(%w, %ids)
%y: f32[6, 7] = aten.linear(%x, %w)
%loss: f32[] = aten.cross_entropy_loss(%y, %ids)
return %loss
"""


class TestLowerCollectives(expecttest.TestCase):
    def test_column_then_row(self) -> None:
        """The bias is added once: kept by the first rank of tp, zero on the other."""
        _, graph = lowered(MLP, COLUMN_ROW, STORED)
        self.assertExpectedInline(
            show(graph),
            """\
%w1: param f32[16, 8] @ [tp, -] grad "w1"
%b1: param f32[16] @ [tp] grad "b1"
%w2: param f32[8, 16] @ [-, tp] grad "w2"
%b2: param f32[8] @ [-] grad "b2"
%x: input f32[4, 8] @ [-, -] "x"
%collective: f32[4, 8] @ [dp, -] = collective(slice_inv, "dp", %x)
%collective_1: f32[16, 8] @ [tp, -] ~dp = collective(pvary, "dp", %w1)
%collective_2: f32[16] @ [tp] ~dp = collective(pvary, "dp", %b1)
%h: f32[4, 16] @ [dp, tp] = aten.linear(%collective, %collective_1, %collective_2)
%r: f32[4, 16] @ [dp, tp] = aten.relu(%h)
%collective_3: f32[8, 16] @ [-, tp] ~dp = collective(pvary, "dp", %w2)
%collective_4: f32[8] @ [-] ~dp = collective(pvary, "dp", %b2)
%collective_5: f32[8] @ [-] +tp ~dp = collective(keep_first, "tp", %collective_4)
%y: f32[4, 8] @ [dp, -] +tp = aten.linear(%r, %collective_3, %collective_5)
%collective_6: f32[4, 8] @ [dp, -] = collective(psum, "tp", %y)
%loss: f32[] @ [] +dp = aten.sum(%collective_6)
%collective_7: f32[] @ [] = collective(psum, "dp", %loss)
return %collective_7""",
        )

    def test_readers_share(self) -> None:
        _, graph = lowered(ZERO, ON_BATCH, {"w": "[dp, -]"})
        self.assertExpectedInline(
            show(graph),
            """\
%w: param f32[8, 4] @ [dp, -] grad "w"
%x: input f32[2, 4] @ [-, -] "x"
%collective: f32[2, 4] @ [dp, -] = collective(slice_inv, "dp", %x)
%collective_1: f32[8, 4] @ [-, -] ~dp = collective(gather_vary, "dp", %w)
%y: f32[2, 8] @ [dp, -] = aten.linear(%collective, %collective_1)
%z: f32[2, 8] @ [dp, -] = aten.linear(%collective, %collective_1)
%s: f32[2, 8] @ [dp, -] = aten.add.Tensor(%y, %z)
%collective_2: f32[2, 8] @ [-, -] = collective(gather_inv, "dp", %s)
return %collective_2""",
        )

    def test_tied_embedding(self) -> None:
        """The rows of one weight, embedding and head, over tp: its gradient is reduced over dp once."""
        _, graph = lowered(
            TIED,
            {
                "x": {"dp": "c", "tp": "a"},
                "y": {"dp": "b", "tp": "c"},
                "loss": {"dp": "b", "tp": "a"},
            },
            {"w": "[tp, -]"},
        )
        self.assertExpectedInline(
            show(graph),
            """\
%w: param f32[7, 4] @ [tp, -] grad "wte.weight", "head.weight"
%ids: input i64[6] @ [-] "ids"
%collective: f32[7, 4] @ [tp, -] ~dp = collective(pvary, "dp", %w)
%collective_1: i64[6] @ [dp] = collective(slice_inv, "dp", %ids)
%x: f32[6, 4] @ [dp, -] +tp = aten.embedding(%collective, %collective_1)
%collective_2: f32[6, 4] @ [dp, -] = collective(psum, "tp", %x)
%collective_3: f32[6, 4] @ [dp, -] ~tp = collective(pvary, "tp", %collective_2)
%y: f32[6, 7] @ [dp, tp] = aten.linear(%collective_3, %collective)
%loss: f32[] @ [] +dp = aten.cross_entropy_loss(%y, %collective_1)
%collective_4: f32[] @ [] = collective(psum, "dp", %loss)
return %collective_4""",
        )

    def test_two_axes(self) -> None:
        """Both axes split one dim; shrinking steps come before growing ones."""
        mesh, graph = program(
            """
            mesh dp=2 x tp=4
            %p: input f32[16, 8] @ [-, tp] +dp grad "p"
            %a: f32[16, 8] @ [dp, -] ~tp = reshard(%p, @ [dp, -] ~tp)
            %s: input f32[16, 8] @ [dp&tp, -] grad "s"
            %b: f32[16, 8] @ [-, tp] = reshard(%s, @ [-, tp])
            return
            """
        )
        self.assertExpectedInline(
            show(lower_collectives(graph, mesh)),
            """\
%p: input f32[16, 8] @ [-, tp] +dp grad "p"
%collective: f32[16, 8] @ [dp, tp] = collective(scatter_sum, "dp", %p)
%collective_1: f32[16, 8] @ [dp, -] ~tp = collective(gather_vary, "tp", %collective)
%s: input f32[16, 8] @ [dp&tp, -] grad "s"
%collective_2: f32[16, 8] @ [dp, tp] = collective(swap, "tp", %s)
%collective_3: f32[16, 8] @ [-, tp] = collective(gather_inv, "dp", %collective_2)
return""",
        )

    def test_strided_to_whole_and_plain(self) -> None:
        mesh, graph = program(
            """
            mesh tp=2
            %w: param f32[24, 8] @ [3:tp, -] grad "w"
            %a: f32[24, 8] @ [-, -] ~tp = reshard(%w, @ [-, -] ~tp)
            %b: f32[24, 8] @ [tp, -] = reshard(%w, @ [tp, -])
            return
            """
        )
        self.assertExpectedInline(
            show(lower_collectives(graph, mesh)),
            """\
%w: param f32[24, 8] @ [3:tp, -] grad "w"
%collective: f32[24, 8] @ [-, -] ~tp = collective(gather_vary, "tp", %w)
%collective_1: f32[24, 8] @ [-, -] = collective(gather_inv, "tp", %w)
%collective_2: f32[24, 8] @ [tp, -] = collective(slice_inv, "tp", %collective_1)
return""",
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
    mesh, graph = program("mesh dp=2\n" + text)
    assert show(lower_collectives(graph, mesh)) == text


def test_the_invariant_sees_a_reshard() -> None:
    mesh, graph = resharded(ZERO, ON_BATCH, {"w": "[dp, -]"})
    with pytest.raises(PassError) as caught:
        verify(graph, mesh, ["types_follow"], pass_name="lower_collectives")
    assert str(caught.value) == (
        "after lower_collectives: types_follow fails: %reshard = reshard is not a typed collective\n"
        "  node: %reshard: f32[2, 4] @ [dp, -] = reshard(%x, @ [dp, -])"
    )


def test_the_invariant_sees_an_invariant_weight() -> None:
    """A weight that is R where the batch is split would get a part of its gradient for all of it."""
    mesh, graph = program(
        """
        mesh dp=2
        %w: param f32[8, 4] @ [-, -] grad "w"
        %x: input f32[2, 4] @ [dp, -] "x"
        %y: f32[2, 8] @ [dp, -] = aten.linear(%x, %w)
        return
        """
    )
    with pytest.raises(PassError) as caught:
        verify(graph, mesh, ["types_follow"], pass_name="lower_collectives")
    assert str(caught.value) == (
        "after lower_collectives: types_follow fails: "
        "%y gives %w, R on 'dp', a partial gradient: %x is S\n"
        "  node: %y: f32[2, 8] @ [dp, -] = aten.linear(%x, %w)"
    )
