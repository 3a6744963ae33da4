"""ATen's ops as programs give torch's numbers."""

from __future__ import annotations

import pytest
import torch
import torch.fx

from autopar.passes.pointwise_of import folded

from .helpers import graph_of

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CALLS = (
    "aten.relu(%x)",
    "aten.tanh(%x)",
    "aten.sigmoid(%x)",
    "aten.exp(%x)",
    "aten.erf(%x)",
    "aten.neg(%x)",
    "aten.silu(%x)",
    "aten.gelu(%x)",
    'aten.gelu(%x, approximate="tanh")',
    "aten.add.Tensor(%x, %y)",
    "aten.sub.Tensor(%y, %x)",
    "aten.mul.Tensor(%x, %x)",
    "aten.div.Tensor(%y, %x)",
    "aten.div.Tensor(%x, 30.0)",
    "aten.mul.Tensor(%x, 0.3)",
)


def folded_of(call: str, dtype: str, result: str = "") -> tuple[torch.fx.Node, object]:
    graph = graph_of(
        f"""
        %x: input {dtype}[7] "x"
        %y: input {dtype}[7] "y"
        %z: {result or dtype}[7] = {call}
        return %z
        """
    )
    x, _, z = list(graph.fx.nodes)[:3]
    return z, folded(z, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_a_program_gives_what_the_op_gives(call: str, dtype: str) -> None:
    node, made = folded_of(call, dtype)
    assert made is not None
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    wanted = node.target(*(eval_arg(a, x, y) for a in node.args), **node.kwargs)  # type: ignore[operator]
    extras = [eval_arg(n, x, y) for n in made.operands[1:]]  # type: ignore[attr-defined]
    got = made.program(x, *extras)  # type: ignore[attr-defined]
    # Of 16 bits, torch's own CPU kernels are one rounding apart at most; else a few roundings.
    limit = {"f64": 1e-14, "f32": 2e-6, "bf16": 2**-7, "f16": 2**-10}[dtype]
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=limit, atol=limit)
    assert torch.equal(got, got.to(wanted.dtype).to(got.dtype))  # rounded


def eval_arg(arg: object, x: torch.Tensor, y: torch.Tensor) -> object:
    if isinstance(arg, torch.fx.Node):
        return {"x": x, "y": y}[arg.name]
    return arg


@pytest.mark.parametrize(
    ("call", "dtype", "result"),
    [
        ("aten.add.Tensor(%x, %y, alpha=2)", "f32", ""),
        ("aten.to.dtype(%x, f32)", "f64", "f32"),  # float64 is computed by itself
        ("aten.cumsum(%x, 0)", "f32", ""),
        ("aten.add.Tensor(%x, 1)", "i64", ""),
        ("aten.mul.Tensor(%x, inf)", "f32", ""),
    ],
)
def test_what_is_no_program(call: str, dtype: str, result: str) -> None:
    assert folded_of(call, dtype, result)[1] is None


def test_a_cast_up_is_nothing_and_a_cast_down_rounds() -> None:
    up = folded_of("aten.to.dtype(%x, f32)", "bf16", "f32")[1]
    down = folded_of("aten.to.dtype(%x, bf16)", "f32", "bf16")[1]
    assert str(up.program) == "x"  # type: ignore[attr-defined]
    assert str(down.program) == "cast_bf16(x)"  # type: ignore[attr-defined]
