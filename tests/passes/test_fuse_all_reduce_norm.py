"""Sum, residual and norm become one op where a plan says so, and only if they are of that form."""

from __future__ import annotations

import expecttest
import pytest

from autopar.ir.verify import verify
from autopar.kernel_use import NOWHERE, Places, everywhere
from autopar.passes.fuse_all_reduce_norm import fuse_all_reduce_norm, norm_sites

from .helpers import dedent, graph_of, show

BLOCK = """
    %w: param f32[8] "w"
    %r: input f32[2, 8] "r"
    %x: input f32[2, 8] "x"
    %p: f32[2, 8] = exchange(psum, [None], <tp>, %x)
    %s: f32[2, 8] = aten.add.Tensor(%r, %p)
    %n: f32[2, 8] = aten.rms_norm(%s, [8], %w, 1e-05)
    %c: bf16[2, 8] = aten._to_copy(%n, dtype=bf16)
    %m: f32[2, 8] = aten.mul.Tensor(%s, 2.0)
    return %c, %m
"""


class TestFuseAllReduceNorm(expecttest.TestCase):
    def test_a_block_and_the_cast_after_it(self) -> None:
        made = fuse_all_reduce_norm(graph_of(BLOCK), everywhere())
        verify(made, None, ("topological", "no_dead_code"))
        self.assertExpectedInline(
            show(made),
            """\
%w: param f32[8] "w"
%r: input f32[2, 8] "r"
%x: input f32[2, 8] "x"
%all_reduce_norm: (bf16[2, 8], f32[2, 8]) = all_reduce_norm(%x, %r, %w, 1e-05, <tp>, epilogue=pointwise("cast_bf16(x)"), dtype=bf16)
%getitem: bf16[2, 8] = getitem(%all_reduce_norm, 0)
%getitem_1: f32[2, 8] = getitem(%all_reduce_norm, 1)
%m: f32[2, 8] = aten.mul.Tensor(%getitem_1, 2.0)
return %getitem, %m""",
        )

    def test_the_sum_has_no_other_reader(self) -> None:
        text = BLOCK.replace("aten.mul.Tensor(%s", "aten.mul.Tensor(%r").replace(", 1e-05", "")
        made = fuse_all_reduce_norm(graph_of(text), everywhere())
        verify(made, None, ("topological", "no_dead_code"))
        self.assertExpectedInline(
            show(made),
            """\
%w: param f32[8] "w"
%r: input f32[2, 8] "r"
%x: input f32[2, 8] "x"
%all_reduce_norm: (bf16[2, 8], f32[2, 8]) = all_reduce_norm(%x, %r, %w, 1.1920928955078125e-07, <tp>, epilogue=pointwise("cast_bf16(x)"), dtype=bf16)
%getitem: bf16[2, 8] = getitem(%all_reduce_norm, 0)
%m: f32[2, 8] = aten.mul.Tensor(%r, 2.0)
return %getitem, %m""",
        )


CHAIN = """
    %w: param f32[8] "w"
    %r: input f32[2, 8] "r"
    %x: input f32[2, 8] "x"
    %p: f32[2, 8] = exchange(psum, [None], <tp>, %x)
    %s: f32[2, 8] = aten.add.Tensor(%r, %p)
    %n: f32[2, 8] = aten.rms_norm(%s, [8], %w, 1e-05)
    %q: f32[2, 8] = exchange(psum, [None], <tp>, %n)
    %t: f32[2, 8] = aten.add.Tensor(%s, %q)
    %m: f32[2, 8] = aten.rms_norm(%t, [8], %w, 1e-05)
    return %m
"""


def test_the_residual_of_one_is_the_sum_of_the_one_before() -> None:
    made = fuse_all_reduce_norm(graph_of(CHAIN), everywhere())
    verify(made, None, ("topological", "no_dead_code"))
    lines = show(made).splitlines()
    assert "%getitem_1: f32[2, 8] = getitem(%all_reduce_norm, 1)" in lines
    assert any("all_reduce_norm(%getitem, %getitem_1, %w, 1e-05, <tp>)" in line for line in lines)


def test_places_are_names_of_norms() -> None:
    graph = graph_of(BLOCK)
    assert [site.norm.name for site in norm_sites(graph)] == ["n"]
    text = dedent(BLOCK)
    for places in (NOWHERE, Places({"all_reduce_norm": frozenset({"s"})})):
        assert show(fuse_all_reduce_norm(graph, places)) == text
    assert show(fuse_all_reduce_norm(graph, Places({"all_reduce_norm": frozenset({"n"})}))) != text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("psum", "pmax"),
        ("%x: input f32[2, 8]", "%x: input f32[1, 8]"),  # broadcast in the add
        ("[None], <tp>, %x)", "[None], <tp>, %x)\n    %q: f32[2, 8] = aten.neg(%p)"),
        ("return %c, %m", "return %c, %m, %p"),
        ("%s, [8]", "%s, [2, 8]"),
        ("aten.add.Tensor(%r, %p)", "aten.sub.Tensor(%r, %p)"),
        ("aten.add.Tensor(%r, %p)", "aten.add.Tensor(%r, %p, alpha=2)"),
    ],
)
def test_other_forms_stay(old: str, new: str) -> None:
    text = BLOCK.replace(old, new)
    if "f32[1, 8]" in new:
        text = text.replace("%p: f32[2, 8]", "%p: f32[1, 8]")
    if "%q" in new:
        text = text.replace("return %c, %m", "return %c, %m, %q")
    assert not list(norm_sites(graph_of(text)))


def test_a_weight_that_comes_after_another_reader_of_the_sum() -> None:
    late = """
        %v: param f32[8] "v"
        %r: input f32[2, 8] "r"
        %x: input f32[2, 8] "x"
        %p: f32[2, 8] = exchange(psum, [None], <tp>, %x)
        %s: f32[2, 8] = aten.add.Tensor(%p, %r)
        %m: f32[2, 8] = aten.mul.Tensor(%s, 2.0)
        %w: f32[8] = exchange(pvary, [None], <tp>, %v)
        %n: f32[2, 8] = aten.rms_norm(%s, [8], %w, 1e-05)
        return %n, %m
    """
    assert not list(norm_sites(graph_of(late)))
    assert len(list(norm_sites(graph_of(late.replace("mul.Tensor(%s", "mul.Tensor(%r"))))) == 1
