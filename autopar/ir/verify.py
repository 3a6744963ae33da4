"""Invariants of graphs: what must be true after a pass, checked after every pass.

An invariant is a function of a graph and its mesh that returns None or one sentence, which names
the node and the fact: `%h @ [dp, dp] uses axis 'dp' twice`. Invariants that speak of shardings say
nothing without a mesh.

`types_follow` re-derives the type discipline of the lowered language. On each mesh axis a value is
S (split), P (partial), R (replicated, its gradient complete) or V (replicated, its gradient still
partial). Of a value without gradient V means the same as R.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from autopar.errors import PassError

from .graph import Graph, Value, tensor_inputs, values_of
from .lowered import BUCKET, COLLECTIVE, RESHARD, SWAP, Collective, GroupRef, LoweredOp
from .mesh import MICRO_BATCH, Mesh
from .pointwise import Fusion, Pointwise
from .registry import rule_for
from .rule import Choice, ShardingRule, choices, factor_sizes, normalised, place
from .sharding import Sharding
from .text import print_argument, print_node

Invariant = Callable[[Graph, Mesh | None], str | None]

SENDS = "sends"  # on an output node: what is returned goes to another piece, split as it is

_REDUCTION = {"psum": "sum", "scatter_sum": "sum", "pmax": "max", "pmin": "min"}


def verify(
    graph: Graph, mesh: Mesh | None, names: Iterable[str], pass_name: str = "verify"
) -> None:
    """Check the invariants `names`, in that order, on what the pass `pass_name` made.

    Raises PassError at the first that does not hold, ValueError on an unknown name.
    """
    for name in names:
        if name not in INVARIANTS:
            raise ValueError(f"no invariant {name!r}; there are {', '.join(INVARIANTS)}")
        sentence = INVARIANTS[name](graph, mesh)
        if sentence is not None:
            raise PassError(pass_name, name, sentence, _line_of(graph, sentence))


def _line_of(graph: Graph, sentence: str) -> str | None:
    """Printed line of the first node that a sentence names."""
    match = re.search(r"%(\w+)", sentence)
    for node in graph.fx.nodes:
        if match is not None and node.name == match[1] and node.op != "output":
            try:
                return print_node(node)
            except (ValueError, KeyError, TypeError):
                return None
    return None


# Structure ----------------------------------------------------------------------------------------


def typed(graph: Graph, mesh: Mesh | None) -> str | None:
    """Every node has a value; shardings have the rank of their tensor; items are their tuple's."""
    for node in graph.fx.nodes:
        if node.op == "output":
            continue
        if "value" not in node.meta:
            return f"%{node.name} has no value"
        for value in values_of(node):
            if value.sharding is not None and value.sharding.rank != value.rank:
                return (
                    f"%{node.name} has {value.rank} dims but sharding {value.sharding} "
                    f"has {value.sharding.rank}"
                )
        if node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node):
            whole, index = node.args[0].meta.get("value"), node.args[1]
            if not isinstance(whole, tuple) or not isinstance(index, int):
                continue
            if index >= len(whole):
                return (
                    f"%{node.name} is item {index} of %{node.args[0].name}, of {len(whole)} items"
                )
            if whole[index] != node.meta["value"]:
                return f"%{node.name} is not typed as item {index} of %{node.args[0].name}"
    return None


def functional(graph: Graph, mesh: Mesh | None) -> str | None:
    """No op writes to an input."""
    for node in graph.calls():
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return f"%{node.name} = {node.target} writes to an input"
    return None


def topological(graph: Graph, mesh: Mesh | None) -> str | None:
    """Every node comes after its inputs; one output node is last; updates name placeholders."""
    seen: set[torch.fx.Node] = set()
    nodes = list(graph.fx.nodes)
    for node in nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                where = "comes later" if used in nodes else "is not in the graph"
                return f"%{node.name} uses %{used.name}, which {where}"
        seen.add(node)
    ends = [i for i, node in enumerate(nodes) if node.op == "output"]
    if ends != [len(nodes) - 1]:
        return f"the graph has {len(ends)} output nodes, where one at the end is legal"
    results, wanted = _results(graph), graph.outputs + len(graph.mutated)
    if len(results) != wanted:
        return f"the output has {len(results)} entries, where {wanted} are declared"
    placeholders = {node.name for node in graph.placeholders()}
    for name in graph.mutated:
        if name not in placeholders:
            return f"%{name} is updated but is not a placeholder"
    return None


