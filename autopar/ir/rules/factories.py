"""Ops that make tensors: a fill can be made in pieces, a count or a random draw cannot."""

from __future__ import annotations

import torch

from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    all_whole,
    input_value,
    letters,
    named_inputs,
    output,
    resembling,
    rule,
    take,
    words,
)


def fill(node: torch.fx.Node) -> ShardingRule:
    """`->ab`: every device fills its part. A tensor to fill with has rank zero."""
    names = take(letters(), output(node).rank)
    return rule(node, {item.name: [] for item in named_inputs(node)}, names)


def fill_like(node: torch.fx.Node) -> ShardingRule:
    """`ab->ab`: as large as another tensor."""
    names = take(letters(), output(node).rank)
    inputs = {item.name: names if item.name == "self" else [] for item in named_inputs(node)}
    return rule(node, inputs, names)


def fill_new(node: torch.fx.Node) -> ShardingRule:
    """`x.new_zeros(size)`: x gives only its dtype, so that its dims may be split wherever."""
    out = output(node)
    names = take(letters(), out.rank)
    spec = resembling(names, out.shape, input_value(node, "self").shape)
    return rule(node, {"self": spec}, names)


WHOLE = words(
    """
arange eye linspace logspace tril_indices triu_indices rand randn randint randperm rand_like
randn_like randint_like bernoulli normal uniform multinomial exponential native_dropout
feature_dropout alpha_dropout feature_alpha_dropout scalar_tensor rrelu
"""
)

RULES: dict[str, Handler] = {
    **{f"aten.{name}": fill for name in ("full", "zeros", "ones", "empty")},
    **{f"aten.{name}_like": fill_like for name in ("full", "zeros", "ones", "empty")},
    **{f"aten.new_{name}": fill_new for name in ("full", "zeros", "ones", "empty")},
    "aten.fill": fill_like,
    **{f"aten.{name}": all_whole for name in WHOLE},
}
