"""Symbolic sizes: their names, where they are read, and the conditions on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from torch import Tensor

from autopar import compat


@dataclasses.dataclass(frozen=True)
class Symbols:
    """`rename` maps torch's symbols to ours; `places[i]` (flat input, dim) is where the i-th of
    `hints` is read; `hints` are the sizes at capture."""

    rename: Mapping[sympy.Symbol, sympy.Symbol]
    hints: Mapping[sympy.Symbol, int]
    places: tuple[tuple[int, int], ...]


def name_symbols(
    fakes: Sequence[Tensor | None], batched: Sequence[int], tensors: Sequence[Tensor]
) -> Symbols:
    """Call dim 0 of all the `batched` inputs `b`, where it is symbolic.

    torch gives every input its own symbol until an operation equates them. A graph that is right
    for any sizes is right for equal ones, so one symbol serves them all.
    """
    batch = sympy.Symbol("b", integer=True, positive=True)
    rename: dict[sympy.Symbol, sympy.Symbol] = {}
    place: tuple[int, int] | None = None
    for index in batched:
        fake = fakes[index]
        if fake is None:
            continue
        expr = compat.size_expr(fake.shape[0])
        if isinstance(expr, sympy.Symbol):
            rename[expr] = batch
            place = place or (index, 0)
    if place is None:
        return Symbols({}, {}, ())
    return Symbols(rename, {batch: tensors[place[0]].shape[0]}, (place,))


def guards_of(shape_env: Any, symbols: Symbols) -> tuple[Any, ...]:
    """What torch assumed of the symbols while tracing, as conditions on ours.

    torch also assumes strides of the inputs. Those do not matter here: a graph without in-place
    operations, with reshape in place of view, is right for every layout.
    """
    found: list[Any] = []
    conditions = [guard.expr for guard in shape_env.guards]
    for symbol, bounds in shape_env.var_to_range.items():
        if symbol in symbols.rename:
            conditions.append(sympy.Ge(symbol, bounds.lower))
            if bounds.upper.is_Integer:
                conditions.append(sympy.Le(symbol, bounds.upper))
    for condition in conditions:
        condition = sympy.sympify(shape_env.replace(condition)).subs(dict(symbols.rename))
        ours = condition.free_symbols and condition.free_symbols <= set(symbols.hints)
        if ours and condition not in found:
            found.append(condition)
    return tuple(found)
