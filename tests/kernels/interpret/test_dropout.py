"""Dropout: the mask of the other paths bit for bit, and what is fused around it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from autopar.errors import KernelWarning
from autopar.ir.lowered import Region
from autopar.ir.pointwise import PLAIN, Fusion, parse_pointwise
from autopar.runtime import sharded_ops
from autopar.runtime.kernels import dropout as module
from autopar.runtime.kernels.dropout import (
    dropout,
    emit,
    emit_backward,
    reference,
    specialisations,
    takes,
)
from autopar.runtime.random import keep_mask, keep_mask_traced, local_shape, whole

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GELU = parse_pointwise(
    "t0 = mul(x, 0.7071067811865476); t1 = erf(t0); t2 = add(t1, 1.0); t3 = mul(x, t2);"
    " mul(t3, 0.5)"
)
RESIDUAL = parse_pointwise("add(x, a0)")
FUSIONS = (
    PLAIN,
    Fusion(epilogue=RESIDUAL),
    Fusion(prologue=GELU),
    Fusion(parse_pointwise("mul(x, a0)"), parse_pointwise("t0 = sigmoid(a0); mul(x, t0)")),
)
REGIONS = {
    "whole": whole((3, 5, 7)),
    "one block more": whole((16385,)),
    "rows": Region((64, 30), (((16, 32),), ((0, 30),))),
    "columns": Region((40, 96), (((0, 40),), ((32, 64),))),
    "both": Region((8, 6, 10), (((4, 8),), ((0, 6),), ((5, 10),))),
    "runs": Region((4, 24), (((0, 4),), ((0, 4), (8, 12), (16, 20)))),
    "uneven runs": Region((5, 24), (((1, 2), (3, 5)), ((0, 3), (8, 12), (23, 24)))),
    "scalar": whole(()),
    "one": whole((1,)),
    "empty": Region((4, 6), (((2, 2),), ((0, 6),))),
    "across 2^32": Region((3, (1 << 31) - 100), (((0, 3),), ((0, 300),))),
    "far": Region((1 << 20, 1 << 20), (((77, 79), (4095, 4098)), ((1 << 19, (1 << 19) + 50),))),
}


def values(region: Region, dtype: torch.dtype, count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = local_shape(region)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)
    ]


def kept(p: float, region: Region, dtype: torch.dtype = torch.float32) -> Tensor:
    """The kernel's mask, seen by what it leaves of ones."""
    return dropout(torch.ones(local_shape(region), dtype=dtype), p, 11, 3, region) != 0


@pytest.mark.parametrize("name", REGIONS)
def test_masks_are_those_of_the_other_paths(name: str) -> None:
    region = REGIONS[name]
    for p in (0.1, 0.5):
        mask = kept(p, region)
        assert torch.equal(mask, keep_mask(p, 11, 3, region))
        assert torch.equal(mask, keep_mask_traced(p, 11, 3, region))


def test_the_index_is_the_global_one_beyond_32_bits() -> None:
    """Rows of one column at a distance of 2^31, hence on both sides of 2^32."""
    size = 1 << 31
    region = Region((5, size), (((0, 5),), ((0, 200),)))
    mask = kept(0.5, region)
    assert torch.equal(mask, keep_mask(0.5, 11, 3, region))
    for row in range(5):
        alone = Region((5, size), (((row, row + 1),), ((0, 200),)))
        assert torch.equal(kept(0.5, alone)[0], mask[row])
    assert len({tuple(row.tolist()) for row in mask}) == 5
    around = Region((2 * size + 50,), (((2 * size - 50, 2 * size + 50),),))
    assert torch.equal(kept(0.5, around), keep_mask(0.5, 11, 3, around))


