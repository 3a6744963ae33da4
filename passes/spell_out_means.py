"""A mean over a number of targets that only the run knows, as a sum divided by a count."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph, Value, value_of
from autopar.ir.rules.common import arguments
from autopar.ir.rules.losses import MEAN, NONE, SUM

aten = torch.ops.aten
Node = torch.fx.Node

LIKELIHOODS = (aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default)
HALF = (torch.float16, torch.bfloat16)

# Nodes with this mark have no choices in a plan: what they do follows from their inputs.
FOLLOWS = "follows"


def spell_out_means(graph: Graph) -> Graph:
    """Replace the mean of a cross-entropy or likelihood by `sum(losses) / count(targets)`.

    The count is of the targets that are not ignored, in the weights of their classes; it depends
    on inputs alone, so that it is known before a part of the batch is. Half-precision losses are
    added up in float32. The loss keeps its name; what is added carries the mark `follows`.
    Sizes must be integers. Does nothing where no loss is such a mean.
    """
    new = graph.copy()
    from autopar import token_ops  # registers autopar.cross_entropy

    del token_ops
    entropies = (aten.cross_entropy_loss.default, torch.ops.autopar.cross_entropy.default)
    for node in list(new.fx.nodes):
        if node.target not in (*entropies, *LIKELIHOODS) or arguments(node)["reduction"] != MEAN:
            continue
        weight = arguments(node).get("weight")
        if value_of(node).rank or (weight is not None and value_of(weight).requires_grad):
            continue
        _spell_out(new, node)
    return new


class _Builder:
    """Adds calls behind a node that inherit its place in the user's source."""

    def __init__(self, graph: Graph, origin: Node) -> None:
        self.fx, self.origin, self.last = graph.fx, origin, origin

    def call(self, target: Any, args: tuple[Any, ...], value: Value, **kwargs: Any) -> Node:
        with self.fx.inserting_after(self.last):
            self.last = self.fx.call_function(target, args, kwargs)
        self.last.meta = {**self.origin.meta, "value": value, FOLLOWS: True}
        return self.last


def _spell_out(graph: Graph, node: Node) -> None:
    made, readers = value_of(node), list(node.users)
    build = _Builder(graph, node)
    scalar = replace(made, shape=())
    total: Node = node
    if made.dtype in HALF:
        _set_reduction(node, NONE)
        node.meta["value"] = replace(made, shape=_loss_shape(node))
        wide = replace(scalar, dtype=torch.float32)
        total = build.call(aten.sum.default, (node,), wide, dtype=torch.float32)
    else:
        _set_reduction(node, SUM)
    count = _count(build, node, value_of(total).dtype)
    divide = aten.div.Scalar if isinstance(count, int) else aten.div.Tensor
    mean = build.call(divide, (total, count), value_of(total))
    if made.dtype in HALF:
        mean = build.call(aten.to.dtype, (mean, made.dtype), scalar)
    for reader in readers:
        reader.replace_input_with(node, mean)


def _set_reduction(node: Node, reduction: int) -> None:
    schema: Any = node.target
    names = [a.name for a in schema._schema.arguments]
    args = arguments(node) | {"reduction": reduction}
    node.args, node.kwargs = tuple(args[name] for name in names), {}


def _classes(node: Node) -> int:
    """The dim of the logits that counts classes."""
    rank = value_of(arguments(node)["self"]).rank
    return rank - 1 if node.target is torch.ops.autopar.cross_entropy.default else min(1, rank - 1)


def _loss_shape(node: Node) -> tuple[int, ...]:
    """Shape of the losses before they are added up."""
    shape = value_of(arguments(node)["self"]).int_shape()
    return tuple(size for dim, size in enumerate(shape) if dim != _classes(node))


def _count(build: _Builder, node: Node, dtype: torch.dtype) -> Node | int:
    """What the mean divides by: a number for class probabilities, else a scalar of `dtype`."""
    a = arguments(node)
    target, weight = a["target"], a.get("weight")
    shape = value_of(target).shape
    if value_of(target).dtype.is_floating_point:
        return math.prod(_loss_shape(node))
    flags = Value(shape, torch.bool)
    kept = build.call(aten.ne.Scalar, (target, a["ignore_index"]), flags)
    if weight is not None:
        zeros = Value((), value_of(target).dtype)
        ids = build.call(aten.where.ScalarOther, (kept, target, 0), replace(zeros, shape=shape))
        classes = int(value_of(weight).int_shape()[0])
        column = Value((classes, 1), value_of(weight).dtype)
        table = build.call(aten.reshape.default, (weight, [classes, 1]), column)
        rows = replace(column, shape=(*shape, 1))
        picked = build.call(aten.embedding.default, (table, ids), rows)
        flat = replace(column, shape=shape)
        weights = build.call(aten.squeeze.dim, (picked, -1), flat)
        kept = build.call(aten.mul.Tensor, (weights, kept), flat)
    return build.call(aten.sum.default, (kept,), Value((), dtype), dtype=dtype)
