"""The type discipline of the lowered language, derived again of every graph.

On each mesh axis a value is S (split), P (partial), R (replicated, its gradient complete) or V
(replicated, its gradient still partial). Of a value without gradient V means the same as R.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch.fx

from .graph import Graph, Value, tensor_inputs, values_of
from .lowered import BUCKET, COLLECTIVE, RESHARD, SWAP, Collective, LoweredOp
from .mesh import MICRO_BATCH, Mesh
from .registry import rule_for
from .rule import ShardingRule
from .text import print_argument

SENDS = "sends"  # on an output node: what is returned goes to another piece, split as it is

_REDUCTION = {"psum": "sum", "scatter_sum": "sum", "pmax": "max", "pmin": "min"}


@dataclass(frozen=True)
class _Typed:
    """A value on one axis: the node that made it, its kind, and whether it requires grad."""

    name: str
    kind: str
    grad: bool


def types_follow(graph: Graph, mesh: Mesh | None) -> str | None:
    """On every axis the kind of every value follows from those of its inputs.

    - A collective takes `op.before` to `op.after` on its axis and leaves the other axes alone.
    - Where an op's input or output is S or P, or an input V, none of its inputs that require grad
      is R: such an input would get a part of its gradient for the whole. This does not matter where
      no output requires grad.
    - Outputs are R if all inputs are; V if all are R or V and some are V; R although an input is S
      or P only if the op communicates by itself; P only if an input is S or P.
    - The user's outputs are R, but on the axis of micro-batches. A new value of a buffer is sharded
      as the buffer.
    """
    if mesh is None:
        return None
    for node in graph.fx.nodes:
        for value in values_of(node):
            if value.sharding is None:
                return f"%{node.name} has no sharding"
    for node in graph.calls():
        if node.target in (COLLECTIVE, BUCKET):
            sentence = _collective_follows(node, mesh)
        elif node.target is RESHARD:
            sentence = f"%{node.name} = reshard is not a typed collective"
        elif node.target is operator.getitem:
            sentence = None
        else:
            found = (_op_follows(node, axis) for axis in mesh.names)
            sentence = next((text for text in found if text is not None), None)
        if sentence is not None:
            return sentence
    return _outputs_follow(graph, mesh)


def _collective_follows(node: torch.fx.Node, mesh: Mesh) -> str | None:
    op: Any = node.args[0]
    axis: Any = node.args[1]
    inputs = [value for arg in tensor_inputs(node) for value in values_of(arg)]
    names = [arg.name for arg in tensor_inputs(node) for _ in values_of(arg)]
    outputs = values_of(node)
    if not isinstance(op, Collective) or not isinstance(axis, str):
        return f"%{node.name} = {node.target}({print_argument(op)}, ...) names no collective"
    if axis not in mesh.names:
        return f"%{node.name} = {op} names axis '{axis}', which mesh {mesh} lacks"
    if len(inputs) != len(outputs):
        return f"%{node.name} = {op} takes {len(inputs)} tensors to {len(outputs)}"
    for name, before, after in zip(names, inputs, outputs, strict=True):
        says = f"%{node.name} = {op} on '{axis}'"
        if not _same_kind(_kind(before, axis), op.before, before.requires_grad):
            return f"{says} takes {op.before}, but %{name} is {_kind(before, axis)}"
        if not _same_kind(_kind(after, axis), op.after, after.requires_grad):
            return f"{says} makes {op.after}, but is typed {_kind(after, axis)}"
        source, target = before.sharding, after.sharding
        assert source is not None and target is not None
        reduction = _REDUCTION.get(op.name)
        if reduction is not None and dict(source.partial)[axis] != reduction:
            return f"{says} reduces by {reduction}, but %{name} @ {source} does not"
        if op == SWAP and source.dim_of(axis) == target.dim_of(axis):
            return f"{says} moves no split: %{name} @ {source} becomes {target}"
        if before.shape != after.shape or before.dtype != after.dtype:
            return f"{says} changes the shape or dtype of %{name}"
        if before.requires_grad != after.requires_grad:
            return f"{says} changes whether %{name} requires grad"
        if _elsewhere(before, axis) != _elsewhere(after, axis):
            return f"{says} takes %{name} @ {source} to {target}, which differ on other axes"
    return None


def _elsewhere(value: Value, axis: str) -> object:
    """What the sharding says of the axes other than `axis`; layouts of split dims left out."""
    assert value.sharding is not None
    rest = value.sharding.without_axis(axis)
    varying = {a for a in rest.varying if a != axis and value.requires_grad}
    return [split.axes for split in rest.splits], rest.partial, varying


def _op_follows(node: torch.fx.Node, axis: str) -> str | None:
    inputs = [
        _Typed(arg.name, _kind(value, axis), value.requires_grad)
        for arg in tensor_inputs(node)
        for value in values_of(arg)
    ]
    outputs = [_Typed(node.name, _kind(v, axis), v.requires_grad) for v in values_of(node)]
    cut = next((t for t in (*inputs, *outputs) if t.kind in "SP"), None)
    varying = cut or next((t for t in inputs if t.kind == "V"), None)
    if varying is not None and any(t.grad for t in outputs):
        for tensor in inputs:
            if tensor.grad and tensor.kind == "R":
                return (
                    f"%{node.name} gives %{tensor.name}, R on '{axis}', a partial gradient: "
                    f"%{varying.name} is {varying.kind}"
                )
    split_input = next((t for t in inputs if t.kind in "SP"), None)
    for out in outputs:
        if not inputs and out.kind in "PV":
            return f"%{node.name} has no inputs, but is {out.kind} on '{axis}'"
        if out.kind == "P" and split_input is None:
            return f"%{node.name} is P on '{axis}', but no input is S or P"
        if out.kind in "RV" and split_input is not None:
            if out.kind == "V" or not _communicates(node):
                return (
                    f"%{node.name} is {out.kind} on '{axis}', "
                    f"but %{split_input.name} is {split_input.kind}"
                )
        elif out.kind == "V" and varying is None:
            return f"%{node.name} is V on '{axis}', but every input is R"
        elif out.kind == "R" and out.grad and varying is not None and varying.kind == "V":
            return f"%{node.name} is R on '{axis}', but %{varying.name} is V"
    return None


def _outputs_follow(graph: Graph, mesh: Mesh) -> str | None:
    results = results_of(graph)
    placeholders = {node.name: node for node in graph.placeholders()}
    returned = [result for result in results[: graph.outputs] if isinstance(result, torch.fx.Node)]
    for result, axis in itertools.product(returned, mesh.names):
        if axis == MICRO_BATCH:
            continue
        for value in values_of(result):
            allowed = "RS" if graph.output_node.meta.get(SENDS) else "R"
            if _kind(value, axis) not in allowed:
                return f"%{result.name} is {_kind(value, axis)} on '{axis}', but is returned"
    for name, update in zip(graph.mutated, results[graph.outputs :], strict=True):
        if name not in placeholders or not isinstance(update, torch.fx.Node):
            continue
        (old,), (new,) = values_of(placeholders[name]), values_of(update)
        assert old.sharding is not None and new.sharding is not None
        if old.sharding.without_varying() != new.sharding.without_varying():
            return f"%{update.name} @ {new.sharding} updates %{name} @ {old.sharding}"
    return None


def _kind(value: Value, axis: str) -> str:
    """Kind of a value on an axis, V read as R where no gradient flows."""
    assert value.sharding is not None
    kind = value.sharding.kind(axis)
    return "R" if kind == "V" and not value.requires_grad else kind


def _same_kind(kind: str, wanted: str, grad: bool) -> bool:
    return kind == wanted or (not grad and {kind, wanted} == {"R", "V"})


def _communicates(node: torch.fx.Node) -> bool:
    """Whether the op itself may reduce over an axis that splits an input."""
    if isinstance(node.target, LoweredOp):
        return True
    rule = rule_of(node)
    return rule is not None and bool(rule.comm)


def rule_of(node: torch.fx.Node) -> ShardingRule | None:
    """The registry's rule of a call, else the discovered one that a pass left in `meta["rule"]`."""
    found = rule_for(node)
    return found if found is not None else node.meta.get("rule")


def results_of(graph: Graph) -> tuple[object, ...]:
    """Entries of the output node."""
    results = graph.output_node.args[0]
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)
