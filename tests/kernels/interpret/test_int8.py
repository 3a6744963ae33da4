"""int8 blocks: the kernels against their references, the error that is promised, and overflow."""

from __future__ import annotations

import expecttest
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autopar.ir.pointwise import parse_pointwise
from autopar.runtime.compressed import CompressedGroup
from autopar.runtime.kernels.int8 import (
    BLOCK,
    SMALLEST_SCALE,
    UNIT,
    UNIT_BYTES,
    dequantise,
    emit_dequantise,
    emit_reduce,
    quantise,
    reduce,
    reference,
    reference_dequantise,
    reference_reduce,
    specialisations,
)
from autopar.runtime.thread_world import ThreadWorld, run_threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (0, 1, BLOCK - 1, UNIT, 2 * UNIT + 77)


def sample(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values over many magnitudes, one block of them all zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (4 * torch.rand(n, generator=generator) - 3)
    x[BLOCK : 2 * BLOCK] = 0
    return x.to(dtype)


def scales_of(wire: Tensor) -> Tensor:
    units = wire.shape[1] // UNIT_BYTES
    return wire[:, units * UNIT :].contiguous().view(torch.float32).flatten()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(dtype: torch.dtype, n: int) -> None:
    x = sample(n, dtype)
    wire = quantise(x, pieces=2)
    assert torch.equal(wire, reference(x, pieces=2))
    y = dequantise(wire, n, dtype)
    assert y.dtype == dtype and torch.equal(y, reference_dequantise(wire, n, dtype))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1500), st.floats(-42, 36), st.integers(0, 2**16))
def test_an_element_is_off_by_half_a_scale(n: int, exponent: float, seed: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).double() * 10.0**exponent
    x = x.float()
    wire = reference(x)
    back = reference_dequantise(wire, n, torch.float64)
    error = (back - x.double()).abs()
    # The scale and the product are rounded to float32: 127 units of half a scale's last place each.
    bound = scales_of(wire).double().repeat_interleave(BLOCK)[:n] * (0.5 + 127 * 2.0**-22)
    tiny = 127 * SMALLEST_SCALE  # what a block of zeros stands for
    assert bool((error <= torch.where(bound > 0, bound, tiny)).all())


@pytest.mark.parametrize("members", [1, 2, 5])
def test_the_sum_is_the_unfused_sum(members: int) -> None:
    n = UNIT + 300
    rows = torch.cat([quantise(sample(n, seed=s)) for s in range(members)])
    total = torch.zeros(n)
    for row in rows:
        total = total + dequantise(row[None], n, torch.float32)
    assert torch.equal(dequantise(rows, n, torch.float32, summed=True), total)
    assert torch.equal(reference_dequantise(rows, n, torch.float32, summed=True), total)
    fused = reduce(rows)
    assert torch.equal(fused, reference_reduce(rows))
    assert torch.equal(fused, quantise(total)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_overflow_is_not_hidden(bad: float) -> None:
    x = sample(UNIT)
    x[3 * BLOCK + 5] = bad
    wire = quantise(x)
    assert torch.equal(wire, reference(x))
    rows = torch.cat([quantise(sample(UNIT, seed=1)), wire])
    for back in (
        dequantise(wire, UNIT, torch.float16),
        dequantise(rows, UNIT, torch.float32, summed=True),
        dequantise(reduce(rows)[None], UNIT, torch.bfloat16),
        reference_dequantise(reference_reduce(rows)[None], UNIT, torch.float32),
    ):
        blocks = back.view(-1, BLOCK)
        assert bool(blocks[3].isnan().all())
        assert bool(blocks[:3].isfinite().all()) and bool(blocks[4:].isfinite().all())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_sum_that_overflows_is_not_hidden() -> None:
    big = torch.full((BLOCK,), 3e38)
    rows = torch.cat([quantise(big), quantise(big)])
    assert torch.equal(reduce(rows), reference_reduce(rows))
    assert bool(dequantise(reduce(rows)[None], BLOCK, torch.float32).isnan().all())


def test_an_epilogue_is_applied_before_the_only_rounding() -> None:
    epilogue = parse_pointwise("t0 = mul(x, 0.25); add(t0, 1.0)")
    x = sample(700)
    wire = quantise(x)
    for dtype in DTYPES:
        y = dequantise(wire, 700, dtype, epilogue=epilogue)
        assert torch.equal(y, reference_dequantise(wire, 700, dtype, epilogue=epilogue))
        plain = reference_dequantise(wire, 700, torch.float32)
        assert torch.equal(y, (plain * 0.25 + 1.0).to(dtype))
    with pytest.raises(ValueError, match="reads further tensors"):
        emit_dequantise(parse_pointwise("add(x, a0)"))


def test_an_all_reduce_is_made_of_them() -> None:
    world, n = ThreadWorld(2), 2 * UNIT + 77
    parts = [sample(n, seed=s) for s in range(2)]
    found = run_threads(
        world, lambda r: CompressedGroup(world.group(r)).all_reduce(parts[r]).wait()
    )
    rows = [reference(x, pieces=2) for x in parts]
    sums = [reference_reduce(torch.stack([row[piece] for row in rows])) for piece in range(2)]
    wanted = reference_dequantise(torch.stack(sums), n, torch.float32)
    assert torch.equal(found[0], wanted) and torch.equal(found[1], wanted)


def test_few_forms() -> None:
    assert len(specialisations()) == 10


class Golden(expecttest.TestCase):
    def test_reduce(self) -> None:
        self.assertExpectedInline(
            emit_reduce().source,
            """\
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["units", "members"])
def int8_reduce(
    codes_ptr, scales_ptr, out_codes_ptr, out_scales_ptr, units, members,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    units = units.to(tl.int64)
    row = tl.arange(0, ROWS)
    within = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.zeros((ROWS, BLOCK), tl.float32)
    for member in range(0, members):
        at = member * units * (ROWS * (BLOCK + 4)) + unit * (ROWS * BLOCK)
        c = tl.load(codes_ptr + (at + within)).to(tl.float32)
        at = (member * (BLOCK + 4) + BLOCK) * units * (ROWS // 4) + unit * ROWS
        v = c * tl.load(scales_ptr + (at + row))[:, None]
        x = x + v
    a = tl.abs(x)
    a = tl.where(a <= 3.4028234663852886e+38, a, float("inf"))
    top = tl.max(a, axis=1)
    scale = top * 0.007874015718698502
    used = (scale >= 1.1754943508222875e-38) & (top <= 3.4028234663852886e+38)
    inverse = tl.where(used, tl.div_rn(1.0, tl.where(used, scale, 1.0)), 0.0)
    scale = tl.where(used, scale, tl.where(top <= 3.4028234663852886e+38, 0.0, float("nan")))
    y = tl.where(a <= 3.4028234663852886e+38, x, 0.0) * inverse[:, None]
    codes = ((y + 12582912.0) - 12582912.0).to(tl.int8)
    tl.store(out_codes_ptr + (unit * (ROWS * BLOCK) + within), codes)
    tl.store(out_scales_ptr + (units * (ROWS * BLOCK // 4) + unit * ROWS + row), scale)
""",
        )
