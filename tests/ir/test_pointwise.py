"""Element-wise programs: text, reference, derivatives, composition, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autopar.ir.pointwise import IDENTITY, PLAIN, Fusion, Pointwise, Step, parse_pointwise
from tests.kernels.programs import TAME, programs

GELU = (
    "t0 = mul(x, 0.7071067811865476); t1 = erf(t0); t2 = add(t1, 1.0); t3 = mul(x, t2);"
    " mul(t3, 0.5)"
)


def tensors(count: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(64, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


@given(programs())
def test_text_reads_back(program: Pointwise) -> None:
    assert parse_pointwise(str(program)) == program


def test_text() -> None:
    assert str(parse_pointwise(GELU)) == GELU
    assert str(IDENTITY) == "x" and parse_pointwise(" x ") == IDENTITY and not IDENTITY
    assert str(Fusion(epilogue=parse_pointwise("add(x, a0)"))) == "x | add(x, a0)"
    assert str(PLAIN) == "x | x"


def test_the_reference_is_torch() -> None:
    x, a = tensors(2, 0)
    assert torch.allclose(parse_pointwise(GELU)(x), torch.nn.functional.gelu(x), rtol=1e-14)
    assert torch.equal(parse_pointwise("t0 = relu(x); add(t0, a0)")(x, a), x.relu() + a)
    assert torch.equal(parse_pointwise("mul(2.0, 3.0)")(x), torch.full_like(x, 6.0))
    assert IDENTITY(x.float()).dtype is torch.float32


def test_computes_in_float32_or_better_and_rounds_where_it_says() -> None:
    x, a = tensors(2, 1, torch.bfloat16)
    wide = parse_pointwise("t0 = mul(x, a0); add(t0, x)")(x, a)
    assert wide.dtype is torch.float32
    assert torch.equal(wide, x.float() * a.float() + x.float())
    rounded = parse_pointwise("t0 = mul(x, a0); t1 = cast_bf16(t0); add(t1, x)")(x, a)
    assert torch.equal(rounded, (x.float() * a.float()).bfloat16().float() + x.float())
    assert parse_pointwise("exp(x)")(x.double()).dtype is torch.float64


@settings(deadline=None)
@given(programs(), st.sampled_from(["x", "a0", "a1"]))
def test_derivatives_are_those_of_autograd(program: Pointwise, name: str) -> None:
    # A cast has derivative 1 here, and rounds in autograd: compared without.
    assume(not any(step.op.startswith("cast_") for step in program.steps))
    x, a, b = (t.requires_grad_() for t in tensors(3, 2))
    inputs = {"x": x, "a0": a, "a1": b}
    y = program(x, a, b)
    assume(bool(torch.isfinite(y).all()) and bool((y.abs() < 1e12).all()))
    if y.requires_grad:
        (wanted,) = torch.autograd.grad(y.sum(), inputs[name], allow_unused=True)
    else:
        wanted = None
    wanted = torch.zeros_like(x) if wanted is None else wanted
    assume(bool(torch.isfinite(wanted).all()))
    with torch.no_grad():
        found = program.derivative(name)(x, a, b)
    scale = float(wanted.abs().max()) + 1.0
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9 * scale), str(program)


def test_derivatives_in_short() -> None:
    assert str(parse_pointwise("add(x, a0)").derivative("a0")) == "mul(1.0, 1.0)"
    assert str(parse_pointwise("add(x, 1.0)").derivative("a0")) == "mul(0.0, 1.0)"
    assert str(parse_pointwise("mul(x, a0)").derivative()) == "mul(a0, 1.0)"
    assert str(parse_pointwise("cast_bf16(x)").derivative()) == "mul(1.0, 1.0)"
    # Of what is before it only what is needed is left.
    found = parse_pointwise("t0 = exp(a0); t1 = tanh(x); add(t0, t1)").derivative()
    assert str(found) == "t0 = tanh(x); t1 = mul(t0, t0); sub(1.0, t1)"


@settings(deadline=None)
@given(programs(TAME), programs(TAME))
def test_then_is_one_after_the_other(first: Pointwise, second: Pointwise) -> None:
    both = first.then(second)
    extras = tensors(4, 3)
    x, mine, others = extras[0] * 2, extras[: first.extras], extras[2 : 2 + second.extras]
    assert both.extras <= first.extras + second.extras
    y = second(first(x, *mine), *others)
    assert torch.equal(both(x, *mine, *others), y)


def test_extras_are_counted() -> None:
    assert IDENTITY.extras == 0 and parse_pointwise("add(x, a3)").extras == 4
    fusion = Fusion(parse_pointwise("mul(x, a0)"), parse_pointwise("add(x, a1)"))
    assert fusion.extras == 3
    with pytest.raises(ValueError, match=r"add\(x, a1\) reads 2 further tensors"):
        fusion.epilogue(*tensors(2, 4))


@pytest.mark.parametrize(
    ("op", "operands", "message"),
    [
        ("sin", ("x",), "pointwise: unknown op 'sin'"),
        ("add", ("x",), r"pointwise: add takes 2 operands, not add\(x\)"),
        ("cast_bf16", ("x", "x"), "pointwise: cast_bf16 takes 1 operands"),
        ("exp", ("t0",), r"pointwise: 't0' is not defined before exp\(t0\)"),
        ("exp", ("y",), r"pointwise: 'y' is not defined before exp\(y\)"),
        ("mul", ("x", float("inf")), r"pointwise: mul\(x, inf\) has a number that is not finite"),
    ],
)
def test_bad_programs(op: str, operands: tuple[str | float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pointwise((Step(op, operands),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("mul(x, 2.0", r"cannot read 'mul\(x, 2.0'"),
        ("t1 = exp(x); exp(t1)", r"cannot read 't1 = exp\(x\)'"),
        ("mul(x, two)", "cannot read 'two'"),
    ],
)
def test_text_that_is_no_program(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"pointwise: {message}"):
        parse_pointwise(text)
