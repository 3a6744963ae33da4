"""What an op sends by itself, as formulas: the symbolic twin of `Pricer.own_messages`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy

from autopar.cost.compute import LocalOp, TensorSpec, numel
from autopar.cost.formula import axis_size, expression
from autopar.ir.rule import Choice, ShardingRule

from .route_costs import GROUPED, INDEX_BYTES, SCATTERS

Own = tuple[str, str, bool, Any]  # kind, axis, in the backward, bytes as the group sees it whole


def own_messages(op: LocalOp, rule: ShardingRule, chosen: Mapping[str, Choice]) -> list[Own]:
    """The collectives of one call of an op with traced local shapes."""
    found: list[Own] = []
    for axis, choice in chosen.items():
        if choice.factor in rule.comm:
            forward, backward = _reduced(op, rule, choice.factor)
            found.append(("all_reduce", axis, False, expression(forward)))
            found.append(("all_reduce", axis, True, expression(backward)))
        elif choice.factor in rule.routes:
            found += _routed(op, rule, axis, chosen)
    return [message for message in found if message[3] != 0]


def _reduced(op: LocalOp, rule: ShardingRule, factor: str) -> tuple[Any, Any]:
    """Bytes of an op's all-reduces: statistics of a batch or of a vocabulary, totals of a sum."""
    if op.name == "batch_norm":
        channels = op.outputs[0].shape[1]
        return 3 * channels * 4, 2 * channels * 4
    if op.name == "cumsum":
        split = next((d for d, dim in enumerate(rule.outputs[0]) if factor in dim), 0)
        totals = op.outputs[0].dtype.itemsize * _without(op.outputs[0], split)
        return totals, totals * any(op.grads)
    classes = next(d for d, dim in enumerate(rule.inputs[0]) if factor in dim)
    tokens = _without(op.inputs[0], classes)
    return tokens * 4, 2 * tokens * 4


def _without(spec: TensorSpec, dim: int) -> Any:
    return math.prod(size for d, size in enumerate(spec.shape) if d != dim)


def _routed(op: LocalOp, rule: ShardingRule, axis: str, chosen: Mapping[str, Choice]) -> list[Own]:
    """Counts, positions and rows there, the rows' gradients back: see `route_messages`."""
    if op.name in GROUPED:
        return _between_experts(op, rule, axis, chosen)
    scatter = op.name in SCATTERS
    last = len(op.inputs) - 1
    indices = [s for i, s in enumerate(op.inputs) if i not in ((0, last) if scatter else (0,))]
    positions = max((numel(spec.shape) for spec in indices), key=_hint)
    if scatter:
        owned = {rule.parts_of(route)[1] for route in rule.routes}
        first = next(d for d, dim in enumerate(rule.inputs[0]) if owned.intersection(dim))
        indexed = range(first, first + len(indices))
        row = math.prod(n for d, n in enumerate(op.inputs[0].shape) if d not in indexed)
        moved, grad = positions * row * op.inputs[-1].dtype.itemsize, op.grads[-1]
    else:
        moved, grad = op.outputs[0].bytes, any(op.grads)
    # By comm's convention an all-to-all is given its local bytes: whole, they are n times as many.
    n = axis_size(axis)
    found = [
        ("all_to_all", axis, False, n * expression(nbytes))
        for nbytes in (expression(INDEX_BYTES) * n, INDEX_BYTES * positions, moved)
    ]
    if grad:
        found.append(("all_to_all", axis, True, n * expression(moved)))
    return found


def _between_experts(
    op: LocalOp, rule: ShardingRule, axis: str, chosen: Mapping[str, Choice]
) -> list[Own]:
    """The imbalance of rows that are sorted by expert: see `route_costs`."""
    x, out = op.inputs[0], op.outputs[0]
    (factor,) = rule.inputs[0][0]
    n = math.prod(axis_size(a) for a, c in chosen.items() if factor in rule.parts_of(c.factor))
    rows = sympy.sqrt(n * expression(x.shape[0]))
    there, back = (
        axis_size(axis) * rows * expression(spec.shape[1]) * spec.dtype.itemsize
        for spec in (x, out)
    )
    found = [("all_to_all", axis, False, there), ("all_to_all", axis, False, back)]
    if any(op.grads):
        found += [("all_to_all", axis, True, back), ("all_to_all", axis, True, there)]
    return found


def _hint(size: Any) -> float:
    return float(getattr(size, "hint", size))
