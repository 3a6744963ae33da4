"""From the program of all ranks to the program of one: local shapes, offsets and groups."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph, Value, tensor_inputs, value_of, values_of
from autopar.ir.localise import local_call
from autopar.ir.lowered import (
    BATCH_NORM,
    BUCKET,
    CAUSAL_ATTENTION,
    COLLECTIVE,
    CROSS_ENTROPY,
    DROPOUT,
    EXCHANGE,
    KEEP_FIRST,
    MASKED_EMBEDDING,
    MICRO_SLICE,
    PMAX,
    PMIN,
    PSUM,
    PVARY,
    SWAP,
    Collective,
    GroupRef,
    Region,
    ShardSpec,
    SwapSpec,
)
from autopar.ir.mesh import MICRO_BATCH, Mesh
from autopar.ir.rules.common import arguments
from autopar.ir.sharding import Sharding

from .number_random_calls import RANDOM_CALL, is_random
from .route_rows import ROUTED, ROUTED_BY_NAME, prefix_sum, routed_embedding

Node = torch.fx.Node
Coordinates = Mapping[str, int]
aten = torch.ops.aten
SEED = "rng_seed"


def localise_shapes(graph: Graph, mesh: Mesh, rank: int) -> Graph:
    """Rewrite the graph for the device `rank`: every shape, size argument and offset is its own.

    Collectives become exchanges on a group; ops whose shards must know where they lie (dropout,
    causal attention on split rows, vocabulary-parallel embedding and cross-entropy, batch norm)
    become lowered ops. If the graph draws random numbers, a placeholder `rng_seed` (role "seed", an
    int) is added in front. On the axis of micro-batches the shapes are those of each of them.
    Ends: shapes are global. Establishes: one rank's program.
    """
    new = graph.copy()
    here = mesh.coordinates(rank)
    seed = None
    if any(is_random(node) for node in new.fx.nodes):
        with new.fx.inserting_before(next(iter(new.fx.nodes))):
            seed = new.fx.placeholder(SEED)
        seed.meta = {"value": None, "role": "seed", "fqns": (SEED,)}
    random_calls = 0
    numbers = new.placeholders("micro_batch")
    rewritten: list[tuple[Node, tuple[Any, tuple[Any, ...], dict[str, Any]]]] = []
    for node in new.fx.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if node.target is aten.dropout.default:
            number = node.meta.get(RANDOM_CALL, random_calls)
            call = _dropout(node, mesh, here, seed, number, *numbers)
            rewritten.append((node, call))
            random_calls += call[0] is DROPOUT
        else:
            rewritten.append((node, _call(node, mesh, here)))
    for node, (target, args, kwargs) in rewritten:
        node.target, node.args, node.kwargs = target, args, kwargs
    for node in new.fx.nodes:
        node.meta["value"] = _local_value(node.meta.get("value"), mesh, here)
    return new


def _local_value(value: Any, mesh: Mesh, here: Coordinates) -> Any:
    if isinstance(value, Value) and value.sharding is not None:
        return replace(value, shape=value.sharding.local_shape(value.int_shape(), mesh, here))
    if isinstance(value, tuple):
        return tuple(_local_value(v, mesh, here) for v in value)
    return value


def _call(node: Node, mesh: Mesh, here: Coordinates) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    arguments: Any = node.args  # of a lowered op, FX's type of arguments does not hold
    if node.target is COLLECTIVE:
        op, axis, x = arguments
        spec = spec_of(op, axis, value_of(x), value_of(node), mesh, here)
        return EXCHANGE, (op, [spec], GroupRef((axis,)), x), {}
    if node.target is BUCKET:
        op, axis, xs = arguments
        specs = [
            spec_of(op, axis, value_of(x), after, mesh, here)
            for x, after in zip(xs, values_of(node), strict=True)
        ]
        return EXCHANGE, (op, specs, GroupRef((axis,)), *xs), {}
    special = _SPECIAL.get(node.target) or ROUTED_BY_NAME.get(str(node.target))
    if special is not None:
        made: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = special(node, mesh, here)
        if made is not None:
            return made
    inputs = [_local_shape(value_of(x), mesh, here) for x in tensor_inputs(node)]
    outputs = [_local_shape(v, mesh, here) for v in values_of(node)]
    return local_call(node, inputs, outputs)


def _local_shape(value: Value, mesh: Mesh, here: Coordinates) -> tuple[int, ...]:
    assert value.sharding is not None
    return value.sharding.local_shape(value.int_shape(), mesh, here)


def spec_of(
    op: Collective, axis: str, before: Value, after: Value, mesh: Mesh, here: Coordinates
) -> ShardSpec | SwapSpec | None:
    """How the dim that a collective touches is divided among the members of its group."""
    if op in (PVARY, PSUM, PMAX, PMIN, KEEP_FIRST):
        return None
    assert before.sharding is not None and after.sharding is not None
    if op is SWAP:
        return SwapSpec(
            _shard_spec(axis, before, before.sharding, mesh, here),
            _shard_spec(axis, after, after.sharding, mesh, here),
        )
    split = before if op.before == "S" else after
    assert split.sharding is not None
    return _shard_spec(axis, split, split.sharding, mesh, here)


def _shard_spec(
    axis: str, value: Value, sharding: Sharding, mesh: Mesh, here: Coordinates
) -> ShardSpec:
    dim = sharding.dim_of(axis)
    assert dim is not None
    split, size = sharding.splits[dim], value.int_shape()[dim]
    lengths = tuple(
        len(split.unit_range(size, mesh, {**here, axis: member}))
        for member in range(mesh[axis].size)
    )
    return ShardSpec(dim, lengths, split.outer, split.block)


def _sharding(x: Any) -> Sharding:
    sharding = value_of(x).sharding
    assert sharding is not None
    return sharding


def _dropout(
    node: Node,
    mesh: Mesh,
    here: Coordinates,
    seed: Node | None,
    call: int,
    micro_batch: Node | None = None,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    a = arguments(node)
    if not is_random(node):
        return aten.alias.default, (a["input"],), {}
    shape, splits = value_of(node).int_shape(), _sharding(node).splits
    if micro_batch is None:
        region = Region.of(shape, splits, mesh, dict(here))
        return DROPOUT, (a["input"], a["p"], seed, call, region), {}
    regions = tuple(
        Region.of(shape, splits, mesh, {**here, MICRO_BATCH: k})
        for k in range(mesh[MICRO_BATCH].size)
    )
    return DROPOUT, (a["input"], a["p"], seed, call, regions, micro_batch), {}


def _micro_slice(
    node: Node, mesh: Mesh, here: Coordinates
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    arguments: Any = node.args
    x, micro_batch = arguments
    spec = _shard_spec(MICRO_BATCH, value_of(node), _sharding(node), mesh, here)
    return MICRO_SLICE, (x, spec, micro_batch), {}


def _attention(
    node: Node, mesh: Mesh, here: Coordinates
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    a = arguments(node)
    query = value_of(a["query"])
    split = _sharding(a["query"]).splits[-2]
    if not a["is_causal"] or not split:
        return None
    rows = split.runs(query.int_shape()[-2], mesh, here)
    if not rows[0] or 0 in _local_shape(value_of(node), mesh, here):
        return None
    assert len(rows) == 1 and a["attn_mask"] is None and a["dropout_p"] == 0.0
    tensors = (a["query"], a["key"], a["value"])
    return CAUSAL_ATTENTION, (*tensors, rows[0].start, a["scale"], a["enable_gqa"]), {}


def _embedding(
    node: Node, mesh: Mesh, here: Coordinates
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    a = arguments(node)
    split = _sharding(a["weight"]).splits[0]
    if not split:
        return None
    routed = routed_embedding(node, mesh, here)
    if routed is not None:
        return routed
    rows = split.runs(value_of(a["weight"]).int_shape()[0], mesh, here)
    assert len(rows) == 1
    return MASKED_EMBEDDING, (a["weight"], a["indices"], rows[0].start, a["padding_idx"]), {}


def _cross_entropy(
    node: Node, mesh: Mesh, here: Coordinates
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    a = arguments(node)
    sharding = _sharding(a["self"])
    last = node.target is not aten.cross_entropy_loss.default
    classes = sharding.rank - 1 if last else min(1, sharding.rank - 1)
    split = sharding.splits[classes]
    tokens = tuple(
        axis
        for axis in mesh.names
        if axis != MICRO_BATCH
        and any(axis in s.axes for d, s in enumerate(sharding.splits) if d != classes)
    )
    if not split and not tokens:
        return None
    size = value_of(a["self"]).int_shape()[classes]
    start = split.runs(size, mesh, here)[0].start if split else 0
    reduction = ("none", "mean", "sum")[a["reduction"]]
    return (
        CROSS_ENTROPY,
        (
            a["self"],
            a["target"],
            a["weight"],
            reduction,
            a["ignore_index"],
            a["label_smoothing"],
            start,
            size,
            GroupRef(split.axes) if split else None,
            GroupRef(tokens) if tokens and reduction == "mean" else None,
            *((True,) if last else ()),
        ),
        {},
    )


def _batch_norm(
    node: Node, mesh: Mesh, here: Coordinates
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    x, weight, bias, running_mean, running_var, training, momentum, eps = node.args
    if not training:
        return None
    sharding = _sharding(x)
    axes = tuple(
        axis
        for axis in mesh.names
        if axis != MICRO_BATCH
        and any(axis in s.axes for d, s in enumerate(sharding.splits) if d != 1)
    )
    if not axes:
        return None
    group = GroupRef(axes)
    args = (x, weight, bias, running_mean, running_var, training, momentum, eps, group)
    return BATCH_NORM, args, {}


def _special() -> dict[Any, Any]:
    from autopar import ops, token_ops  # register torch.ops.autopar

    del ops, token_ops
    return {
        aten.embedding.default: _embedding,
        aten.scaled_dot_product_attention.default: _attention,
        aten.cross_entropy_loss.default: _cross_entropy,
        torch.ops.autopar.cross_entropy.default: _cross_entropy,
        torch.ops.autopar.batch_norm.default: _batch_norm,
        aten.cumsum.default: prefix_sum,
        MICRO_SLICE: _micro_slice,
        **ROUTED,
    }


_SPECIAL = _special()
