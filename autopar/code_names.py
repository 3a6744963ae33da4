"""The names that the code of modules reads, and the globals and class attributes it reads."""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

_BY_NAME = frozenset({"getattr", "vars", "__dict__", "hasattr", "globals", "eval"})
_READS_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
_READS = (*_READS_GLOBAL, "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "IMPORT")
_FUNCTIONS = 1024  # more are not followed


@dataclass(frozen=True, eq=False)
class Code:
    """The methods of some classes of the user's and what functions they call.

    `names` are all names that it reads, None where it reads attributes by names that it computes.
    """

    names: frozenset[str] | None
    classes: tuple[type, ...]
    globals: tuple[tuple[Mapping[str, Any], tuple[str, ...], frozenset[str]], ...]
    cells: tuple[types.CellType, ...]

    def values(self) -> Iterator[Any]:
        """What it reads now of classes, of globals and of enclosing functions, in one order."""
        for base in self.classes:
            for name, value in vars(base).items():
                if not name.startswith("__") and (self.names is None or name in self.names):
                    yield value
        for names, read, mentioned in self.globals:
            for name in read:
                value = names.get(name)
                if not isinstance(value, types.ModuleType):
                    yield value
                elif not is_library(value.__name__):
                    yield from (vars(value)[n] for n in sorted(mentioned & vars(value).keys()))
        for cell in self.cells:
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue


@lru_cache(maxsize=64)
def code_of(kinds: tuple[type, ...]) -> Code:
    """The code of classes and their bases, but for that of libraries, which is taken as fixed."""
    bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__)
    classes = tuple(base for base in bases if not is_library(base.__module__))
    functions = _reached([f for base in classes for f in _methods(base)])
    names: frozenset[str] = frozenset().union(*(_names(f.__code__) for f in functions))
    known = names if not names & _BY_NAME else None
    read: dict[int, tuple[Mapping[str, Any], set[str], set[str]]] = {}
    for function in functions:
        space = function.__globals__
        _, of, mentioned = read.setdefault(id(space), (space, set(), set()))
        of |= _globals(function.__code__)
        mentioned |= _names(function.__code__)
    spaces = tuple((s, tuple(sorted(of)), frozenset(m)) for s, of, m in read.values())
    cells = tuple(c for f in functions for c in f.__closure__ or ())
    return Code(known, classes, spaces, cells)


@cache
def is_library(module: str) -> bool:
    """Whether a module is not the user's own, by its name: its values do not change."""
    root = module.partition(".")[0]
    if root in ("torch", "autopar", "builtins") or root in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _methods(kind: type) -> Iterator[types.FunctionType]:
    """The functions of a class, those of properties and under decorators as well."""
    for member in vars(kind).values():
        inner = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        while hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        if isinstance(inner, types.FunctionType) and not is_library(inner.__module__ or ""):
            yield inner


def _reached(functions: list[types.FunctionType]) -> tuple[types.FunctionType, ...]:
    """Functions, and those of the user's own that they name, and so on."""
    found = dict.fromkeys(functions)
    todo = list(found)
    while todo and len(found) < _FUNCTIONS:
        function = todo.pop()
        for other in _called(function):
            if other not in found and not is_library(other.__module__ or ""):
                found[other] = None
                todo.append(other)
    return tuple(found)


def _called(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """Functions among the globals that a function reads, and in modules among them."""
    mentioned = _names(function.__code__)
    for name in sorted(_globals(function.__code__)):
        value = function.__globals__.get(name)
        inside = vars(value) if isinstance(value, types.ModuleType) else {name: value}
        if isinstance(value, types.ModuleType) and is_library(value.__name__):
            continue
        for other in sorted(mentioned & inside.keys()):
            reached = inside[other]
            if isinstance(reached, types.FunctionType):
                yield reached


@cache
def _names(code: types.CodeType) -> frozenset[str]:
    """All names that code and what is defined in it read, words among its strings included.

    What is only assigned, as in `__init__`, is none of them, nor are local variables.
    """
    words = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    read = {i.argval for i in dis.get_instructions(code) if i.opname.startswith(_READS)}
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return frozenset((*read, *code.co_freevars, *words, *inner))


@cache
def _globals(code: types.CodeType) -> frozenset[str]:
    """The names of globals that code reads: an attribute of the same name is none."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname.startswith(_READS_GLOBAL)}
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _globals(c)]
    return frozenset((*found, *inner))
