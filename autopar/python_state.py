"""What of a module's Python side a capture depends on: hooks, structure, plain values.

A capture bakes in what is not a tensor: `self.beta`, a flag, a global, the hooks of a submodule.
Where any of it has changed since, the forward is captured anew. What the code of the module's
classes never names counts for nothing, so that a loop may leave its own notes on the module.
"""

from __future__ import annotations

import array
import collections
import enum
import functools
import itertools
import logging
import numbers
import types
import warnings
import weakref
import zlib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .code_names import Code, is_library, is_own, read_and_not_written

_PLAIN = (int, float, bool, str, complex, bytes, type(None))
_BY_TEXT = (enum.Enum, range, slice, array.array, np.generic)
_OF_TORCH = (torch.dtype, torch.device, torch.Size)
_CALLED = (types.FunctionType, types.BuiltinFunctionType, type, functools._lru_cache_wrapper)
_PAIRS = (dict, types.MappingProxyType)
_ITEMS = (list, tuple, collections.deque)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_MODULES = frozenset(vars(nn.Module())) | {"autopar"}
_MANY = 256  # of plain values in a container, only a hash is kept
_VALUES = 8192  # beside those, more are not looked at
_DEPTH, _LIBRARY_DEPTH = 64, 6  # of containers and objects, and from an object of a library's
_BYTES = 1 << 26  # of longer arrays, a sample is looked at


def python_state(
    module: nn.Module, assigned: Collection[tuple[str, str]] = (), code: Code | None = None
) -> tuple[Hashable, ...]:
    """A key that differs where a capture of the module's forward may differ.

    Tensors in attributes are told apart by identity and version. Left out is what forward itself
    assigns, as (path of the submodule, name). `code` is what earlier calls have found of the
    module's code. Warns where there is more than is looked at.
    """
    code = Code() if code is None else code
    children = list(module.named_modules())
    kinds = dict.fromkeys(type(child) for _, child in children)
    code.has_other_callers |= any(map(_calls_methods, kinds)) or _has_hooks(children)
    for base in {base: None for kind in kinds for base in kind.__mro__}:
        code.add(base)
    while True:  # what is found may be code, which reads more
        code.grow()
        known, keys = code.size, _Keys(code)
        found = tuple(_found(children, assigned, keys))
        if code.size == known:
            if (keys.is_cut or code.is_cut) and not code.is_told:
                code.is_told = True
                _warn_of_more()
            return found


def _found(
    children: list[tuple[str, nn.Module]], assigned: Collection[tuple[str, str]], keys: _Keys
) -> Iterable[Hashable]:
    for number, (path, child) in enumerate(children):
        yield _Same(child)
        own = is_own(type(child))
        for name, value in vars(child).items():
            if name in _OF_MODULES or (path, name) in assigned:
                continue
            if not own or keys.code.names_attribute(name):
                yield name, keys.of(value)
        if number:
            for hook in (hook for kind in _HOOKS for hook in vars(child)[kind].values()):
                yield _Same(hook)  # and numbers, not lists that it may append to
                yield tuple(keys.of(v) for v in read_and_not_written(hook) if type(v) in _PLAIN)
    yield from map(keys.of, keys.code.values())


def _calls_methods(kind: type) -> bool:
    """Whether it is of a library whose code may call other methods of parts than forward."""
    return any(
        is_library(base.__module__) and not _calls_forward_alone(base) for base in kind.__mro__
    )


def _calls_forward_alone(kind: type) -> bool:
    root = kind.__module__.partition(".")[0]
    return root in ("torch", "autopar", "builtins", "abc", "typing")


def _has_hooks(children: list[tuple[str, nn.Module]]) -> bool:
    return any(vars(child)[kind] for _, child in children[1:] for kind in _HOOKS)


def _warn_of_more() -> None:
    warnings.warn(
        f"forward and what it calls read more than {_VALUES} Python values or hundreds of "
        "functions; changes in those beyond are not seen, and do not make autopar capture forward "
        "anew. Keep long tables in buffers (self.register_buffer), or pass them as tensors",
        UserWarning,
        stacklevel=2,
    )


def warn_recaptured() -> bool:
    """Say that captures follow one another; true, so that it is said once."""
    warnings.warn(
        "forward has been captured anew many times, because attributes, flags or hooks of the "
        "model, globals that forward reads, or its arguments that are no tensors, change from call "
        "to call; keep what changes in a buffer (self.register_buffer) or pass it as a tensor",
        UserWarning,
        stacklevel=2,
    )
    return True


def warn_of_hooks(module: nn.Module) -> None:
    """Say that forward hooks of submodules are part of what is captured, if there are any."""
    for path, child in module.named_modules():
        if child is not module and (child._forward_hooks or child._forward_pre_hooks):
            warnings.warn(
                f"forward hooks of {path} are captured with forward: what they return counts in "
                "every call, and what else they do (append to a list, count) happens once, without "
                "values; return what you want to see from forward",
                UserWarning,
                stacklevel=2,
            )
            return


