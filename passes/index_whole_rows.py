"""Say of lookups of whole rows that they are: only those can be routed to the rows' owners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph, Size, Value, value_of
from autopar.ir.rules.common import arguments, dim_index, is_one, same

from .free_factories import erase_unread

aten = torch.ops.aten
Node = torch.fx.Node
Rewrite = Callable[["_Builder", dict[str, Any]], Node | None]

SUM, MEAN = 0, 1  # modes of `embedding_bag`


def index_whole_rows(graph: Graph) -> Graph:
    """Rewrite element-wise lookups by an expanded index, and bags of equally many rows.

    `gather`, `take_along_dim`, `scatter` and `scatter_add` whose index is one column, repeated over
    the other dims, become `index_select`, `index_copy` and `index_add`; `embedding_bag` of a
    two-dimensional input becomes `embedding` and a sum or mean. Anything else stays.
    """
    new = graph.copy()
    for node in list(new.fx.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is None:
            continue
        sources = node.all_input_nodes
        with new.fx.inserting_before(node):
            made = rewrite(_Builder(new.fx, node), arguments(node))
        if made is None:
            continue
        if node.target in _BAGS:
            (picked,) = node.users
            picked.replace_all_uses_with(made)
            made.meta["value"] = picked.meta["value"]
            new.fx.erase_node(picked)
        else:
            made.meta["value"] = node.meta["value"]
            node.replace_all_uses_with(made)
        new.fx.erase_node(node)
        for source in sources:
            erase_unread(new, source)
    return new


class _Builder:
    """Adds calls that inherit an op's place in the user's source."""

    def __init__(self, fx: torch.fx.Graph, origin: Node) -> None:
        self.fx = fx
        self.origin = origin

    def call(self, target: Any, args: tuple[Any, ...], shape: tuple[Size, ...], like: Node) -> Node:
        node = self.fx.call_function(target, args)
        value = value_of(like)
        node.meta = {
            **self.origin.meta,
            "value": Value(shape, value.dtype, None, value.requires_grad),
        }
        return node


def _gather(b: _Builder, a: dict[str, Any]) -> Node | None:
    x, index = a["self"], a["index"]
    dim, column = _column(b, x, a["dim"], index, value_of(index).shape)
    if column is None:
        return None
    return b.call(aten.index_select.default, (x, dim, column), value_of(index).shape, x)


def _take_along_dim(b: _Builder, a: dict[str, Any]) -> Node | None:
    x, index = a["self"], a["indices"]
    if a["dim"] is None or value_of(index).rank != value_of(x).rank:
        return None
    shape = value_of(b.origin).shape
    dim, column = _column(b, x, a["dim"], index, shape)
    if column is None:
        return None
    return b.call(aten.index_select.default, (x, dim, column), shape, x)


def _scatter(target: Any) -> Rewrite:
    def rewrite(b: _Builder, a: dict[str, Any]) -> Node | None:
        x, index, source = a["self"], a["index"], a["src"]
        shape = value_of(index).shape
        if not all(same(s, t) for s, t in zip(value_of(source).shape, shape, strict=True)):
            return None
        dim, column = _column(b, x, a["dim"], index, shape)
        if column is None:
            return None
        return b.call(target, (x, dim, column, source), value_of(x).shape, x)

    return rewrite


def _column(
    b: _Builder, x: Node, dim: int, index: Node, shape: tuple[Size, ...]
) -> tuple[int, Node | None]:
    """The dim, and the one-dimensional index of which `index` is repetitions up to `shape`.

    None if it is something else, or if `shape` takes part of the other dims of `x`.
    """
    at, rank = dim_index(dim, value_of(x).rank), value_of(x).rank
    others = [d for d in range(rank) if d != at]
    if not others or not all(same(value_of(x).shape[d], shape[d]) for d in others):
        return at, None
    while index.target in (aten.expand.default, aten.repeat.default):
        inner = index.args[0]
        assert isinstance(inner, Node)
        before = value_of(inner).shape
        if len(before) != rank or not same(before[at], shape[at]):
            return at, None
        index = inner
    if not all(is_one(value_of(index).shape[d]) for d in others):
        return at, None
    return at, b.call(aten.reshape.default, (index, [shape[at]]), (shape[at],), index)


def _embedding_bag(b: _Builder, a: dict[str, Any]) -> Node | None:
    """Bags that all have as many rows: offsets count from zero in steps of that many."""
    users = list(b.origin.users)
    if len(users) != 1 or users[0].args[1:] != (0,):
        return None
    if a["mode"] not in (SUM, MEAN) or a["sparse"] or a["scale_grad_by_freq"]:
        return None
    if a.get("padding_idx", -1) not in (None, -1) or a["include_last_offset"]:
        return None
    offsets, ids = a["offsets"], a["indices"]
    if offsets.target is not aten.arange.start_step or value_of(ids).rank != 1:
        return None
    start, stop, step = offsets.args
    total = value_of(ids).shape[0]
    if start != 0 or not same(stop, total):
        return None
    weight, width = a["weight"], value_of(a["weight"]).shape[1]
    (bags,) = value_of(offsets).shape
    shape = (bags, step)
    table = b.call(aten.reshape.default, (ids, list(shape)), shape, ids)
    rows = b.call(aten.embedding.default, (weight, table), (*shape, width), weight)
    scales = a["per_sample_weights"]
    if scales is not None:
        wide = b.call(aten.reshape.default, (scales, [*shape, 1]), (*shape, 1), scales)
        rows = b.call(aten.mul.Tensor, (rows, wide), (*shape, width), rows)
    reduce = aten.sum.dim_IntList if a["mode"] == SUM else aten.mean.dim
    return b.call(reduce, (rows, [1]), (bags, width), rows)


_BAGS = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)
_REWRITES: Mapping[Any, Rewrite] = {
    aten.gather.default: _gather,
    aten.take_along_dim.default: _take_along_dim,
    aten.scatter.src: _scatter(aten.index_copy.default),
    aten.scatter_add.default: _scatter(aten.index_add.default),
    **dict.fromkeys(_BAGS, _embedding_bag),
}
