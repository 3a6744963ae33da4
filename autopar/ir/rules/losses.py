"""Losses: a mean or sum over split elements is a partial sum (a mean's scale is lowering's)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autopar.ir.graph import Size
from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    Spec,
    arguments,
    broadcast,
    input_value,
    letters,
    named_inputs,
    rule,
    take,
    words,
)

NONE, MEAN, SUM = 0, 1, 2  # at::Reduction


def loss_shape(shapes: Sequence[Sequence[Size]]) -> tuple[Size, ...]:
    """Shape that an elementwise loss has before its reduction: the inputs' shapes broadcast."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((s for s in sizes if s != 1), 1) for sizes in zip(*padded, strict=True))


def elementwise(node: torch.fx.Node) -> ShardingRule:
    """`mse_loss` and its kind: pointwise, then none, mean or sum of everything."""
    shape = loss_shape([item.value.shape for item in named_inputs(node)])
    names = take(letters(), len(shape))
    inputs = {item.name: broadcast(names, shape, item.value.shape) for item in named_inputs(node)}
    return rule(node, inputs, names if arguments(node)["reduction"] == NONE else [])


def of_rows(node: torch.fx.Node) -> ShardingRule | None:
    """`n[d],n[d],n->.`: a loss of rows whose features it takes together, as cosines or distances.

    Labels, where there are any, are one a row, or one for all. None where inputs broadcast.
    """
    rows = [item for item in named_inputs(node) if item.name != "target"]
    labels = [item for item in named_inputs(node) if item.name == "target"]
    if len({item.value.shape for item in rows}) != 1:
        return None
    names = letters()
    lead, last = take(names, rows[0].value.rank - 1), f"[{next(names)}]"
    inputs: dict[str, Spec] = {item.name: [*lead, last] for item in rows}
    for item in labels:
        inputs[item.name] = broadcast(lead, rows[0].value.shape[:-1], item.value.shape)
    return rule(node, inputs, lead if arguments(node)["reduction"] == NONE else [])


def cross_entropy(node: torch.fx.Node) -> ShardingRule:
    """`nv,n->.; comm(v)`: tokens are a sum, the vocabulary is reduced by the op itself.

    Logits are (N, C, d1...) or (C). Probabilities as targets and class weights keep the
    vocabulary whole.
    """
    args = arguments(node)
    logits, target = input_value(node, "self"), input_value(node, "target")
    names = letters()
    v = next(names)
    dims = take(names, logits.rank - 1)
    lead, inner = dims[:1], dims[1:]
    dense = target.dtype.is_floating_point
    weighted = any(item.name == "weight" for item in named_inputs(node))
    if dense or weighted:
        v = f"[{v}]"
    after = dims if args["reduction"] == NONE else []
    inputs: dict[str, Spec] = {
        "self": [*lead, v, *inner],
        "target": [*lead, v, *inner] if dense else dims,
        "weight": [v],
    }
    return rule(node, inputs, after, clauses="" if dense or weighted else f"comm({v})")


def token_cross_entropy(node: torch.fx.Node) -> ShardingRule:
    """`bsv,bs->.; comm(v)`: the same for `autopar.cross_entropy`, whose classes are last."""
    args = arguments(node)
    logits, target = input_value(node, "self"), input_value(node, "target")
    names = letters()
    v = next(names)
    dims = take(names, logits.rank - 1)
    dense = target.dtype.is_floating_point
    if dense or any(item.name == "weight" for item in named_inputs(node)):
        v = f"[{v}]"
    after = dims if args["reduction"] == NONE else []
    inputs: dict[str, Spec] = {
        "self": [*dims, v],
        "target": [*dims, v] if dense else dims,
        "weight": [v],
    }
    return rule(node, inputs, after, clauses="" if v.startswith("[") else f"comm({v})")


def nll(node: torch.fx.Node) -> ShardingRule:
    """`n[v],n->.`; a mean divides by a count that depends on the targets, so tokens are whole."""
    args = arguments(node)
    logits = input_value(node, "self")
    names = letters()
    v = f"[{next(names)}]"
    dims = take(names, logits.rank - 1)
    if args["reduction"] == MEAN:
        dims = [f"[{f}]" for f in dims]
    inputs: dict[str, Spec] = {
        "self": [*dims[:1], v, *dims[1:]],
        "target": dims,
        "weight": [v],
    }
    return rule(node, inputs, dims if args["reduction"] == NONE else [])


ELEMENTWISE = words(
    """
mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
soft_margin_loss kl_div poisson_nll_loss hinge_embedding_loss margin_ranking_loss
"""
)
OF_ROWS = words("cosine_embedding_loss triplet_margin_loss")

RULES: dict[str, Handler] = {
    **{f"aten.{name}": elementwise for name in ELEMENTWISE},
    **{f"aten.{name}": of_rows for name in OF_ROWS},
    "aten.cross_entropy_loss": cross_entropy,
    "autopar.cross_entropy": token_cross_entropy,
    "aten.nll_loss_nd": nll,
    "aten.nll_loss": nll,
    "aten.nll_loss2d": nll,
}
