"""The registry of hand-written sharding rules: op name -> function from a call to its rule."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.fx

from .graph import values_of
from .rule import ShardingRule, parse_rule
from .rules import (
    attention,
    contractions,
    convolution,
    embeddings,
    factories,
    grouped,
    indexing,
    losses,
    normalisation,
    pointwise,
    recurrent,
    reductions,
    views,
)
from .rules.common import Handler, arguments

RULES: Mapping[str, Handler] = MappingProxyType(
    {
        **pointwise.RULES,
        **views.RULES,
        **contractions.RULES,
        **grouped.RULES,
        **reductions.RULES,
        **attention.RULES,
        **losses.RULES,
        **recurrent.RULES,
        **embeddings.RULES,
        **normalisation.RULES,
        **convolution.RULES,
        **indexing.RULES,
        **factories.RULES,
    }
)


def op_name(node: torch.fx.Node) -> str:
    """`aten.add.Tensor` for an op, the qualified name of any other callable."""
    target = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def handler_of(node: torch.fx.Node) -> Handler | None:
    """The registered function for a call: by overload (`aten.add.Tensor`), else by op."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = op_name(node)
    return RULES.get(name) or RULES.get(name.rpartition(".")[0])


def rule_for(node: torch.fx.Node) -> ShardingRule | None:
    """The hand-written rule of a call, in terms of its typed values; None if there is none."""
    handler = handler_of(node)
    if handler is None or not values_of(node):
        return None
    made = handler(node)
    return parse_rule(made) if isinstance(made, str) else made


def describe(node: torch.fx.Node) -> str:
    """The rule in notation, or why there is none: `bsk,nk,n->bsn; linear(0) linear(1) once(2)`."""
    rule = rule_for(node)
    return f"no rule for {op_name(node)}" if rule is None else str(rule)


def reduction_scale(node: torch.fx.Node) -> str | None:
    """How a call reduces: "mean" (a split one must be rescaled), "sum", or None."""
    if handler_of(node) is None:
        return None
    name = op_name(node).split(".")[1]
    if name in ("mean", "sum"):
        return name
    if op_name(node).rpartition(".")[0] in losses.RULES:
        return {losses.MEAN: "mean", losses.SUM: "sum"}.get(arguments(node)["reduction"])
    return None


def mean_like(node: torch.fx.Node) -> bool:
    """Whether a call divides by the number of elements it adds up."""
    return reduction_scale(node) == "mean"
