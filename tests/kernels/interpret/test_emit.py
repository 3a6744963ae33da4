"""Emitted Triton of element-wise programs equals their torch reference; templates are filled."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise
from autopar.runtime.kernels.emit import Kernel, fill, load, triton_lines
from autopar.runtime.kernels.launch import launch
from tests.kernels.programs import programs

TEMPLATE = """
@triton.jit
def pointwise(x_ptr, a0_ptr, a1_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    live = i < n
    $loads
    $work
    tl.store(out_ptr + i, tl.zeros([BLOCK], $compute) + y, mask=live)
"""
N = 100


def emitted(program: Pointwise, compute: str) -> Kernel:
    loads = [
        f"{v} = tl.load({v}_ptr + i, mask=live, other=0.5).to({compute})" for v in ("x", "a0", "a1")
    ]
    work = triton_lines(program, "x", ["a0", "a1"], "y", compute)
    return Kernel("pointwise", fill(TEMPLATE, loads=loads, work=work, compute=compute))


def run(program: Pointwise, dtype: torch.dtype, *inputs: torch.Tensor) -> torch.Tensor:
    compute = torch.promote_types(dtype, torch.float32)
    out = torch.empty(N, dtype=compute)
    kernel = emitted(program, f"tl.{str(compute).removeprefix('torch.')}")
    launch(kernel, (1,), *inputs, out, N, BLOCK=128)
    return out


# Not shrunk: a failing example is short already, and every kernel takes some milliseconds.
@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(programs(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_program_is_its_reference(program: Pointwise, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(N, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]
    wanted = program(*inputs)
    with torch.no_grad():
        exact = program(*(t.double() for t in inputs))
    # Programs that blow up rounding are no test of spelling: exp of exp, differences of near
    # numbers that are then divided by.
    assume(bool(torch.isfinite(wanted).all()))
    blurred = (wanted.double() - exact).abs().max() / (exact.abs().max() + 1e-30)
    assume(float(blurred) < 1e-5 or dtype is torch.float64)
    assume(float(wanted.abs().max()) < 1e6)
    found = run(program, dtype, *inputs)
    # exp, erf and sigmoid of numpy and of torch differ by an ulp or two, tanh is written with a
    # sigmoid or a series, and a cast to 16 bits may round the other way.
    casts = any(s.op.startswith("cast_") and s.op != "cast_f32" for s in program.steps)
    f32 = found.dtype is torch.float32 or any(s.op == "cast_f32" for s in program.steps)
    rough = 2.0**-7 if casts else 1e-5 if f32 else 1e-12
    scale = 1.0 + float(wanted.abs().max())
    assert torch.allclose(found, wanted, rtol=rough, atol=rough * scale), str(program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", ["add(x, a0)", "mul(x, a1)", "t0 = sub(x, 1.5); relu(t0)", "x"])
def test_arithmetic_is_exact(text: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(N, generator=g, dtype=dtype) for _ in range(3)]
    program = parse_pointwise(text)
    assert torch.equal(run(program, dtype, *inputs), program(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "text",
    [
        "exp(0.5)",
        "cast_f16(0.1)",
        "t0 = add(0.25, 0.5); t1 = tanh(t0); mul(t1, x)",
        "t0 = mul(0.1, 0.1); add(x, t0)",
        "t0 = positive(-1.0); t1 = cast_bf16(t0); sub(a0, t1)",
    ],
)
def test_steps_of_numbers_alone_are_taken_in_the_dtype_of_the_kernel(
    text: str, dtype: torch.dtype
) -> None:
    inputs = [torch.linspace(-1, 1, N, dtype=dtype) for _ in range(3)]
    program = parse_pointwise(text)
    assert torch.equal(run(program, dtype, *inputs), program(*inputs))
    written = triton_lines(program, "x", ["a0"], "y", f"tl.{str(dtype).removeprefix('torch.')}")
    assert len(written) == 1


def test_a_number_that_is_not_finite() -> None:
    x = torch.ones(N)
    assert triton_lines(parse_pointwise("div(-1.0, 0.0)"), "x", [], "y") == ['y = float("-inf")']
    assert torch.isinf(
        run(parse_pointwise("t0 = div(1.0, 0.0); add(x, t0)"), x.dtype, x, x, x)
    ).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_keeps_its_digits_near_zero(dtype: torch.dtype) -> None:
    x = torch.cat([torch.logspace(-12, 0, N // 4), torch.linspace(0.04, 0.06, N // 4)]).to(dtype)
    x = torch.cat([x, -x])
    got = run(parse_pointwise("tanh(x)"), dtype, x, x, x)
    error = ((got - x.tanh()) / x.tanh()).abs().max()
    assert float(error) < (5e-6 if dtype is torch.float32 else 1e-12)


def test_relu_keeps_nan_as_torch_does() -> None:
    x = torch.full((N,), float("nan"))
    assert torch.isnan(run(parse_pointwise("relu(x)"), torch.float32, x, x, x)).all()


def test_the_source() -> None:
    program = parse_pointwise("t0 = tanh(a0); t1 = cast_bf16(t0); mul(t1, x)")
    assert_expected_inline(
        emitted(program, "tl.float32").source,
        """\
import triton
import triton.language as tl


@triton.jit
def pointwise(x_ptr, a0_ptr, a1_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    live = i < n
    x = tl.load(x_ptr + i, mask=live, other=0.5).to(tl.float32)
    a0 = tl.load(a0_ptr + i, mask=live, other=0.5).to(tl.float32)
    a1 = tl.load(a1_ptr + i, mask=live, other=0.5).to(tl.float32)
    t0 = tl.where(tl.abs(a0) < 0.1, a0 - a0 * a0 * a0 * (0.3333333333333333 - a0 * a0 * 0.13333333333333333), 2.0 * tl.sigmoid(2.0 * a0) - 1.0)
    t1 = t0.to(tl.bfloat16).to(tl.float32)
    y = t1 * x
    tl.store(out_ptr + i, tl.zeros([BLOCK], tl.float32) + y, mask=live)
""",
    )


def test_nothing_to_do_is_nothing_written() -> None:
    assert triton_lines(IDENTITY, "x", [], "x") == []
    assert triton_lines(IDENTITY, "x", [], "y") == ["y = x"]


def test_templates() -> None:
    made = fill(
        "def f($names):\n    $body\n    return $out", names="a, b", body=["c = a", ""], out="c"
    )
    assert made.endswith("def f(a, b):\n    c = a\n\n    return c\n")
    with pytest.raises(KeyError, match="missing"):
        fill("$missing")
    with pytest.raises(ValueError, match=r"\$body has lines and needs a line of its own"):
        fill("x = $body", body=["a", "b"])


def test_a_kernel_is_loaded_once_and_known_by_its_text() -> None:
    kernel = emitted(IDENTITY, "tl.float32")
    assert load(kernel) is load(Kernel(kernel.name, kernel.source))
    assert kernel.digest != emitted(IDENTITY, "tl.float64").digest