def no_dead_code(graph: Graph, mesh: Mesh | None) -> str | None:
    """Every call without side effects has a user."""
    for node in graph.calls():
        if not node.users and not node.is_impure(impure_random=False):
            return f"%{node.name} is never used"
    return None


# Shardings ----------------------------------------------------------------------------------------


def axis_used_once(graph: Graph, mesh: Mesh | None) -> str | None:
    """No sharding uses an axis twice."""
    for node, _, sharding in _shardings(graph):
        used: set[str] = set()
        for axis in (*sharding.used_axes(), *sharding.varying):
            if axis in used:
                return f"%{node.name} @ {sharding} uses axis '{axis}' twice"
            used.add(axis)
    return None


def axes_exist(graph: Graph, mesh: Mesh | None) -> str | None:
    """Every axis that a sharding, collective or group names is an axis of the mesh."""
    if mesh is None:
        return None
    lacks = f"which mesh {mesh} lacks"
    for node, _, sharding in _shardings(graph):
        for axis in (*sharding.used_axes(), *sharding.varying):
            if axis not in mesh.names:
                return f"%{node.name} @ {sharding} names axis '{axis}', {lacks}"
    for node in graph.calls():
        if node.target in (COLLECTIVE, BUCKET) and node.args[1] not in mesh.names:
            return f"%{node.name} = {node.args[0]} names axis '{node.args[1]}', {lacks}"
        args: tuple[Any, ...] = node.args
        for arg in args:
            for axis in arg.axes if isinstance(arg, GroupRef) else ():
                if axis not in mesh.names:
                    return f"%{node.name} names axis '{axis}' in group {arg!r}, {lacks}"
    return None


def resharded(graph: Graph, mesh: Mesh | None) -> str | None:
    """The shardings around every op are some placement of its rule; an op without a rule is whole.

    The rule is the registry's, else the discovered one that a pass left in `meta["rule"]`. Sizes
    must be integers. Lowered ops and `getitem` have no rule (`typed` and `types_follow` check
    them), but a `reshard` must have the sharding that it asks for.
    """
    if mesh is None:
        return None
    for node in graph.calls():
        sentence = _resharded_at(node, mesh)
        if sentence is not None:
            return sentence
    return None


def _resharded_at(node: torch.fx.Node, mesh: Mesh) -> str | None:
    values = [value for arg in tensor_inputs(node) for value in values_of(arg)]
    values += values_of(node)
    if node.target is operator.getitem:
        return None
    for tensor in (*tensor_inputs(node), node):
        for value in values_of(tensor):
            if value.sharding is None:
                return f"%{tensor.name} has no sharding"
            if not all(isinstance(size, int) for size in value.shape):
                return f"%{tensor.name} has symbolic sizes"
    if node.target is RESHARD:
        asked: Any = node.args[1]
        (value,) = values_of(node)
        if isinstance(asked, Sharding) and value.sharding != asked:
            return f"%{node.name} @ {value.sharding} was to be resharded to {asked}"
        return None
    if isinstance(node.target, LoweredOp) or not values_of(node):
        return None
    actual = [_normal(value, mesh) for value in values]
    rule = _rule_of(node)
    if rule is None:
        legal = all(sharding.is_replicated() for sharding in actual)
    else:
        if len(rule.inputs) + len(rule.outputs) != len(values):
            return f"%{node.name} has {len(values)} tensors, which rule {rule} does not fit"
        sizes = factor_sizes(rule, [value.int_shape() for value in values])
        legal = _is_placement(rule, sizes, mesh, actual)
    if legal:
        return None
    count = len(values) - len(values_of(node))
    given = ", ".join(map(str, actual[:count]))
    made = ", ".join(map(str, actual[count:]))
    why = "an op without a rule" if rule is None else f"rule {rule}"
    return f"%{node.name} takes {given} to {made}, which {why} does not allow"


