"""Functions in the place of methods that enclose parts of a model, for a copy of the model."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

from torch import nn


def copy_closures(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let a deep copy of the module have functions that enclose parts of the copy.

    `copy.deepcopy` takes functions as they are: `layer.forward = lambda x: old(x) * 2` would run
    the layer of before. Copies of such functions go into `memo`, which is that of the deep copy.
    """
    own = {id(child) for child in module.modules()} | {id(p) for p in module.parameters()}
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, types.FunctionType) and _encloses(value, own):
                _copied(value, own, memo)


def _contents(function: types.FunctionType) -> Iterator[tuple[types.CellType, Any]]:
    for cell in function.__closure__ or ():
        try:
            yield cell, cell.cell_contents
        except ValueError:  # not filled yet
            yield cell, None


def _is_own(value: Any, own: set[int]) -> bool:
    return id(value.__self__ if isinstance(value, types.MethodType) else value) in own


def _encloses(
    function: types.FunctionType, own: set[int], around: tuple[types.FunctionType, ...] = ()
) -> bool:
    """Whether the function, or one that it encloses, encloses a part of the model."""
    if function in around:
        return False
    return any(
        _is_own(value, own)
        or (isinstance(value, types.FunctionType) and _encloses(value, own, (*around, function)))
        for _, value in _contents(function)
    )


def _copied(function: types.FunctionType, own: set[int], memo: dict[int, Any]) -> Any:
    """The function around parts of the copy; it is known before these are copied."""
    if id(function) in memo:
        return memo[id(function)]
    cells = [(types.CellType(), cell, value) for cell, value in _contents(function)]
    kept = []
    for new, cell, value in cells:
        shared = not _is_own(value, own) and not isinstance(value, types.FunctionType)
        kept.append(cell if shared else new)
    made = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(kept),
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(vars(function))
    memo[id(function)] = made
    for new, _, value in cells:
        if isinstance(value, types.FunctionType):
            new.cell_contents = _copied(value, own, memo) if _encloses(value, own) else value
        elif _is_own(value, own):
            new.cell_contents = copy.deepcopy(value, memo)
    return made
