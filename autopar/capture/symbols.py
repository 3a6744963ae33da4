"""Symbolic sizes: their names, where they are read, and the conditions on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from torch import Tensor

from autopar import compat


class NeedsStaticError(Exception):
    """A symbolic size cannot be carried through; capture again with plain sizes."""


@dataclasses.dataclass(frozen=True)
class Symbols:
    """`rename` maps torch's symbols to ours; `places[i]` (flat input, dim) is where the i-th of
    `hints` is read; `hints` are the sizes at capture. `fixed` are the symbols of sizes that are
    numbers in some of the inputs that share them."""

    rename: Mapping[sympy.Symbol, sympy.Symbol]
    hints: Mapping[sympy.Symbol, int]
    places: tuple[tuple[int, int], ...]
    fixed: frozenset[sympy.Symbol] = frozenset()


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Dim `dim` of all of `tensors` is one size, which becomes the symbol `name`.

    Where forward may fix the size to that of the capture, `optional`, it stays a number then.
    """

    name: str
    dim: int
    tensors: tuple[Tensor, ...]
    optional: bool = False

    @property
    def symbol(self) -> sympy.Symbol:
        return sympy.Symbol(self.name, integer=True, positive=True)

    def has(self, tensor: Tensor) -> bool:
        return any(tensor is t for t in self.tensors)


def batch_of(tensors: Sequence[Tensor]) -> Dynamic | None:
    """The batch `b`: dim 0 of the first tensor that has one, and of all others as large."""
    size = next((t.shape[0] for t in tensors if t.dim() > 0), 0)
    if size < 2:  # torch specialises on 0 and 1
        return None
    return Dynamic("b", 0, tuple(t for t in tensors if t.dim() > 0 and t.shape[0] == size))


def sequence_of(tensors: Sequence[Tensor], batch: Dynamic | None) -> Dynamic | None:
    """The sequence `s`: dim 1 of the tokens, and of the other tensors of a batch that share it.

    Tokens are the first integers [batch, sequence], or else the first floats [batch, sequence,
    features]. Tensors of more dims (images) have no sequence; position ids [1, sequence] have.
    """
    if batch is None:
        return None
    tokens = (t for t in batch.tensors if t.dim() == 2 and not t.is_floating_point())
    features = (t for t in batch.tensors if t.dim() == 3 and t.is_floating_point())
    first = next(tokens, None)
    if first is None:
        first = next(features, None)
    if first is None or first.shape[1] < 2:
        return None
    size = first.shape[1]
    sharing = (t for t in tensors if t.dim() in (2, 3) and t.shape[1] == size)
    found = tuple(t for t in sharing if batch.has(t) or t.shape[0] == 1)
    return Dynamic("s", 1, found, optional=True)


def name_symbols(
    fakes: Sequence[Tensor | None], dynamic: Sequence[Dynamic], tensors: Sequence[Tensor]
) -> Symbols:
    """Name the sizes of `dynamic` that are symbolic, in that order.

    torch gives every input its own symbol until an operation equates them. A graph that is right
    for any sizes is right for equal ones, so one symbol serves them all. Raises `NeedsStaticError`
    where forward equates different ones.
    """
    rename: dict[sympy.Symbol, sympy.Symbol] = {}
    hints: dict[sympy.Symbol, int] = {}
    places: list[tuple[int, int]] = []
    fixed: set[sympy.Symbol] = set()
    for size in dynamic:
        for index, (fake, tensor) in enumerate(zip(fakes, tensors, strict=True)):
            if fake is None or not size.has(tensor):
                continue
            expr = compat.size_expr(fake.shape[size.dim])
            if not isinstance(expr, sympy.Symbol):
                fixed.add(size.symbol)
                continue
            if rename.setdefault(expr, size.symbol) != size.symbol:
                raise NeedsStaticError
            if size.symbol not in hints:
                hints[size.symbol] = tensor.shape[size.dim]
                places.append((index, size.dim))
    return Symbols(rename, hints, tuple(places), frozenset(fixed))


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