class _Same:
    """An object that is told from others by identity; it is not kept alive where that can be."""

    __slots__ = ("_id", "_it")

    def __init__(self, it: object, version: int = 0) -> None:
        self._id = id(it), version
        self._it: Callable[[], object]
        try:
            self._it = weakref.ref(it)
        except TypeError:
            self._it = lambda: it

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._id != other._id:
            return False
        it = self._it()
        return it is not None and it is other._it()

    def __hash__(self) -> int:
        return hash(self._id)


class _Keys:
    """What tells values from others, of a bounded number of values in all."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.is_cut = False  # there is more than was looked at
        self._left = _VALUES
        self._known: dict[int, tuple[object, Hashable]] = {}  # objects live as long as their ids

    def of(self, value: Any, around: tuple[int, ...] = (), depth: int = _DEPTH) -> Hashable:
        """The key of a value; `around` are the ids it is in, `depth` how far to look from it."""
        if isinstance(value, _PLAIN):
            return type(value), value if isinstance(value, (int, str)) else repr(value)
        if isinstance(value, nn.Parameter):  # by name; what is referred to cannot become a DTensor
            return None
        if isinstance(value, Tensor):
            return _Same(value, 0 if value.is_inference() else value._version)
        if isinstance(value, _CALLED):
            self.code.add(value)
            return _Same(value)
        if isinstance(value, (*_BY_TEXT, *_OF_TORCH)):
            return type(value), repr(value)
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in around:
            return around.index(id(value))
        self._left -= 1
        if not depth or self._left < 0:
            self.is_cut |= len(around) >= _DEPTH or self._left < 0
            return None
        key = self._contents(value, (*around, id(value)), depth - 1)
        self._known[id(value)] = value, key
        return key

    def _contents(self, value: Any, inside: tuple[int, ...], depth: int) -> Hashable:
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                return value.shape, self._each(value.reshape(-1).tolist(), inside, depth)
            sample = value.reshape(-1)[:: value.nbytes // _BYTES | 1]  # odd: it meets all columns
            words = np.ascontiguousarray(sample).view(np.uint8)
            return value.shape, str(value.dtype), zlib.crc32(words.data)
        if isinstance(value, types.MethodType):
            self.code.add(value)
            return types.MethodType, self._each((value.__func__, value.__self__), inside, depth)
        if isinstance(value, functools.partial):
            made_of = (value.func, value.args, value.keywords)
            return functools.partial, self._each(made_of, inside, depth)
        if isinstance(value, _PAIRS):
            items = itertools.chain.from_iterable(value.items())
            return type(value), len(value), self._all_of(items, 2 * len(value), inside, depth)
        if isinstance(value, (set, frozenset)):
            return set, len(value), frozenset(self._each(value, inside, depth))
        if isinstance(value, _ITEMS):
            return type(value), len(value), self._all_of(value, len(value), inside, depth)
        if isinstance(value, numbers.Number):
            return type(value), repr(value)
        if isinstance(value, weakref.ref):
            return self.of(value(), inside, depth)
        return self._object(value, inside, depth)

    def _each(
        self, values: Iterable[Any], inside: tuple[int, ...], depth: int
    ) -> tuple[Hashable, ...]:
        found = []
        for value in values:
            found.append(self.of(value, inside, depth))
            if self._left < 0:
                break
        return tuple(found)

    def _all_of(
        self, values: Iterable[Any], count: int, inside: tuple[int, ...], depth: int
    ) -> Hashable:
        """The keys of many values: of plain ones a hash."""
        if count > _MANY:
            values = list(values)
            kinds = set(map(type, values))
            if kinds <= set(_PLAIN):
                return hash(repr(values))
        return self._each(values, inside, depth)

    def _object(self, value: Any, inside: tuple[int, ...], depth: int) -> Hashable:
        """Of an object by its attributes: a namespace, a dataclass, a configuration."""
        kind = type(value)
        if isinstance(value, types.ModuleType):
            return None if is_library(value.__name__) else self._named(vars(value), inside, depth)
        root = kind.__module__.partition(".")[0]
        if isinstance(value, nn.Module) or root in ("torch", "autopar"):
            return _Same(value)
        if isinstance(value, (logging.Logger, logging.Handler)):  # which change as they are used
            return _Same(value)
        self.code.add(kind)
        if is_library(kind.__module__):
            depth = min(depth, _LIBRARY_DEPTH)
        slots = _slots(kind)
        if not slots and not hasattr(value, "__dict__"):
            return _Same(value)
        of = [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
        of += getattr(value, "__dict__", {}).items()
        return kind, tuple([(name, self.of(v, inside, depth)) for name, v in of])

    def _named(self, values: Mapping[str, Any], inside: tuple[int, ...], depth: int) -> Hashable:
        names = sorted(self.code.names & values.keys())
        return tuple([(name, self.of(values[name], inside, depth)) for name in names])


def _slots(kind: type) -> list[str]:
    """The names of an object's attributes that are in no `__dict__`."""
    found = (vars(base).get("__slots__", ()) for base in kind.__mro__)
    names = [name for of in found for name in ((of,) if isinstance(of, str) else of)]
    return [name for name in names if not name.startswith("__")]
