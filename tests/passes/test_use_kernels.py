"""Kernels where the plan says, with what stands beside them."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest

from autopar.errors import PassError
from autopar.ir.graph import Graph
from autopar.ir.lowered import ALL_REDUCE_NORM, ROUTED_GATHER, LoweredOp
from autopar.ir.mesh import Mesh
from autopar.ir.pointwise import parse_pointwise
from autopar.ir.recomputed import FULL, MARK, SELECTIVE, Recomputed
from autopar.ir.verify import verify
from autopar.kernel_use import NOWHERE, Places, everywhere
from autopar.passes.use_kernels import sites, use_kernels

from .helpers import program, show

REGION = "Region((8, 4), (((0, 4),), ((0, 4),)))"
DROPOUT = f"""
    mesh dp=2
    %h: input f32[4, 4] "h"
    %r: input f32[4, 4] "r"
    %s: input i64[] "s"
    %g: f32[4, 4] = aten.gelu(%h)
    %m: f32[4, 4] = aten.mul.Tensor(%g, %r)
    %d: f32[4, 4] = dropout(%m, 0.1, %s, 0, {REGION})
    %y: f32[4, 4] = aten.add.Tensor(%r, %d)
    %z: f32[4] = aten.sum.dim_IntList(%y, [1])
    return %z
"""
LOSS = """
    mesh tp=2
    %x: input bf16[4, 8] "x"
    %w: param bf16[16, 8] "w"
    %t: input i64[4] "t"
    %l: bf16[4, 16] = aten.linear(%x, %w)
    %c: f32[4, 16] = aten.to.dtype(%l, f32)
    %k: f32[4, 16] = aten.div.Tensor(%c, 30.0)
    %h: f32[4, 16] = aten.tanh(%k)
    %q: f32[4, 16] = aten.mul.Tensor(%h, 30.0)
    %loss: f32[] = cross_entropy(%q, %t, None, "mean", -100, 0.0, 0, 32, <tp>, None)
    return %loss
"""
BUCKET = """
    mesh dp=2
    %w: param f32[4, 8] "w"
    %v: param f32[8] "v"
    %a: (f32[4, 8], f32[8]) = exchange(pvary, [None, None], <dp>, %w, %v)
    %b: f32[4, 8] = getitem(%a, 0)
    %c: f32[8] = getitem(%a, 1)
    %d: f32[8] = exchange(psum, [None], <dp>, %c)
    return %b, %d
"""


def used(text: str, places: Places, mark: Recomputed | None = None) -> Graph:
    mesh, graph = program(text)
    for node in graph.calls():
        node.meta[MARK] = mark
    made = use_kernels(graph, mesh, places)
    verify(made, mesh, ("topological", "functional", "kernels_fit"), "use_kernels")
    return made


def last_of(graph: Graph, name: str) -> str:
    return next(line for line in show(graph).splitlines() if line.startswith(f"%{name}:"))


class TestUseKernels(expecttest.TestCase):
    def test_neighbours_of_dropout_become_its_prologue_and_epilogue(self) -> None:
        self.assertExpectedInline(
            show(used(DROPOUT, everywhere())),
            """\
%h: input f32[4, 4] "h"
%r: input f32[4, 4] "r"
%s: input i64[] "s"
%d: f32[4, 4] = dropout(%h, 0.1, %s, 0, Region((8, 4), (((0, 4),), ((0, 4),))), kernel=Fusion(prologue=pointwise("t0 = mul(x, 0.7071067811865476); t1 = erf(t0); t2 = add(t1, 1.0); t3 = mul(x, t2); t4 = mul(t3, 0.5); mul(t4, a0)"), epilogue=pointwise("add(a0, x)")), extras=(%r, %r), dtype=f32)
%z: f32[4] = aten.sum.dim_IntList(%d, [1])
return %z""",
        )

    def test_casts_and_a_soft_cap_become_the_prologue_of_cross_entropy(self) -> None:
        self.assertExpectedInline(
            show(used(LOSS, everywhere())),
            """\
%x: input bf16[4, 8] "x"
%w: param bf16[16, 8] "w"
%t: input i64[4] "t"
%l: bf16[4, 16] = aten.linear(%x, %w)
%loss: f32[] = cross_entropy(%l, %t, None, "mean", -100, 0.0, 0, 32, <tp>, None, kernel=pointwise("t0 = div(x, 30.0); t1 = tanh(t0); mul(t1, 30.0)"), dtype=f32, in_place=True)
return %loss""",
        )

    def test_buckets_are_packed_by_the_kernel(self) -> None:
        self.assertExpectedInline(
            show(used(BUCKET, everywhere())),
            """\
