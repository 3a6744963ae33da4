"""What of a module's Python side a capture depends on: hooks, structure, plain values.

A capture bakes in what is not a tensor: `self.beta`, a flag, a global, the hooks of a submodule.
Where any of it has changed since, the forward is captured anew. What the code of the module's
classes never names counts for nothing, so that a loop may leave its own notes on the module.
"""

from __future__ import annotations

import enum
import functools
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Hashable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .code_names import code_of, is_library

_PLAIN = (int, float, bool, str, complex, bytes, type(None))
_BY_TEXT = (enum.Enum, range, slice, np.generic, torch.dtype, torch.device, torch.Size)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_MODULES = frozenset(vars(nn.Module())) | {"autopar"}
_ENTRIES, _DEPTH, _VALUES = 256, 6, 4096  # of containers and of a module, more are not looked at


def python_state(
    module: nn.Module, assigned: Collection[tuple[str, str]] = ()
) -> tuple[Hashable, ...]:
    """A key that differs where a capture of the module's forward may differ.

    Tensors in attributes are told apart by identity and version. Left out is what forward itself
    assigns, as (path of the submodule, name).
    """
    children = list(module.named_modules())
    code = code_of(tuple(dict.fromkeys(type(child) for _, child in children)))
    keys = _Keys()
    found: list[Hashable] = []
    for path, child in children:
        found.append(_Same(child))
        names = code.names if _is_own(type(child)) else None
        for name, value in vars(child).items():
            if name in _OF_MODULES or (path, name) in assigned:
                continue
            if names is None or name in names:
                found.append((name, keys.of(value)))
        if child is not module:
            found += [_Same(hook) for kind in _HOOKS for hook in vars(child)[kind].values()]
    found += [keys.of(value) for value in code.values()]
    return tuple(found)


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


def _is_own(kind: type) -> bool:
    """Whether all code of a class is the user's, but for that of `nn.Module`."""
    bases = (base for base in kind.__mro__ if base not in (nn.Module, object))
    return not any(is_library(base.__module__) for base in bases)


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

    def __init__(self) -> None:
        self._left = _VALUES
        self._known: dict[int, tuple[object, Hashable]] = {}  # objects live as long as their ids

    def of(self, value: Any, around: tuple[int, ...] = ()) -> Hashable:
        """The key of a value, None for what is not looked into; `around` are the ids it is in."""
        if isinstance(value, (*_PLAIN, *_BY_TEXT)):
            return type(value), value if isinstance(value, (int, str)) else repr(value)
        if isinstance(value, nn.Parameter):  # by name; what is referred to cannot become a DTensor
            return None
        if isinstance(value, Tensor):
            return _Same(value, 0 if value.is_inference() else value._version)
        if isinstance(value, types.MethodType):
            return _Same(value.__func__), _Same(value.__self__)
        if isinstance(value, _FUNCTIONS):
            return _Same(value)
        if id(value) not in self._known:
            self._left -= 1
            if len(around) == _DEPTH or id(value) in around or self._left < 0:
                return None
            self._known[id(value)] = value, self._contents(value, (*around, id(value)))
        return self._known[id(value)][1]

    def _contents(self, value: Any, inside: tuple[int, ...]) -> Hashable:
        if isinstance(value, np.ndarray):
            sample = value.reshape(-1)[:: 1 + value.size // _VALUES]
            return value.shape, str(value.dtype), sample.tobytes()
        if isinstance(value, functools.partial):
            return tuple(self.of(v, inside) for v in (value.func, value.args, value.keywords))
        if isinstance(value, dict):
            items = list(value.items())[:_ENTRIES]
            pairs = [(self.of(k, inside), self.of(v, inside)) for k, v in items]
            return dict, len(value), tuple(pairs)
        if isinstance(value, (set, frozenset)):
            return set, len(value), frozenset(self.of(v, inside) for v in list(value)[:_ENTRIES])
        if isinstance(value, (list, tuple)):
            return type(value), len(value), tuple(self.of(v, inside) for v in value[:_ENTRIES])
        return self._settings(value, inside)

    def _settings(self, value: Any, inside: tuple[int, ...]) -> Hashable:
        """Of an object by its attributes: a namespace, a dataclass, a configuration."""
        unseen = isinstance(value, (nn.Module, types.ModuleType))
        if unseen or type(value).__module__.partition(".")[0] in ("torch", "autopar"):
            return None
        of = dict(vars(value)) if hasattr(value, "__dict__") else {}
        if is_dataclass(value):
            of |= {f.name: getattr(value, f.name, None) for f in fields(value)}
        return type(value), tuple((k, self.of(v, inside)) for k, v in list(of.items())[:_ENTRIES])
