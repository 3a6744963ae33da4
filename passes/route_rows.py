"""One rank's call of an op that routes rows to their owners, or sums up to where it stands."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from autopar.errors import PassError
from autopar.ir.graph import tensor_inputs, value_of, values_of
from autopar.ir.lowered import (
    GROUPED_MM,
    PREFIX_SUM,
    ROUTED_GATHER,
    ROUTED_SCATTER,
    GroupRef,
    Route,
)
from autopar.ir.mesh import Mesh
from autopar.ir.rules.common import arguments, dim_index
from autopar.ir.sharding import Sharding

Node = torch.fx.Node
Coordinates = Mapping[str, int]
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
Special = Callable[[Node, Mesh, Coordinates], Call | None]

aten = torch.ops.aten


def routed_embedding(node: Node, mesh: Mesh, here: Coordinates) -> Call | None:
    """`embedding` with ids and rows split by the same axes; None if there are none."""
    a = arguments(node)
    found = _route(a["weight"], 0, [a["indices"]], mesh, here, wraps=False)
    if found is None:
        return None
    route, group = found
    return ROUTED_GATHER, (a["weight"], [a["indices"]], route, group, a["padding_idx"]), {}


def _index_select(node: Node, mesh: Mesh, here: Coordinates) -> Call | None:
    a = arguments(node)
    dim = dim_index(a["dim"], value_of(a["self"]).rank)
    found = _route(a["self"], dim, [a["index"]], mesh, here, wraps=False)
    if found is None:
        return None
    return ROUTED_GATHER, (a["self"], [a["index"]], *found), {}


def _index(node: Node, mesh: Mesh, here: Coordinates) -> Call | None:
    a = arguments(node)
    dim, indices = _indexed(a["indices"])
    found = _route(a["self"], dim, indices, mesh, here)
    return None if found is None else (ROUTED_GATHER, (a["self"], indices, *found), {})


def _index_put(node: Node, mesh: Mesh, here: Coordinates) -> Call | None:
    a = arguments(node)
    dim, indices = _indexed(a["indices"])
    found = _route(a["self"], dim, indices, mesh, here)
    if found is None:
        return None
    accumulate = bool(a["accumulate"])
    return ROUTED_SCATTER, (a["self"], indices, a["values"], *found, accumulate), {}


def _index_along(node: Node, mesh: Mesh, here: Coordinates) -> Call | None:
    """`index_add` and `index_copy`."""
    a = arguments(node)
    dim = dim_index(a["dim"], value_of(a["self"]).rank)
    found = _route(a["self"], dim, [a["index"]], mesh, here, wraps=False)
    if found is None:
        return None
    call = (a["self"], [a["index"]], a["source"], *found, "alpha" in a)
    return ROUTED_SCATTER, call, {"scale": a["alpha"]} if a.get("alpha", 1) != 1 else {}


def prefix_sum(node: Node, mesh: Mesh, here: Coordinates) -> Call | None:
    """`cumsum` along a split dim; None if it is whole."""
    a = arguments(node)
    value, sharding = values_of(node)[0], _sharding(a["self"])
    if not value.rank:
        return None
    dim = dim_index(a["dim"], value.rank)
    axes = sharding.splits[dim].axes
    if not axes:
        return None
    return PREFIX_SUM, (a["self"], dim, GroupRef(axes), a["dtype"]), {}


def _grouped_mm(node: Node, mesh: Mesh, here: Coordinates) -> Call | None:
    """Rows split, and perhaps experts by the same axes."""
    x, weight, ends = tensor_inputs(node)
    rows, experts = _sharding(x).splits[0], _sharding(weight).splits[0]
    if not rows:
        return None
    axes = tuple(axis for axis in experts.axes if axis in rows.axes)
    sizes = value_of(x).int_shape()[0], value_of(weight).int_shape()[0]
    members = [
        {**here, **dict(zip(axes, at, strict=True))}
        for at in itertools.product(*(range(mesh[axis].size) for axis in axes))
    ]
    parts = tuple(
        tuple((run.start, run.stop) for m in members for run in split.runs(size, mesh, m))
        for split, size in zip((rows, experts), sizes, strict=True)
    )
    if any(len(part) != len(members) for part in parts):
        raise PassError("localise_shapes", "contiguous", f"%{node.name} has strided rows")
    group = GroupRef(axes) if axes else None
    return GROUPED_MM, (str(node.target), x, weight, ends, *parts, group), {}


def _indexed(slots: Sequence[Node | None]) -> tuple[int, list[Node]]:
    """First indexed dim and the index tensors."""
    at = next(i for i, slot in enumerate(slots) if slot is not None)
    return at, [slot for slot in slots if slot is not None]


def _route(
    x: Node,
    dim: int,
    indices: Sequence[Node],
    mesh: Mesh,
    here: Coordinates,
    wraps: bool = True,
) -> tuple[Route, GroupRef] | None:
    """Who owns dim `dim` of `x`, among the devices along the axes that also split the indices."""
    split = _sharding(x).splits[dim]
    moving = {axis for i in indices for s in _sharding(i).splits for axis in s.axes}
    axes = tuple(axis for axis in split.axes if axis in moving)
    if not axes:
        return None
    shape = value_of(x).int_shape()
    if split.outer != 1:
        raise PassError("localise_shapes", "contiguous", f"%{x.name} is strided along dim {dim}")
    owned = []
    for at in itertools.product(*(range(mesh[axis].size) for axis in axes)):
        member = {**here, **dict(zip(axes, at, strict=True))}
        (run,) = split.runs(shape[dim], mesh, member)
        owned.append((run.start, run.stop))
    return Route(dim, shape[dim : dim + len(indices)], tuple(owned), wraps), GroupRef(axes)


def _sharding(x: Node) -> Sharding:
    sharding = value_of(x).sharding
    assert sharding is not None
    return sharding


ROUTED_BY_NAME: Mapping[str, Special] = {
    "aten._grouped_mm.default": _grouped_mm,
    "transformers.grouped_mm_fallback.default": _grouped_mm,
}
ROUTED: Mapping[Any, Special] = {
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.index_add.default: _index_along,
    aten.index_copy.default: _index_along,
}