def test_inductor_makes_the_same_mask() -> None:
    region = REGIONS["uneven runs"]
    made = torch.compile(lambda: keep_mask_traced(0.3, 11, 3, region), fullgraph=True)()
    assert torch.equal(made, kept(0.3, region))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_and_nothing(dtype: torch.dtype) -> None:
    region = REGIONS["rows"]
    (x,) = values(region, dtype)
    x[0, 0], x[0, 1] = math.inf, math.nan
    x.requires_grad_()
    for p, slope in ((0.0, 1.0), (1.0, 0.0)):
        y = dropout(x, p, 11, 3, region)
        wanted = x.detach() if p == 0.0 else torch.zeros_like(x)
        torch.testing.assert_close(y.detach(), wanted, rtol=0, atol=0, equal_nan=True)
        infinite = torch.full_like(y, math.inf if p == 1.0 else 1.0)
        (grad,) = torch.autograd.grad(y, x, infinite)
        assert torch.equal(grad, torch.full_like(grad, slope))


def close(got: Tensor, wanted: Tensor) -> None:
    """Within 4 ulp: `exp` and `erf` of NumPy and of torch differ in the last bits of float32 (and
    of float64), and half-precision results, rounded once, may then be the next number."""
    eps = torch.finfo(got.dtype).eps
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
@pytest.mark.parametrize("name", ["rows", "uneven runs", "one", "empty"])
def test_fusions_forward_and_backward(dtype: torch.dtype, fusion: Fusion, name: str) -> None:
    region = REGIONS[name]
    x, grad, *extras = (t.requires_grad_() for t in values(region, dtype, 2 + fusion.extras))
    y = dropout(x, 0.3, 11, 3, region, fusion, extras)
    wanted = reference(x, keep_mask(0.3, 11, 3, region), 0.3, fusion, extras)
    close(y, wanted)
    found = torch.autograd.grad(y, (x, *extras), grad)
    for got, want in zip(found, torch.autograd.grad(wanted, (x, *extras), grad), strict=True):
        close(got, want)


def test_only_wanted_gradients_and_any_layout() -> None:
    region = REGIONS["rows"]
    x = values(region, torch.float32)[0].t().contiguous().t()
    extra = values(region, torch.bfloat16)[0].requires_grad_()
    y = dropout(x, 0.3, 11, 3, region, Fusion(epilogue=RESIDUAL), [extra], torch.bfloat16)
    assert y.is_contiguous() and y.dtype is torch.bfloat16
    mask = keep_mask(0.3, 11, 3, region)
    close(y, reference(x, mask, 0.3, Fusion(epilogue=RESIDUAL), [extra], torch.bfloat16))
    (grad,) = torch.autograd.grad(y.sum(), extra)
    assert torch.equal(grad, torch.ones_like(extra))


def test_float64_is_computed_in_float64() -> None:
    region = REGIONS["rows"]
    (x,) = values(region, torch.float64)
    mask = keep_mask(0.3, 11, 3, region)
    assert torch.equal(dropout(x, 0.3, 11, 3, region), torch.where(mask, x * (1 / 0.7), 0.0))


def warned(run: object) -> list[str]:
    module.fall_back.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert callable(run)
        run()
        run()
    return [str(w.message) for w in caught if w.category is KernelWarning]


def through_the_op(x: Tensor, region: Region, extras: Sequence[Tensor] = ()) -> Tensor:
    fusion = Fusion(epilogue=RESIDUAL) if extras else PLAIN
    return sharded_ops.dropout(x, 0.3, 11, 3, region, kernel=fusion, extras=extras)


def test_the_lowered_op_uses_it_and_falls_back() -> None:
    region = REGIONS["columns"]
    x, a = values(region, torch.float32, 2)
    mask = keep_mask(0.3, 11, 3, region)
    assert takes(x, [a])
    assert torch.equal(through_the_op(x, region, [a]), torch.where(mask, x * (1 / 0.7), 0.0) + a)
    mixed = a.double()
    (text,) = warned(lambda: through_the_op(x, region, [mixed]))
    assert text == (
        "kernel dropout: it has no form for float64 among other dtypes;"
        " its torch reference runs instead"
    )
    wanted = reference(x, mask, 0.3, Fusion(epilogue=RESIDUAL), [mixed])
    assert torch.equal(through_the_op(x, region, [mixed]), wanted)
    (text,) = warned(lambda: takes(x.to(torch.float8_e4m3fn)))
    assert "it has no form for float8_e4m3fn" in text
    huge = torch.empty(1, dtype=torch.bfloat16).expand(module.REACH + 1)
    (text,) = warned(lambda: takes(huge))
    assert f"{module.REACH + 1} elements are more than the {module.REACH}" in text


