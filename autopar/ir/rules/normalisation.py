"""Normalisations: what the statistics are taken over is whole, or reduced by the op itself."""

from __future__ import annotations

import torch

from autopar.ir.graph import values_of
from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    Spec,
    all_whole,
    arguments,
    hold,
    input_value,
    letters,
    named_inputs,
    rule,
    same,
    take,
)


def over_last(node: torch.fx.Node) -> ShardingRule:
    """`layer_norm`, `rms_norm`: `bs[d],[d],[d]->bs[d]`; statistics keep the leading dims."""
    x = input_value(node, "input")
    n = len(arguments(node)["normalized_shape"])
    names = hold(take(letters(), x.rank), range(x.rank - n, x.rank))
    tail = names[x.rank - n :]
    inputs: dict[str, Spec] = {"input": names, "weight": tail, "bias": tail}
    outputs = [names]
    for extra in values_of(node)[1:]:  # native forms also give mean and rstd
        outputs.append([*names[: x.rank - n], *["1"] * (extra.rank - x.rank + n)])
    return rule(node, inputs, *outputs)


def group_norm(node: torch.fx.Node) -> ShardingRule:
    """`n[c][h][w],[c],[c]->n[c][h][w]`."""
    x = input_value(node, "input")
    names = hold(take(letters(), x.rank), range(1, x.rank))
    inputs = {"input": names, "weight": names[1:2], "bias": names[1:2]}
    return rule(node, inputs, names)


def instance_norm(node: torch.fx.Node) -> ShardingRule:
    """Statistics per sample and channel: `nc[h][w],c->nc[h][w]`."""
    args = arguments(node)
    if args["running_mean"] is not None:
        return all_whole(node)
    x = input_value(node, "input")
    names = hold(take(letters(), x.rank), range(2, x.rank))
    inputs = {item.name: names[1:2] for item in named_inputs(node)} | {"input": names}
    return rule(node, inputs, names)


def batch_norm(node: torch.fx.Node) -> ShardingRule:
    """ATen's own form: in training the batch is whole (autopar's op shares the statistics)."""
    x = input_value(node, "input")
    names = take(letters(), x.rank)
    if arguments(node)["training"]:
        names = hold(names, [0, *range(2, x.rank)])
    inputs = {item.name: names[1:2] for item in named_inputs(node)} | {"input": names}
    return rule(node, inputs, names)


def shared_batch_norm(node: torch.fx.Node) -> ShardingRule:
    """`nchw,c,c,c,c->nchw,c,c; comm(n) comm(h) comm(w)`: statistics over the global batch.

    Without running statistics the last two outputs have no elements.
    """
    names = take(letters(), values_of(node)[0].rank)
    found = named_inputs(node)
    channel = names[1:2]
    inputs: dict[str, Spec] = {item.name: channel for item in found}
    inputs[found[0].name] = names
    statistics = [["1"] if same(v.shape[0], 0) else channel for v in values_of(node)[1:]]
    outputs = [names, *statistics]
    clauses = " ".join(f"comm({f})" for f in names if f not in channel)
    return rule(node, inputs, *outputs, clauses=clauses)


RULES: dict[str, Handler] = {
    "aten.layer_norm": over_last,
    "aten.native_layer_norm": over_last,
    "aten.rms_norm": over_last,
    "aten._fused_rms_norm": over_last,
    "aten.group_norm": group_norm,
    "aten.instance_norm": instance_norm,
    "aten.batch_norm": batch_norm,
    "autopar.batch_norm": shared_batch_norm,
}