def choices_at(
    rule: ShardingRule, sizes: dict[str, int], mesh: Mesh, actual: list[Sharding], axis: str
) -> list[Choice]:
    """What an op may be doing on `axis`, from the shardings of its inputs and then its outputs."""

    def seen(shardings: Iterable[Sharding]) -> list[tuple[int | None, str | None]]:
        return [(s.dim_of(axis), dict(s.partial).get(axis)) for s in shardings]

    found: list[Choice] = []
    for choice in choices(rule):
        placed = place(rule, sizes, mesh, {axis: choice}, uneven=True)
        if placed is not None and seen((*placed.inputs, *placed.outputs)) == seen(actual):
            found.append(choice)
    return found


def _is_placement(
    rule: ShardingRule, sizes: dict[str, int], mesh: Mesh, actual: list[Sharding]
) -> bool:
    options = [choices_at(rule, sizes, mesh, actual, axis) for axis in mesh.names]
    for chosen in itertools.product(*options):
        placed = place(rule, sizes, mesh, dict(zip(mesh.names, chosen, strict=True)), uneven=True)
        if placed is not None and [*placed.inputs, *placed.outputs] == actual:
            return True
    return False


def _normal(value: Value, mesh: Mesh) -> Sharding:
    """Sharding of a value as `place` would write it."""
    assert value.sharding is not None
    pairs = zip(value.sharding.splits, value.int_shape(), strict=True)
    splits = tuple(normalised(split, size, mesh) for split, size in pairs)
    return Sharding(splits, value.sharding.partial)


# The types of the lowered language ----------------------------------------------------------------


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
    results = _results(graph)
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


def no_micro_batch_axis(graph: Graph, mesh: Mesh | None) -> str | None:
    """No collective, bucket or group names the axis of micro-batches: no devices are along it."""
    for node in graph.calls():
        args: tuple[Any, ...] = node.args
        named = {args[1]} if node.target in (COLLECTIVE, BUCKET) else set()
        for arg in args:
            named.update(arg.axes if isinstance(arg, GroupRef) else ())
        if MICRO_BATCH in named:
            return f"%{node.name} communicates on '{MICRO_BATCH}', along which there are no devices"
    return None


def kernels_fit(graph: Graph, mesh: Mesh | None) -> str | None:
    """A fused kernel has the tensors that its programs read, all of the shape of its result."""
    for node in graph.calls():
        if not isinstance(node.target, LoweredOp):
            continue
        kernel: Any = node.kwargs.get("kernel")
        if not isinstance(kernel, (Fusion, Pointwise)):  # all_reduce_norm, or combined rows
            kernel = node.kwargs.get("epilogue")
        if not isinstance(kernel, (Fusion, Pointwise)):
            continue
        extras: Any = node.kwargs.get("extras", ())
        if len(extras) != kernel.extras:
            return (
                f"%{node.name} has {len(extras)} further tensors, its kernel reads {kernel.extras}"
            )
        if isinstance(kernel, Fusion):
            shape = values_of(node)[0].shape
            args: Any = node.args
            read = (args[0], *extras)
        else:
            shape, read = values_of(node)[0].shape, extras
        for x in read:
            if values_of(x)[0].shape != shape:
                return f"%{node.name} reads {x}, which has another shape than its result"
    return None


# Helpers ------------------------------------------------------------------------------------------


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
    rule = _rule_of(node)
    return rule is not None and bool(rule.comm)


def _rule_of(node: torch.fx.Node) -> ShardingRule | None:
    """The registry's rule of a call, else the discovered one that a pass left in `meta["rule"]`."""
    found = rule_for(node)
    return found if found is not None else node.meta.get("rule")


def _shardings(graph: Graph) -> Iterator[tuple[torch.fx.Node, Value, Sharding]]:
    """Every sharding in a graph, with its node and value."""
    for node in graph.fx.nodes:
        for value in values_of(node):
            if value.sharding is not None:
                yield node, value, value.sharding


def _results(graph: Graph) -> tuple[object, ...]:
    """Entries of the output node."""
    results = graph.output_node.args[0]
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


INVARIANTS: dict[str, Invariant] = {
    check.__name__: check
    for check in (
        typed,
        functional,
        topological,
        axis_used_once,
        axes_exist,
        no_dead_code,
        resharded,
        types_follow,
        no_micro_batch_axis,
        kernels_fit,
    )
}
