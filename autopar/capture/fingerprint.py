"""A hash of what a graph computes, the same in every process."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.fx.node import map_aggregate

from autopar.ir.graph import Graph, Value

from .autograd_function import AutogradFunctionOp


def fingerprint(graph: Graph) -> str:
    """sha256 of the graph's operations, arguments, values and parameters; not of source lines."""
    digest = hashlib.sha256()
    for line in _lines(graph):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _lines(graph: Graph) -> list[str]:
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
            args = map_aggregate(node.args, argument)
            kwargs = map_aggregate(node.kwargs, argument)
            call = f"{_target(node.target)} {args} {kwargs} {node.meta['region']}"
        lines.append(f"{_value(node.meta['value'])} = {call}")
    return lines


def _target(target: Any) -> str:
    if isinstance(target, AutogradFunctionOp):
        return f"{target.__name__} {target.text()}"
    return str(target) if isinstance(target, (torch._ops.OpOverload, str)) else target.__name__


def _value(value: Any) -> str:
    if isinstance(value, Value):
        return f"{value.dtype}{[str(size) for size in value.shape]}{value.requires_grad}"
    if isinstance(value, tuple):
        return str([_value(part) for part in value])
    return "-"
