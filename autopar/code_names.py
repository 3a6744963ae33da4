"""The code that a model reaches: the names that it reads, and what it reads by them."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import sysconfig
import types
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

from torch import nn

_BY_NAME = frozenset(("vars", "__dict__", "globals", "eval", "exec", "attrgetter"))
_OF_NAME = frozenset(("getattr", "hasattr"))  # where the name is not written there
_OPERANDS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_ATTR", "PUSH_NULL", "PRECALL", "CACHE")
_READS_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_READS = (*_READS_GLOBAL, "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "IMPORT")
_FUNCTIONS = 1024  # more are not followed
_INSIDE = {  # where functions are in what classes and modules have
    types.MethodType: "__func__",
    staticmethod: "__func__",
    classmethod: "__func__",
    property: "fget",
    functools.partial: "func",
    functools.partialmethod: "func",
    functools.cached_property: "func",
    functools._lru_cache_wrapper: "__wrapped__",
}


class Code:
    """The functions and classes of the user's that a forward leads to; libraries are left out.

    It only grows: what was added once is followed, and what that calls. Of modules, those methods
    are followed that are called by name (`has_other_callers`: all). `names` are all names that it
    reads, and `by_name` says whether it reads attributes by names that it computes.
    """

    def __init__(self) -> None:
        self.names: set[str] = {"forward"}  # which `nn.Module` reads
        self.by_name = False
        self.has_other_callers = False  # of methods: libraries, hooks
        self.is_cut = False  # there are more functions than are followed
        self.is_told = False  # and the user knows
        self.classes: dict[type, None] = {}
        self._functions: dict[types.FunctionType, bool] = {}  # whether it is the user's

    @property
    def size(self) -> tuple[int, int, int]:
        """Another one after something new was added."""
        return len(self.names), len(self.classes), len(self._functions)

    def add(self, value: Any) -> None:
        """Follow the code that a value is: a function, a class, an object of a class."""
        todo = [value]
        while todo:
            todo += self._new(todo.pop())

    def grow(self) -> None:
        """Follow the methods whose names have come in since their classes were added."""
        size = None
        while size != self.size:
            size = self.size
            for kind in list(self.classes):
                for value in self._methods(kind):
                    self.add(value)

    def names_attribute(self, name: str) -> bool:
        """Whether the code may read an attribute of this name."""
        return self.by_name or name in self.names

    def values(self) -> Iterator[Any]:
        """What the code reads now of classes, globals and enclosing functions, in one order."""
        for kind in list(self.classes):
            for name, value in vars(kind).items():
                called = name.startswith("__") and isinstance(value, types.FunctionType)
                if called or (not name.startswith("__") and self.names_attribute(name)):
                    yield value
        for function, is_own in list(self._functions.items()):
            if is_own:
                yield from _read(function)

    def _new(self, value: Any) -> list[Any]:
        """What to follow of a value that has not been met before."""
        if isinstance(value, types.FunctionType):
            return self._new_function(value)
        inside = _INSIDE.get(type(value))
        if inside is not None:
            return [getattr(value, inside)]
        kind = value if isinstance(value, type) else type(value)
        if kind in self.classes or is_library(kind.__module__):
            return []
        self.classes[kind] = None
        return [*kind.__mro__[1:], *self._methods(kind)]

    def _methods(self, kind: type) -> list[Any]:
        """What to follow of what a class has; the `__init__` of modules is over."""
        if self.has_other_callers or not (issubclass(kind, nn.Module) and is_own(kind)):
            return list(vars(kind).values())
        return [
            value
            for name, value in vars(kind).items()
            if self.names_attribute(name) or (name.startswith("__") and name != "__init__")
        ]

    def _new_function(self, function: types.FunctionType) -> list[Any]:
        if function in self._functions:
            return []
        if len(self._functions) == _FUNCTIONS:
            self.is_cut = True
            return []
        is_own = not is_library(str(function.__globals__.get("__name__", "")))
        self._functions[function] = is_own
        wrapped = vars(function).get("__wrapped__")
        if not is_own:  # a decorator's, around one of the user's
            return [v for v in (wrapped, *_cells(function)) if isinstance(v, types.FunctionType)]
        self.names |= _names(function.__code__)
        self.by_name = self.by_name or _computes_names(function.__code__)
        return [wrapped, *_read(function)]


def is_own(kind: type) -> bool:
    """Whether all code of a module's class is the user's, but for that of `nn.Module`."""
    bases = (base for base in kind.__mro__ if base not in (nn.Module, object))
    return not any(is_library(base.__module__) for base in bases)


@cache
def is_library(module: str) -> bool:
    """Whether a module is not the user's own, by its name and file: its values do not change."""
    if module == "__main__":  # whatever starts it
        return False
    root = module.partition(".")[0]
    if root in ("torch", "autopar", "builtins"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return root in sys.stdlib_module_names
    places = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))
    return any(place in file for place in places)


