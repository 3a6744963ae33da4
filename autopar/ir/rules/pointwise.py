"""Elementwise ops with broadcasting: every dim may be split.

Sums of partial values pass through ops that are linear in the argument in question.
"""

from __future__ import annotations

import torch

from autopar.ir.graph import values_of
from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    Spec,
    all_whole,
    arguments,
    broadcast,
    input_value,
    letters,
    named_inputs,
    output,
    resembling,
    rule,
    take,
    words,
)


def pointwise(node: torch.fx.Node, *linear: str | tuple[str, ...]) -> ShardingRule:
    """`ab,b->ab` for any ranks; `linear` names arguments through which partial sums pass."""
    out = output(node)
    names = take(letters(), out.rank)
    inputs: dict[str, Spec | list[Spec]] = {}
    for item in named_inputs(node):
        spec = broadcast(names, out.shape, item.value.shape)
        if item.at is None:
            inputs[item.name] = spec
        else:
            inputs.setdefault(item.name, []).append(spec)  # type: ignore[arg-type]
    return rule(node, inputs, *([names] * len(values_of(node))), linear=linear)


def passing(*linear: str | tuple[str, ...]) -> Handler:
    """Handler of a pointwise op that is linear in each of the given (groups of) arguments."""
    return lambda node: pointwise(node, *linear)


def add(node: torch.fx.Node) -> ShardingRule:
    """A sum of two tensors is linear in both together; adding a number is not."""
    return pointwise(node, ("self", "other"))


def divide(node: torch.fx.Node) -> ShardingRule:
    """Linear in the dividend unless the quotient is rounded."""
    return pointwise(node, *(() if arguments(node).get("rounding_mode") else ("self",)))


def where(node: torch.fx.Node) -> ShardingRule:
    """Linear in both branches together, or in one if the other is zero."""
    args = arguments(node)
    if "self" not in args:  # where(condition): data-dependent shape
        return all_whole(node)
    return pointwise(node, tuple(name for name in ("self", "other") if args[name] != 0))


def masked_fill(node: torch.fx.Node) -> ShardingRule:
    """Linear if what fills is zero or a tensor that is partial too."""
    value = arguments(node)["value"]
    return pointwise(node, *([("self",)] if value == 0 else [("self", "value")]))


def like(node: torch.fx.Node) -> ShardingRule:
    """`x.type_as(other)`: the other tensor gives its dtype or shape, not its values."""
    out = output(node)
    names = take(letters(), out.rank)
    inputs = {
        "self": names,
        "other": resembling(names, out.shape, input_value(node, "other").shape),
    }
    return rule(node, inputs, names, linear=["self"])


def convert(node: torch.fx.Node) -> ShardingRule:
    """Casts and copies; `to(x, other)` has a second tensor that only says which dtype."""
    if "other" in arguments(node):
        return like(node)
    return pointwise(node, "self")


def prelu(node: torch.fx.Node) -> ShardingRule:
    """`ncd,c->ncd`; a single slope has no factor."""
    x, weight = input_value(node, "self"), input_value(node, "weight")
    names = take(letters(), x.rank)
    channel = names[1 if x.rank > 1 else 0 :][:1]
    slope = [] if weight.rank == 0 else ["1"] if weight.shape[0] == 1 else channel
    return rule(node, {"self": names, "weight": slope}, names)


def dropout(node: torch.fx.Node) -> ShardingRule:
    """Every dim: the runtime's mask depends on an element's place, not on who computes it."""
    return pointwise(node, "input")


NONLINEAR = words(
    """
abs acos acosh asin asinh atan atan2 arctan2 atanh bitwise_and bitwise_left_shift bitwise_not
bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip copysign cos
cosh digamma elu eq erf erfc erfinv exp exp2 expm1 floor floor_divide fmax fmin fmod frac ge gelu
greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot isclose isfinite
isinf isnan isneginf isposinf le leaky_relu less less_equal lgamma log log10 log1p log2 log_sigmoid
logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt maximum minimum mish
nan_to_num ne not_equal polar pow reciprocal relu relu6 remainder round rrelu_with_noise rsqrt selu
sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink special_erf special_expm1 sqrt
square tan tanh threshold trunc xlogy __and__ __or__ __xor__ complex angle
"""
)

LINEAR = words("alias clone conj contiguous detach imag lift_fresh_copy neg negative positive real")

RULES: dict[str, Handler] = {
    **{f"aten.{name}": pointwise for name in NONLINEAR},
    **{f"aten.{name}": passing("self") for name in LINEAR},
    **{f"aten.{name}": convert for name in ("to", "_to_copy")},
    **{f"aten.{name}": add for name in ("add", "sub", "subtract", "rsub")},
    **{f"aten.{name}": passing("self", "other") for name in ("mul", "multiply")},
    **{f"aten.{name}": divide for name in ("div", "divide", "true_divide")},
    "autopar.hint": passing("x"),
    "aten.type_as": like,
    "aten.where": where,
    "aten.masked_fill": masked_fill,
    "aten.lerp": passing(("self", "end")),
    "aten.addcmul": passing(("self", "tensor1"), ("self", "tensor2")),
    "aten.addcdiv": passing(("self", "tensor1")),
    "aten.copy": passing("src"),
    "aten.prelu": prelu,
    "aten.dropout": dropout,
}
