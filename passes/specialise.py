"""Replace symbolic sizes by the sizes of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch.fx

from autopar.ir.graph import Graph, Value


def specialise(graph: Graph, symbols: Mapping[sympy.Symbol, int]) -> Graph:
    """The same graph with every size and every size argument an integer.

    Establishes: no sympy expression is left in arguments or shapes.
    """
    new = graph.copy()
    known: dict[sympy.Basic, int | float] = {}

    def number(item: Any) -> Any:
        if isinstance(item, sympy.Basic):
            if item not in known:
                result = item.subs(symbols) if item.free_symbols else item
                known[item] = int(result) if result.is_Integer else float(result)
            return known[item]
        return item

    def typed(value: Any) -> Any:
        if isinstance(value, Value):
            return replace(value, shape=tuple(number(size) for size in value.shape))
        if isinstance(value, tuple):
            return tuple(typed(v) for v in value)
        return value

    for node in new.fx.nodes:
        if _is_symbolic(node.args) or _is_symbolic(node.kwargs):
            node.args = _map(node.args, number)
            node.kwargs = _map(node.kwargs, number)
        node.meta["value"] = typed(node.meta.get("value"))
    return new


def _is_symbolic(item: Any) -> bool:
    """Whether there is an expression anywhere: to set arguments is to register their readers."""
    if isinstance(item, (list, tuple)):
        return any(map(_is_symbolic, item))
    if isinstance(item, dict):
        return any(map(_is_symbolic, item.values()))
    if isinstance(item, slice):
        return any(map(_is_symbolic, (item.start, item.stop, item.step)))
    return isinstance(item, sympy.Basic)


def _map(item: Any, function: Any) -> Any:
    if isinstance(item, (list, tuple)):
        made = [_map(i, function) for i in item]
        return tuple(made) if isinstance(item, tuple) else made
    if isinstance(item, dict):
        return {key: _map(value, function) for key, value in item.items()}
    if isinstance(item, slice):
        return slice(*(_map(i, function) for i in (item.start, item.stop, item.step)))
    if isinstance(item, torch.fx.Node):
        return item
    return function(item)