def _read(function: types.FunctionType) -> Iterator[Any]:
    """What a function reads of globals, of modules that it imports, of enclosing functions."""
    code, space = function.__code__, function.__globals__
    names = _names(code)
    for name in _globals(code):
        if name in space:
            yield from _of_module(space[name], names, ())
    for name in _imports(code):
        for full in (name, f"{space.get('__package__')}.{name}"):
            yield from _of_module(sys.modules.get(full), names, ())
    yield from _cells(function)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def read_and_not_written(value: Any) -> Iterator[Any]:
    """What a function reads of globals and enclosing functions, but for what it assigns there."""
    while type(value) in _INSIDE:
        value = getattr(value, _INSIDE[type(value)])
    if not isinstance(value, types.FunctionType):
        return
    code, space = value.__code__, value.__globals__
    written = set(_named(code, ("STORE_GLOBAL", "STORE_DEREF")))
    yield from (space[n] for n in _globals(code) if n in space and n not in written)
    for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
        if name not in written:
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue


def _of_module(
    value: Any, names: frozenset[str], around: tuple[types.ModuleType, ...]
) -> Iterator[Any]:
    """The value, or what these names are in a module of the user's, and in modules in it."""
    if not isinstance(value, types.ModuleType):
        yield value
    elif value not in around and not is_library(value.__name__):
        for name in sorted(names & vars(value).keys()):
            yield from _of_module(vars(value)[name], names, (*around, value))


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


@lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """All names that code and what is defined in it read, words among its constants included.

    What is only assigned, as in `__init__`, is none of them, nor are local variables.
    """
    flat = [c for const in code.co_consts for c in (const if type(const) is tuple else (const,))]
    words = {c for c in flat if isinstance(c, str) and c.isidentifier()}
    read = {i.argval for i in dis.get_instructions(code) if i.opname.startswith(_READS)}
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return frozenset((*read, *code.co_freevars, *words, *inner))


@lru_cache(maxsize=4096)
def _computes_names(code: types.CodeType) -> bool:
    """Whether code reads attributes by other names than those that are written in it."""
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        if not step.opname.startswith(_READS):
            continue
        if step.argval in _BY_NAME:
            return True
        if step.argval in _OF_NAME:  # getattr(self, "name") and getattr(self.part, "name", None)
            after = [s for s in steps[i + 1 :] if not s.opname.startswith(_OPERANDS)]
            operands = list(itertools.takewhile(lambda s: s.opname == "LOAD_CONST", after))
            called = after[len(operands) :][:1]
            if not operands or not isinstance(operands[0].argval, str):
                return True
            if not called or not called[0].opname.startswith("CALL"):
                return True
    return any(_computes_names(c) for c in code.co_consts if isinstance(c, types.CodeType))


@lru_cache(maxsize=4096)
def _globals(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals that code reads: an attribute of the same name is none."""
    return _named(code, _READS_GLOBAL)


@lru_cache(maxsize=4096)
def _imports(code: types.CodeType) -> tuple[str, ...]:
    """The modules that code imports as it runs."""
    return _named(code, ("IMPORT_NAME",))


def _named(code: types.CodeType, ops: tuple[str, ...]) -> tuple[str, ...]:
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ops}
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _named(c, ops)]
    return tuple(sorted({*found, *inner}))
