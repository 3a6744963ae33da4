"""Invariants of graphs: what must be true after a pass, checked after every pass.

An invariant is a function of a graph and its mesh that returns None or one sentence, which names
the node and the fact: `%h @ [dp, dp] uses axis 'dp' twice`. Invariants that speak of shardings say
nothing without a mesh.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.fx

from autopar.errors import PassError

from .graph import Graph, Value, tensor_inputs, values_of
from .lowered import BUCKET, COLLECTIVE, RESHARD, GroupRef, LoweredOp
from .mesh import MICRO_BATCH, Mesh
from .pointwise import Fusion, Pointwise
from .rule import Choice, ShardingRule, choices, factor_sizes, normalised, place
from .sharding import Sharding
from .text import print_node
from .types_follow import results_of, rule_of, types_follow

Invariant = Callable[[Graph, Mesh | None], str | None]


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
    results, wanted = results_of(graph), graph.outputs + len(graph.mutated)
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
    rule = rule_of(node)
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


def _shardings(graph: Graph) -> Iterator[tuple[torch.fx.Node, Value, Sharding]]:
    """Every sharding in a graph, with its node and value."""
    for node in graph.fx.nodes:
        for value in values_of(node):
            if value.sharding is not None:
                yield node, value, value.sharding


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
