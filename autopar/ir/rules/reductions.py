"""Reductions: a sum over a split dim leaves a partial sum; anything else needs its dims whole."""

from __future__ import annotations

import torch

from autopar.ir.graph import values_of
from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    Spec,
    arguments,
    broadcast,
    dim_index,
    dim_indices,
    hold,
    input_value,
    letters,
    named_inputs,
    output,
    rule,
    take,
    words,
)
from .pointwise import pointwise


def reduced_dims(node: torch.fx.Node) -> list[int]:
    """Input dims that the call reduces over, counted from the front."""
    args = arguments(node)
    rank = input_value(node, "self").rank
    return dim_indices(args.get("dim"), rank)


def reduced(node: torch.fx.Node, names: Spec) -> Spec:
    """Output spec of a reduction of `names`."""
    dims = reduced_dims(node)
    if arguments(node).get("keepdim"):
        return ["1" if i in dims else f for i, f in enumerate(names)]
    return [f for i, f in enumerate(names) if i not in dims]


def add_up(node: torch.fx.Node) -> ShardingRule:
    """`sum` and `mean`: every dim may be split (a mean's scale is a matter of lowering)."""
    names = take(letters(), input_value(node, "self").rank)
    return rule(node, {"self": names}, reduced(node, names), linear=["self"])


def extreme(node: torch.fx.Node, kind: str) -> ShardingRule:
    """`ab->a; max(b)`.

    Where a gradient flows the dims are whole: the gradient of a partial maximum belongs to the
    device that holds the maximum, which a plain all-reduce does not know.
    """
    names = take(letters(), input_value(node, "self").rank)
    dims = reduced_dims(node)
    if input_value(node, "self").requires_grad or output(node).dtype == torch.bool:
        names = hold(names, dims)
        return rule(node, {"self": names}, reduced(node, names))
    clauses = " ".join(f"{kind}({names[d]})" for d in dims)
    return rule(node, {"self": names}, reduced(node, names), clauses=clauses)


def selecting(node: torch.fx.Node, kind: str) -> ShardingRule:
    """`max` or `min` over everything, along a dim with indices, or of two tensors."""
    args = arguments(node)
    if "other" in args:
        return pointwise(node)
    return whole_dims(node) if "dim" in args else extreme(node, kind)


def whole_dims(node: torch.fx.Node) -> ShardingRule:
    """Reductions that do not recombine by a collective (var, argmax, norm): dims whole."""
    names = hold(take(letters(), input_value(node, "self").rank), reduced_dims(node))
    outputs = [reduced(node, names)] * len(values_of(node))
    return rule(node, {"self": names}, *outputs)


def scan(*linear: str) -> Handler:
    """Handler of an op along one dim that keeps the shape (softmax, cumsum): the dim is whole."""

    def handler(node: torch.fx.Node) -> ShardingRule:
        x = input_value(node, "self")
        names = hold(take(letters(), x.rank), [dim_index(arguments(node)["dim"], x.rank)])
        return rule(node, {"self": names}, *([names] * len(values_of(node))), linear=linear)

    return handler


def prefix_sum(node: torch.fx.Node) -> ShardingRule:
    """`ab->ab; comm(a)`: every device adds the totals of those before it along the dim."""
    x = input_value(node, "self")
    names = take(letters(), x.rank)
    clauses = f"comm({names[dim_index(arguments(node)['dim'], x.rank)]})" if x.rank else ""
    return rule(node, {"self": names}, names, linear=["self"], clauses=clauses)


def difference(node: torch.fx.Node) -> ShardingRule:
    """`diff`: neighbours along a dim, which is whole."""
    x = input_value(node, "self")
    at = dim_index(arguments(node)["dim"], x.rank)
    names = letters()
    dims = take(names, x.rank)

    def along(name: str) -> Spec:
        return [f"[{name}]" if i == at else f for i, f in enumerate(dims)]

    ends = {item.name: along(next(names)) for item in named_inputs(node)}
    return rule(node, ends, along(next(names)), linear=[tuple(ends)])


def cosine_similarity(node: torch.fx.Node) -> ShardingRule:
    """`ab[d],ab[d]->ab`, with broadcasting."""
    left, right = (item.value for item in named_inputs(node))
    out = output(node)
    rank = out.rank + 1
    at = dim_index(arguments(node)["dim"], rank)
    names = letters()
    whole = f"[{next(names)}]"
    dims = take(names, out.rank)
    full = [*dims[:at], whole, *dims[at:]]
    shape = [*out.shape[:at], 0, *out.shape[at:]]
    inputs = {"x1": broadcast(full, shape, left.shape), "x2": broadcast(full, shape, right.shape)}
    return rule(node, inputs, dims)


WHOLE = words(
    """
argmax argmin var std var_mean std_mean logsumexp any all prod norm linalg_vector_norm median
nanmedian mode kthvalue aminmax nansum nanmean count_nonzero
"""
)

RULES: dict[str, Handler] = {
    "aten.sum": add_up,
    "aten.mean": add_up,
    "aten.amax": lambda node: extreme(node, "max"),
    "aten.amin": lambda node: extreme(node, "min"),
    "aten.max": lambda node: selecting(node, "max"),
    "aten.min": lambda node: selecting(node, "min"),
    **{f"aten.{name}": whole_dims for name in WHOLE},
    **{
        f"aten.{name}": scan()
        for name in words(
            "softmax log_softmax _softmax _log_softmax _safe_softmax "
            "cumprod cummax cummin logcumsumexp"
        )
    },
    "aten.cumsum": prefix_sum,
    "aten.diff": difference,
    "aten.cosine_similarity": cosine_similarity,
}
