"""Give symbolic sizes of a captured graph their values, as if they had been numbers at capture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx.node import map_aggregate

from autopar.ir.graph import Graph, Value

from .fingerprint import base_name, renumbered
from .simplify import simplify
from .typed import remove_dead_code

Sizes = Mapping[sympy.Symbol, int]


def with_sizes(graph: Graph, sizes: Sizes) -> Graph:
    """The graph with `sizes` in place of symbols, simplified and numbered again.

    What only a symbolic size needs (a table cut to the sequence's length) is gone where the size
    makes it do nothing, so that the result is the graph of a capture with that size.
    """
    return renumbered(_substituted(graph, sizes)[0])


def named_as_with_sizes(graph: Graph, sizes: Sizes) -> Graph:
    """The graph, its operations named as in `with_sizes(graph, sizes)`; only those that are not
    there have names of their own: `slice_dynamic`.
    """
    substituted, env = _substituted(graph, sizes)
    numbered = renumbered(substituted)
    pairs = zip(substituted.fx.nodes, numbered.fx.nodes, strict=True)
    names = {old: new.name for old, new in pairs if old.op == "call_function"}
    taken: set[torch.fx.Node] = set()
    new = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.fx.nodes:
        if node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            same = env[node] if env[node] in names and env[node] not in taken else None
            name = names[same] if same is not None else f"{base_name(node)}_dynamic"
            taken.add(env[node])
            copies[node] = new.create_node("call_function", node.target, args, kwargs, name)
        else:
            copies[node] = new.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    return dataclasses.replace(graph, fx=new)


def _substituted(graph: Graph, sizes: Sizes) -> tuple[Graph, dict[torch.fx.Node, torch.fx.Node]]:
    """The graph with numbers, and its node for each node of `graph`."""
    new = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}

    def one(arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return env[arg]
        return _number(arg, sizes) if isinstance(arg, sympy.Basic) else arg

    for node in graph.fx.nodes:
        if node.op != "call_function":
            env[node] = new.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
            if node.op == "placeholder":
                env[node].meta["value"] = _value(node.meta["value"], sizes)
            continue
        args, kwargs = map_aggregate((node.args, node.kwargs), one)
        made = simplify(node.target, args, kwargs, _value(node.meta["value"], sizes))
        if isinstance(made, torch.fx.Node):
            env[node] = made
        else:
            assert isinstance(made, tuple), "a simplified call has one result"
            target, args, kwargs, value = made
            env[node] = new.create_node("call_function", target, args, kwargs, node.name)
            env[node].meta = dict(node.meta, value=value)
    remove_dead_code(new)
    return dataclasses.replace(graph, fx=new), env


def _number(expr: Any, sizes: Sizes) -> Any:
    """An expression with the sizes in it, as an int, float or bool where nothing else is left."""
    result = expr.subs(dict(sizes))
    if result in (sympy.true, sympy.false):
        return bool(result)
    if result.is_Integer:
        return int(result)
    return float(result) if result.is_number else result


def _value(value: Any, sizes: Sizes) -> Any:
    if isinstance(value, Value):
        shape = (_number(n, sizes) if isinstance(n, sympy.Basic) else n for n in value.shape)
        return dataclasses.replace(value, shape=tuple(shape))
    if isinstance(value, tuple):
        return tuple(_value(part, sizes) for part in value)
    return value
