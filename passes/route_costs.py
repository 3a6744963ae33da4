"""What a routed op sends by itself, in bytes: for prices and for reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.fx

from autopar.cost.families import op_name
from autopar.ir.graph import Value, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Placed, ShardingRule
from autopar.ir.sharding import Sharding

Node = torch.fx.Node

INDEX_BYTES = 8  # positions and counts travel as int64
SCATTERS = ("index_put", "index_add", "index_copy")
GROUPED = ("_grouped_mm", "grouped_mm_fallback")


@dataclass(frozen=True)
class Message:
    """One collective that an op issues itself; `nbytes` as `autopar.cost.comm` counts them.

    With `x` times the rows, it has `x ** power` times the bytes.
    """

    kind: str
    nbytes: float
    backward: bool = False
    power: float = 1.0


def route_messages(
    node: Node, rule: ShardingRule, placed: Placed, factor: str, axis: str, mesh: Mesh
) -> tuple[Message, ...]:
    """Messages on `axis`, which splits the route `factor` of the call; none for other factors.

    A routed op sends counts, positions and rows forward, and the rows' gradients backward. Rows are
    taken to be spread evenly: a device sends as many bytes as its own positions stand for.
    """
    if factor not in rule.routes:
        return ()
    if op_name(node.target) in GROUPED:
        return _between_experts(node, placed, mesh)
    sources = tensor_inputs(node)
    indices = [i for i in range(len(sources)) if not _has_rows(node, i)]
    positions = max(_local_numel(value_of(sources[i]), placed.inputs[i], mesh) for i in indices)
    if op_name(node.target) in SCATTERS:
        rows, row = value_of(sources[-1]), _row_numel(node, rule, placed, mesh)
        moved, grad = positions * row * rows.dtype.itemsize, rows.requires_grad
    else:
        (out,) = values_of(node)
        moved = _local_numel(out, placed.outputs[0], mesh) * out.dtype.itemsize
        grad = out.requires_grad
    found = [
        Message("all_to_all", float(INDEX_BYTES * mesh[axis].size), power=0.0),
        Message("all_to_all", float(INDEX_BYTES * positions)),
        Message("all_to_all", float(moved)),
    ]
    if grad:
        found.append(Message("all_to_all", float(moved), backward=True))
    return tuple(found)


def _between_experts(node: Node, placed: Placed, mesh: Mesh) -> tuple[Message, ...]:
    """Rows sorted by expert lie with their expert's owner already, but for the imbalance.

    With every expert as likely, the rows before an owner's first expert are binomial: of R rows in
    all, a standard deviation of at most sqrt(R) / 2 is on the wrong side of each of its two ends.
    """
    x, out = value_of(tensor_inputs(node)[0]), values_of(node)[0]
    (here, wide), (_, narrow) = (
        s.local_shape(v.int_shape(), mesh, _origin(mesh))
        for s, v in ((placed.inputs[0], x), (placed.outputs[0], out))
    )
    rows = math.sqrt(here * placed.inputs[0].splits[0].parts(mesh))
    there, back = rows * wide * x.dtype.itemsize, rows * narrow * out.dtype.itemsize
    found = [Message("all_to_all", n, power=0.5) for n in (there, back)]
    if out.requires_grad:
        found += [Message("all_to_all", n, True, power=0.5) for n in (back, there)]
    return tuple(found)


def _has_rows(node: Node, slot: int) -> bool:
    """Whether a tensor input is the indexed tensor or the values, and not an index."""
    last = len(tensor_inputs(node)) - 1
    if op_name(node.target) in SCATTERS:
        return slot in (0, last)
    return slot == 0


def _row_numel(node: Node, rule: ShardingRule, placed: Placed, mesh: Mesh) -> int:
    """Elements here of one row of what is scattered into: its dims that are not indexed."""
    base = tensor_inputs(node)[0]
    shape = placed.inputs[0].local_shape(value_of(base).int_shape(), mesh, _origin(mesh))
    owned = {rule.parts_of(route)[1] for route in rule.routes}
    first = next(d for d, dim in enumerate(rule.inputs[0]) if owned.intersection(dim))
    indexed = range(first, first + _index_count(node))
    return math.prod(size for d, size in enumerate(shape) if d not in indexed)


def _index_count(node: Node) -> int:
    """How many adjacent dims are indexed: one per index tensor."""
    return sum(not _has_rows(node, slot) for slot in range(len(tensor_inputs(node))))


def _local_numel(value: Value, sharding: Sharding, mesh: Mesh) -> int:
    return math.prod(sharding.local_shape(value.int_shape(), mesh, _origin(mesh)))


def _origin(mesh: Mesh) -> dict[str, int]:
    return dict.fromkeys(mesh.names, 0)