%w: param f32[4, 8] "w"
%v: param f32[8] "v"
%a: (f32[4, 8], f32[8]) = exchange(pvary, [None, None], <dp>, %w, %v, kernel=True)
%b: f32[4, 8] = getitem(%a, 0)
%c: f32[8] = getitem(%a, 1)
%d: f32[8] = exchange(psum, [None], <dp>, %c)
return %b, %d""",
        )

    def test_gradients_travel_as_int8_where_a_user_asks_for_it(self) -> None:
        places = Places({"int8": frozenset({"dp"})})
        self.assertExpectedInline(
            last_of(used(BUCKET, places), "a"),
            """%a: (f32[4, 8], f32[8]) = exchange(pvary, [None, None], <dp>, %w, %v, kernel="int8")""",
        )

    def test_a_value_of_16_bits_is_rounded_as_every_op_rounds_it(self) -> None:
        text = DROPOUT.replace("f32", "bf16")
        self.assertExpectedInline(
            last_of(used(text, everywhere()), "d"),
            """%d: bf16[4, 4] = dropout(%h, 0.1, %s, 0, Region((8, 4), (((0, 4),), ((0, 4),))), kernel=Fusion(prologue=pointwise("t0 = mul(x, 0.7071067811865476); t1 = erf(t0); t2 = add(t1, 1.0); t3 = mul(x, t2); t4 = mul(t3, 0.5); t5 = cast_bf16(t4); t6 = mul(t5, a0); cast_bf16(t6)"), epilogue=pointwise("t0 = cast_bf16(x); t1 = add(a0, t0); cast_bf16(t1)")), extras=(%r, %r), dtype=bf16)""",
        )


@pytest.mark.parametrize("text", [DROPOUT, LOSS, BUCKET])
@pytest.mark.parametrize("places", [NOWHERE, Places({"dropout": frozenset({"other"})})])
def test_nothing_to_do_is_identity(text: str, places: Places) -> None:
    assert show(used(text, places)) == show(program(text)[1])


def test_only_the_places_of_the_plan() -> None:
    text = DROPOUT.replace("%z:", f"%e: f32[4, 4] = dropout(%y, 0.5, %s, 1, {REGION})\n    %z:")
    made = show(used(text, Places({"dropout": frozenset({"e"})})))
    assert made.count("kernel=") == 1
    assert "kernel" in last_of(used(text, Places({"dropout": frozenset({"e"})})), "e")


def test_a_value_that_others_read_is_not_folded() -> None:
    made = used(DROPOUT.replace("return %z", "return %z, %m, %d"), everywhere())
    assert "kernel=Fusion(), extras=()" in last_of(made, "d")
    found = notes(DROPOUT.replace("return %z", "return %z, %m"))
    assert found == {"dropout": "the mul before it has other readers"}


def test_a_region_that_is_recomputed_as_a_whole_is_folded_and_a_selective_one_is_not() -> None:
    full = used(DROPOUT, everywhere(), Recomputed("r", FULL))
    assert "aten.gelu" not in show(full)
    selective = used(DROPOUT, everywhere(), Recomputed("r", SELECTIVE))
    assert "aten.gelu" in show(selective)
    assert "kernel=Fusion()" in last_of(selective, "d")


def test_a_region_ends_at_its_marks() -> None:
    mesh, graph = program(DROPOUT)
    for node in graph.calls():
        node.meta[MARK] = Recomputed("r", FULL) if node.name in ("g", "m") else None
    made = use_kernels(graph, mesh, everywhere())
    assert "aten.mul" in show(made)
    assert "prologue" not in last_of(made, "d")


def test_a_rank_without_elements_folds_nothing() -> None:
    empty = DROPOUT.replace("f32[4, 4]", "f32[0, 4]").replace(
        "(0, 4),), ((0, 4)", "(0, 0),), ((0, 4)"
    )
    assert show(used(empty, everywhere())) == show(program(empty)[1])


def test_shapes_that_broadcast_are_not_folded() -> None:
    text = DROPOUT.replace('%r: input f32[4, 4] "r"', '%r: input f32[4] "r"')
    assert "kernel=Fusion(), extras=()" in last_of(used(text, everywhere()), "d")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (("return %loss", "return %loss, %l"), "logits are kept: others read them"),
        (
            ("%l: bf16[4, 16] = aten.linear(%x, %w)", "%l: bf16[4, 16] = aten.exp(%o)"),
            "logits are kept: they are an input",
        ),
    ],
)
def test_logits_that_are_read_or_saved_are_kept(changed: tuple[str, str], why: str) -> None:
    text = LOSS.replace(*changed).replace("%t: input", '%o: input bf16[4, 16] "o"\n    %t: input')
    assert "in_place" not in last_of(used(text, everywhere()), "loss")
    assert notes(text) == {"cross_entropy": why}


def notes(text: str) -> dict[str, str]:
    mesh, graph = program(text)
    return {site.kernel: site.note for site in sites(graph.copy(), mesh, everywhere()) if site.note}


def test_the_invariant_says_what_does_not_fit() -> None:
    made = used(DROPOUT, everywhere())
    node = next(n for n in made.calls() if n.name == "d")
    node.kwargs = {**node.kwargs, "extras": ()}
    with pytest.raises(PassError, match="%d has 0 further tensors, its kernel reads 2"):
        verify(made, Mesh(()), ("kernels_fit",), "use_kernels")


NORM = """
    mesh dp=2
    %x: input f32[2, 4] "x"
    %r: input f32[2, 4] "r"
    %z: input f32[4] "z"
    %d: f32[2, 4] = aten.clone(%x)
    return %d
"""


@pytest.mark.parametrize(
    ("target", "epilogue", "extras", "message"),
    [
        (ALL_REDUCE_NORM, "mul(x, x)", (), ""),
        (ALL_REDUCE_NORM, "add(a0, x)", (), "has 0 further tensors, its kernel reads 1"),
        (ROUTED_GATHER, "add(a0, x)", ("r",), ""),
        (ROUTED_GATHER, "add(a0, x)", ("z",), "reads z, which has another shape than its result"),
        (ROUTED_GATHER, "mul(x, x)", ("r",), "has 1 further tensors, its kernel reads 0"),
    ],
)
def test_epilogues_fit(
    target: LoweredOp, epilogue: str, extras: tuple[str, ...], message: str
) -> None:
    mesh, graph = program(NORM)
    named = {node.name: node for node in graph.fx.nodes}
    (node,) = graph.calls()
    node.target = target
    kwargs: Any = {"epilogue": parse_pointwise(epilogue)}
    node.kwargs = kwargs | ({"extras": tuple(named[n] for n in extras)} if extras else {})
    if not message:
        verify(graph, mesh, ("kernels_fit",), "use_kernels")
        return
    with pytest.raises(PassError, match=message):
        verify(graph, mesh, ("kernels_fit",), "use_kernels")
