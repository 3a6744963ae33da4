"""Which Triton a lowered program launches, with what the plan has folded into it."""

from __future__ import annotations

import pytest

from autopar.ir.pointwise import parse_pointwise
from autopar.kernel_forms import OwnKernel, own_kernels
from autopar.kernel_use import everywhere
from autopar.passes.fuse_all_reduce_norm import fuse_all_reduce_norm
from autopar.passes.use_kernels import use_kernels
from autopar.runtime.kernels import all_reduce_norm, combine, permute

from .passes.helpers import program

NORM = """
mesh dp=2 x tp=4
%w: param f32[64] grad "w"
%r: input f32[2, 64] grad "r"
%x: input bf16[2, 64] grad "x"
%p: bf16[2, 64] grad = exchange(psum, [None], <tp>, %x)
%s: f32[2, 64] grad = aten.add.Tensor(%r, %p)
%n: f32[2, 64] grad = aten.rms_norm(%s, [64], %w, 1e-06)
%c: bf16[2, 64] grad = aten._to_copy(%n, dtype=bf16)
return %c, %s
"""
COMBINED = """
mesh dp=2
%x: input bf16[8, 64] grad "x"
%slot: input i64[6] "slot"
%column: input f32[6, 1] grad "w"
%z: input bf16[3, 64] grad "z"
%rows: bf16[6, 64] grad = routed_gather(%x, [%slot], Route(0, (16,), ((0, 8), (8, 16))), <dp>)
%v: f32[6, 1] grad = aten.exp(%column)
%scaled: f32[6, 64] grad = aten.mul.Tensor(%rows, %v)
%view: f32[3, 2, 64] grad = aten.reshape(%scaled, [3, 2, 64])
%sum: f32[3, 64] grad = aten.sum.dim_IntList(%view, [1])
%out: f32[3, 64] grad = aten.add.Tensor(%sum, %z)
return %out
"""
SPREAD = """
mesh dp=2
%x: input f32[8, 4] "x"
%tokens: input f32[3, 4] grad "tokens"
%slot: input i64[6] "slot"
%w: input f32[6] grad "w"
%column: f32[6, 1] grad = aten.reshape(%w, [6, 1])
%lone: f32[3, 1, 4] grad = aten.reshape(%tokens, [3, 1, 4])
%wide: f32[3, 2, 4] grad = aten.expand(%lone, [3, 2, 4])
%copies: f32[6, 4] grad = aten.reshape(%wide, [6, 4])
%scaled: f32[6, 4] grad = aten.mul.Tensor(%copies, %column)
%out: f32[8, 4] grad = routed_scatter(%x, [%slot], %scaled, Route(0, (16,), ((0, 8), (8, 16))), <dp>, True)
return %out
"""


def launched(text: str) -> list[OwnKernel]:
    mesh, graph = program(text)
    places = everywhere()
    return own_kernels(use_kernels(fuse_all_reduce_norm(graph, places), mesh, places), mesh, ())


def test_a_norm_is_of_its_width_ranks_and_epilogue() -> None:
    (found,) = launched(NORM)
    assert (found.use, found.places) == ("all_reduce_norm", 1)
    assert found.form.kernel == all_reduce_norm.emit(parse_pointwise("cast_bf16(x)"))
    constants = {"EPS": 1e-6, "RANK": 0, "RANKS": 4, "WIDTH": 64, "BLOCK": 64}
    assert found.form.constants == constants
    kinds = [found.form.signature[f"{n}_ptr"] for n in ("x", "residual", "weight", "y", "sum")]
    assert kinds == ["*bf16", "*fp32", "*fp32", "*bf16", "*fp32"]


def test_a_combination_has_its_residual_and_its_backward() -> None:
    found = launched(COMBINED)
    residual = parse_pointwise("add(x, a0)")
    assert [one.form.kernel for one in found] == [
        permute.emit(),
        permute.emit_sum(),
        combine.emit(residual),
        combine.emit_backward(residual, True, ("weight", "y")),
    ]
    signature = found[2].form.signature
    kinds = {n: signature[n] for n in ("y_ptr", "weight_ptr", "a0_ptr", "out_ptr")}
    assert kinds == {
        "y_ptr": "*bf16",
        "weight_ptr": "*fp32",
        "a0_ptr": "*bf16",
        "out_ptr": "*fp32",
    }
    for one in found:
        assert one.use == "permute" and one.form.constants["WIDTH"] == 64


@pytest.mark.parametrize("adds", [True, False])
def test_copies_that_are_sent_weighted(adds: bool) -> None:
    found = launched(SPREAD if adds else SPREAD.replace("<dp>, True)", "<dp>, False)"))
    put = permute.emit_sum(parse_pointwise("add(x, a0)")) if adds else permute.emit(default=True)
    assert [one.form.kernel for one in found] == [
        permute.emit(weighted=True),
        put,
        permute.emit(),
        combine.emit(),
        combine.emit_backward(parse_pointwise("x"), True, ("weight",)),
    ]
    assert [one.form.constants.get("SLOTS") for one in found[:3]] == [2, 1, 1]
    assert found[3].form.constants["K"] == 2
