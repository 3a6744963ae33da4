"""Run a graph on tensors, one operation after the other: the reference executor of tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from .graph import Graph, Value


def run_graph(graph: Graph, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The graph's outputs, mutated buffers last, given a tensor for every placeholder in order.

    Symbolic sizes are read off the tensors. Raises ValueError where their number is wrong.
    """
    return list(run_nodes(graph, tensors)[graph.output_node])


def run_nodes(graph: Graph, tensors: Sequence[Tensor]) -> dict[torch.fx.Node, Any]:
    """The result of every node of the graph."""
    placeholders = graph.placeholders()
    if len(tensors) != len(placeholders):
        raise ValueError(f"{len(placeholders)} placeholders, {len(tensors)} tensors")
    env: dict[torch.fx.Node, Any] = dict(zip(placeholders, tensors, strict=True))
    sizes = bind_sizes(graph, tensors)

    def load(arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return env[arg]
        return evaluate(arg, sizes) if isinstance(arg, sympy.Expr) else arg

    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    with device:  # graphs name no device
        _run(graph, env, load)
    return env


def _run(graph: Graph, env: dict[torch.fx.Node, Any], load: Callable[[Any], Any]) -> None:
    for node in graph.fx.nodes:
        if node.op == "call_function":
            args, kwargs = map_aggregate((node.args, node.kwargs), load)
            env[node] = node.target(*args, **kwargs)
        elif node.op == "output":
            env[node] = map_aggregate(node.args[0], load)


def bind_sizes(graph: Graph, tensors: Sequence[Tensor]) -> dict[sympy.Symbol, int]:
    """The value of every symbol that is by itself a size of some placeholder."""
    sizes: dict[sympy.Symbol, int] = {}
    for node, tensor in zip(graph.placeholders(), tensors, strict=True):
        value = node.meta["value"]
        if isinstance(value, Value):
            for size, actual in zip(value.shape, tensor.shape, strict=True):
                if isinstance(size, sympy.Symbol):
                    sizes[size] = int(actual)
    return sizes


def evaluate(expr: sympy.Expr, sizes: dict[sympy.Symbol, int]) -> int | float:
    """An expression in the symbols as a number."""
    number = expr.subs(sizes)
    return int(number) if number.is_integer else float(number)