def test_starts_are_copied_once() -> None:
    region = REGIONS["both"]
    module._starts.cache_clear()
    for _ in range(3):
        kept(0.1, region)
    assert module._starts.cache_info().misses == 1


def test_forms() -> None:
    forms = specialisations()
    assert len(forms) == 12
    assert {form.constants["WIDE"] for form in forms} == {False, True}
    assert {form.constants["RUNS"] for form in forms} == {1, 2}


def test_source() -> None:
    assert_expected_inline(
        emit(Fusion(GELU, RESIDUAL)).source,
        """\
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["k0", "k1"])
def dropout(
    x_ptr, a0_ptr, y_ptr,
    starts_ptr, n, length, k0, k1,
    LIMIT: tl.constexpr, NONE: tl.constexpr, SCALE: tl.constexpr, RUNS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    i = first + tl.arange(0, BLOCK)
    if RUNS == 1:
        index = tl.load(starts_ptr) + i
    else:
        run = i // length
        index = tl.load(starts_ptr + run, mask=i < n, other=0) + (i - run * length)
    lo = index.to(tl.uint32)
    bits = lo * 0x9e3779b1 + k0.to(tl.uint32, bitcast=True)
    key = k1.to(tl.uint32, bitcast=True)
    if WIDE:
        hi = (index >> 32).to(tl.uint32)
        bits = bits + hi * 0x85ebca77
        key = key ^ (hi * 0xc2b2ae3d)
    bits = (bits ^ (bits >> 16)) * 0xed5ad4bb
    bits = bits ^ key
    bits = (bits ^ (bits >> 15)) * 0xac4c1b51
    bits = (bits ^ (bits >> 16)) * 0x31848bab
    keep = bits >= LIMIT
    if NONE:
        keep = bits != bits
    if first + BLOCK <= n:
        x = tl.load(x_ptr + i).to(tl.float32)
        a0 = tl.load(a0_ptr + i).to(tl.float32)
        p0 = x * (0.7071067811865476)
        p1 = tl.erf(p0)
        p2 = p1 + (1.0)
        p3 = x * p2
        u = p3 * (0.5)
        v = tl.where(keep, u * SCALE, 0.0)
        y = v + a0
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty))
    else:
        x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        a0 = tl.load(a0_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        p0 = x * (0.7071067811865476)
        p1 = tl.erf(p0)
        p2 = p1 + (1.0)
        p3 = x * p2
        u = p3 * (0.5)
        v = tl.where(keep, u * SCALE, 0.0)
        y = v + a0
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < n)
""",
    )


def test_source_of_the_backward() -> None:
    """Nothing but the gradient is read: the mask is computed again. A residual's is the gradient."""
    assert module.added(Fusion(GELU, RESIDUAL)) == ("a0",)
    source = emit_backward(Fusion(epilogue=RESIDUAL), ("x",)).source
    assert_expected_inline(
        source[source.index("    keep =") :],
        """\
    keep = bits >= LIMIT
    if NONE:
        keep = bits != bits
    if first + BLOCK <= n:
        g = tl.load(g_ptr + i).to(tl.float32)
        s_v = (1.0)
        dv = tl.where(keep, g * s_v * SCALE, 0.0)
        s_x = (1.0)
        dx = dv * s_x
        tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty))
    else:
        g = tl.load(g_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        s_v = (1.0)
        dv = tl.where(keep, g * s_v * SCALE, 0.0)
        s_x = (1.0)
        dx = dv * s_x
        tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=i < n)
""",
    )
