"""ATen's element-wise ops as steps of a `Pointwise`, each rounded as torch rounds it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Value
from autopar.ir.pointwise import CASTS, Operand, Pointwise, Step
from autopar.ir.rules.common import arguments

Node = torch.fx.Node
Steps = tuple[tuple[str, tuple[Operand, ...]], ...]

aten = torch.ops.aten
SQRT_HALF = 0.7071067811865476
SQRT_2_OVER_PI = 0.7978845608028654
TANH_GELU = 0.044715  # Hendrycks & Gimpel, Gaussian Error Linear Units, section 2
SMALL = frozenset({torch.float32, torch.bfloat16, torch.float16})

# Steps of one operand `x`; `t<i>` is the result of the i-th of them.
_UNARY: Mapping[Any, Steps] = MappingProxyType(
    {
        aten.relu.default: (("relu", ("x",)),),
        aten.tanh.default: (("tanh", ("x",)),),
        aten.sigmoid.default: (("sigmoid", ("x",)),),
        aten.exp.default: (("exp", ("x",)),),
        aten.erf.default: (("erf", ("x",)),),
        aten.neg.default: (("neg", ("x",)),),
        aten.silu.default: (("sigmoid", ("x",)), ("mul", ("x", "t0"))),
    }
)
_GELU: Mapping[str, Steps] = MappingProxyType(
    {
        "none": (
            ("mul", ("x", SQRT_HALF)),
            ("erf", ("t0",)),
            ("add", ("t1", 1.0)),
            ("mul", ("x", "t2")),
            ("mul", ("t3", 0.5)),
        ),
        "tanh": (
            ("mul", ("x", "x")),
            ("mul", ("t0", "x")),
            ("mul", ("t1", TANH_GELU)),
            ("add", ("x", "t2")),
            ("mul", ("t3", SQRT_2_OVER_PI)),
            ("tanh", ("t4",)),
            ("add", ("t5", 1.0)),
            ("mul", ("x", "t6")),
            ("mul", ("t7", 0.5)),
        ),
    }
)
_BINARY: Mapping[Any, str] = MappingProxyType(
    {
        aten.add.Tensor: "add",
        aten.sub.Tensor: "sub",
        aten.mul.Tensor: "mul",
        aten.div.Tensor: "div",
        aten.add.Scalar: "add",
        aten.sub.Scalar: "sub",
        aten.mul.Scalar: "mul",
        aten.div.Scalar: "div",
    }
)


def _all(module: Any, *overloads: str) -> frozenset[Any]:
    return frozenset(getattr(module, name) for name in overloads if hasattr(module, name))


_CASTS = _all(aten.to, "dtype") | _all(aten._to_copy, "default")


@dataclass(frozen=True)
class Folded:
    """One op as a program: its value on `operands[0]`, the further ones being `a0`, `a1`."""

    program: Pointwise
    operands: tuple[Node, ...]


def folded(node: Node, through: Node) -> Folded | None:
    """The op of a node as a program of its tensor operand `through`, or None if it is not one.

    The further operands are tensors of the same shape. A result of 16 bits is rounded to it, as
    torch does after every op.
    """
    value, source = node.meta.get("value"), through.meta.get("value")
    if not isinstance(value, Value) or not isinstance(source, Value):
        return None
    made = _steps(node, through)
    if made is None:
        return None
    steps, others = made
    dtypes = {value.dtype, source.dtype, *(o.meta["value"].dtype for o in others)}
    if not (dtypes <= SMALL or dtypes == {torch.float64}):
        return None
    if any(o.meta["value"].shape != value.shape for o in (through, *others)):
        return None
    program = [Step(op, operands) for op, operands in steps]
    rounding = _rounding(value.dtype)
    if rounding is not None:
        result = f"t{len(program) - 1}" if program else "x"
        program.append(Step(rounding, (result,)))
    return Folded(Pointwise(tuple(program)), (through, *others))


def _steps(node: Node, through: Node) -> tuple[Steps, tuple[Node, ...]] | None:
    """The steps of an op, before any rounding, and its tensor operands but `through`."""
    if node.target in _UNARY:
        return _UNARY[node.target], ()
    if node.target is aten.gelu.default:
        return _GELU[arguments(node)["approximate"]], ()
    if node.target in _CASTS:
        extra = {k: v for k, v in arguments(node).items() if k not in ("self", "dtype") and v}
        return None if extra else ((), ())
    if node.target not in _BINARY:
        return None
    if arguments(node).get("alpha", 1) != 1:
        return None
    return _binary(_BINARY[node.target], node.args[:2], through)


def _binary(
    op: str, operands: Sequence[Any], through: Node
) -> tuple[Steps, tuple[Node, ...]] | None:
    names: list[Operand] = []
    others: list[Node] = []
    for operand in operands:
        if operand is through:
            names.append("x")
        elif isinstance(operand, torch.fx.Node):
            if not isinstance(operand.meta.get("value"), Value):
                return None
            names.append(f"a{len(others)}")
            others.append(operand)
        elif isinstance(operand, (int, float)) and math.isfinite(operand):
            names.append(float(operand))
        else:
            return None
    return ((op, tuple(names)),), tuple(others)


def _rounding(dtype: torch.dtype) -> str | None:
    """The cast after which a value is what a tensor of the dtype holds; None where it is anyway."""
    if dtype in (torch.float32, torch.float64):
        return None
    return next(name for name, cast in CASTS.items() if cast is dtype)


def rounded(program: Pointwise, dtype: torch.dtype) -> Pointwise:
    """The program, its result rounded to a dtype of 16 bits."""
    cast = _rounding(dtype)
    if cast is None or (program.steps and program.steps[-1].op == cast):
        return program
    return Pointwise((*program.steps, Step(cast, (program.result,))))
