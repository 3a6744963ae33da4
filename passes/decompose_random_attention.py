"""Spell out attention with dropout, so that its mask can be drawn by global position."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph, Size, Value, value_of
from autopar.ir.rules.common import arguments

aten = torch.ops.aten
Node = torch.fx.Node


def decompose_random_attention(graph: Graph) -> Graph:
    """Replace `scaled_dot_product_attention` with dropout_p > 0 by matmuls, softmax and dropout.

    Establishes: the only random op that attention leaves is `aten.dropout`.
    """
    new = graph.copy()
    for node in list(new.fx.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            a = arguments(node)
            if a["dropout_p"] > 0.0:
                with new.fx.inserting_before(node):
                    result = _attention(_Builder(new.fx, node), a)
                result.meta["value"] = node.meta["value"]
                node.replace_all_uses_with(result)
                new.fx.erase_node(node)
    return new


class _Builder:
    """Adds calls that inherit an op's place in the user's source."""

    def __init__(self, fx: torch.fx.Graph, origin: Node) -> None:
        self.fx = fx
        self.origin = origin

    def call(
        self, target: Any, args: tuple[Any, ...], shape: tuple[Size, ...], like: Node, **kwargs: Any
    ) -> Node:
        node = self.fx.call_function(target, args, kwargs)
        value = value_of(like)
        dtype = kwargs.pop("dtype", None) or value.dtype
        grad = value.requires_grad and dtype.is_floating_point
        node.meta = {**self.origin.meta, "value": Value(shape, dtype, None, grad)}
        return node


def _attention(b: _Builder, a: dict[str, Any]) -> Node:
    query, key, value = a["query"], a["key"], a["value"]
    q, k, v = value_of(query).shape, value_of(key).shape, value_of(value).shape
    if a["enable_gqa"] and q[-3] != k[-3]:
        key, k = _repeat_heads(b, key, q[-3]), (*k[:-3], q[-3], *k[-2:])
        value, v = _repeat_heads(b, value, q[-3]), (*v[:-3], q[-3], *v[-2:])
    scale = a["scale"] if a["scale"] is not None else 1.0 / math.sqrt(float(q[-1]))
    turned = b.call(aten.transpose.int, (key, -2, -1), (*k[:-2], k[-1], k[-2]), key)
    shape = (*q[:-1], k[-2])
    grad_like = next((n for n in (query, key, value) if value_of(n).requires_grad), query)
    scores = b.call(aten.matmul.default, (query, turned), shape, grad_like)
    scores = b.call(aten.mul.Tensor, (scores, scale), shape, grad_like)
    if a["is_causal"]:
        scores = _mask(b, scores, _causal(b, query, shape[-2:]), shape)
    if a["attn_mask"] is not None:
        mask = a["attn_mask"]
        if value_of(mask).dtype == torch.bool:
            hidden = b.call(aten.logical_not.default, (mask,), value_of(mask).shape, mask)
            scores = _mask(b, scores, hidden, shape)
        else:
            scores = b.call(aten.add.Tensor, (scores, mask), shape, grad_like)
    # A mask may hide all of a row, of which torch's attention makes zeros and a softmax nan.
    softmax = aten.softmax.int if a["attn_mask"] is None else aten._safe_softmax.default
    weights = b.call(softmax, (scores, -1), shape, grad_like)
    weights = b.call(aten.dropout.default, (weights, a["dropout_p"], True), shape, grad_like)
    return b.call(aten.matmul.default, (weights, value), (*shape[:-1], v[-1]), grad_like)


def _mask(b: _Builder, scores: Node, hidden: Node, shape: tuple[Size, ...]) -> Node:
    return b.call(aten.masked_fill.Scalar, (scores, hidden, -math.inf), shape, scores)


def _causal(b: _Builder, like: Node, shape: tuple[Size, ...]) -> Node:
    """True where a position may not look: above the diagonal."""
    ones = b.call(aten.new_ones.default, (like, list(shape)), shape, like, dtype=torch.bool)
    return b.call(aten.triu.default, (ones, 1), tuple(shape), ones)


def _repeat_heads(b: _Builder, x: Node, heads: Size) -> Node:
    """[..., g, s, d] -> [..., heads, s, d], every head repeated in place."""
    shape = value_of(x).shape
    groups, rest = shape[-3], shape[-2:]
    times = (
        heads // groups if isinstance(heads, int) and isinstance(groups, int) else heads / groups
    )
    wide = (*shape[:-3], groups, times, *rest)
    x1 = b.call(aten.unsqueeze.default, (x, -3), (*shape[:-3], groups, 1, *rest), x)
    x2 = b.call(aten.expand.default, (x1, list(wide)), wide, x1)
    return b.call(
        aten.reshape.default, (x2, [*shape[:-3], heads, *rest]), (*shape[:-3], heads, *rest), x2
    )
