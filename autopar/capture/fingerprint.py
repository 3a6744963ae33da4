"""A hash of what a graph computes, the same in every process."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any

import torch
from torch.fx.node import map_aggregate

from autopar.ir.graph import Graph, Value

from .autograd_function import AutogradFunctionOp


def fingerprint(graph: Graph, sizes: bool = False) -> str:
    """sha256 of the graph's operations, constants, dtypes, ranks and parameters' shapes.

    Not of source lines, and unless asked, not of the sizes of a batch (inputs, activations, size
    arguments): a plan serves other batch and sequence lengths, captured symbolically or not.
    """
    digest = hashlib.sha256()
    for line in _lines(graph, sizes):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def renumbered(graph: Graph) -> Graph:
    """The graph with its ops' names numbered in order: `linear`, `linear_1`, ...

    Plans name ops, and captures of one model with different sizes leave out different nodes on the
    way.
    """
    new = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.fx.nodes:
        if node.op == "call_function":
            args = torch.fx.map_arg(node.args, env.__getitem__)
            kwargs = torch.fx.map_arg(node.kwargs, env.__getitem__)
            name = base_name(node)
            env[node] = new.create_node("call_function", node.target, args, kwargs, name)
        else:
            env[node] = new.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
    return replace(graph, fx=new)


def base_name(node: torch.fx.Node) -> str:
    """The name of an operation without its number."""
    return re.sub(r"_\d+$", "", node.name)


def _lines(graph: Graph, sizes: bool) -> list[str]:
    numbers: dict[torch.fx.Node, int] = {}
    lines = [f"outputs {graph.outputs} mutated {graph.mutated}"]
    for node in graph.fx.nodes:
        numbers[node] = len(numbers)

        def argument(arg: Any) -> Any:
            return f"%{numbers[arg]}" if isinstance(arg, torch.fx.Node) else arg

        if node.op == "placeholder":
            call = f"{node.meta['role']} {node.meta['fqns']}"
            if "tensor" in node.meta:
                call += f" {node.meta['tensor'].detach().cpu().flatten().tolist()[:4096]}"
        else:
            args = map_aggregate(node.args if sizes else without_sizes(node), argument)
            kwargs = map_aggregate(node.kwargs, argument)
            call = f"{_target(node.target)} {args} {kwargs} {node.meta['region']}"
        sized = sizes or (node.op == "placeholder" and node.meta["role"] != "input")
        lines.append(f"{_value(node.meta['value'], sized)} = {call}")
    return lines


def without_sizes(node: torch.fx.Node) -> tuple[Any, ...]:
    """An op's positional arguments, sizes (those that the schema lets be symbolic) left out."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.args
    return tuple(
        None if _is_size(a.real_type, made=not node.all_input_nodes) else given
        for given, a in zip(node.args, schema.arguments, strict=False)
    )


def _is_size(kind: Any, made: bool) -> bool:
    """Whether an argument is a size; of ops that make tensors from nothing, any number (arange)."""
    while kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    return kind.kind() == "SymIntType" or (made and kind.kind() == "NumberType")


def _target(target: Any) -> str:
    if isinstance(target, AutogradFunctionOp):
        return f"{target.__name__} {target.text()}"
    return str(target) if isinstance(target, (torch._ops.OpOverload, str)) else target.__name__


def _value(value: Any, sized: bool) -> str:
    if isinstance(value, Value):
        shape = [str(size) for size in value.shape] if sized else value.rank
        return f"{value.dtype}{shape}{value.requires_grad}"
    if isinstance(value, tuple):
        return str([_value(part, sized) for part in value])
    return "-"
