"""What of a module's Python side a capture depends on: hooks, structure, plain values.

A capture bakes in what is not a tensor: `self.beta`, a flag, a global, the hooks of a submodule.
Where any of it has changed since, the forward is captured anew.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Collection, Hashable, Iterator
from functools import cache
from typing import Any

from torch import nn

_PLAIN = (int, float, bool, str, complex, bytes, type(None))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_TORCH = frozenset(vars(nn.Module())) | {"autopar"}
_ENTRIES, _DEPTH = 256, 3  # of containers, more are not looked at


def python_state(
    module: nn.Module, assigned: Collection[tuple[str, str]] = ()
) -> tuple[Hashable, ...]:
    """A key that differs where a capture of the module's forward may differ.

    It holds no tensors: those in attributes are inputs of nothing, and are not looked at; nor are
    those that forward itself assigns, as (path of the submodule, name).
    """
    found: list[Hashable] = []
    seen: set[int] = set()
    kinds: dict[type, None] = {}
    for path, child in module.named_modules():
        found.append(id(child))
        kinds[type(child)] = None
        for name, value in vars(child).items():
            if name not in _OF_TORCH and (path, name) not in assigned:
                found.append((name, _key(value, seen)))
        if child is not module:
            found += [id(hook) for kind in _HOOKS for hook in vars(child)[kind].values()]
    for kind in kinds:
        found += [_key(value, seen) for value in _read_by(kind)]
    return tuple(found)


def warn_recaptured() -> bool:
    """Say that captures follow one another; true, so that it is said once."""
    warnings.warn(
        "forward has been captured anew many times, because attributes, flags or hooks of the "
        "model, or globals that forward reads, change from call to call; keep what changes in a "
        "buffer (self.register_buffer) or pass it to forward as a tensor",
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


def _key(value: Any, seen: set[int], depth: int = 0) -> Hashable:
    """What tells this value from another one; None for what is not looked into."""
    if isinstance(value, _PLAIN):
        return type(value), repr(value) if isinstance(value, float) else value
    if isinstance(value, _FUNCTIONS):
        return id(value)
    if depth == _DEPTH or id(value) in seen:
        return None
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        seen.add(id(value))
        if len(value) > _ENTRIES:
            return len(value)
        items = value.items() if isinstance(value, dict) else value
        keys = [_key(item, seen, depth + 1) for item in items]
        return frozenset(keys) if isinstance(value, (set, frozenset)) else tuple(keys)
    if _is_settings(value):
        seen.add(id(value))
        return tuple((name, _key(v, seen, depth + 1)) for name, v in vars(value).items())
    return None


def _is_settings(value: Any) -> bool:
    """Whether it is an object of plain values: a dataclass, a namespace, a configuration."""
    if isinstance(value, types.SimpleNamespace) or hasattr(type(value), "__dataclass_fields__"):
        return hasattr(value, "__dict__")
    return "config" in type(value).__name__.lower() and hasattr(value, "__dict__")


def _read_by(kind: type) -> Iterator[Any]:
    """The plain globals and variables of enclosing functions that a class's forward reads."""
    for forward in (vars(base).get("forward") for base in kind.__mro__):
        if isinstance(forward, types.FunctionType) and not _is_ours(forward.__module__):
            yield from _read_in(forward)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "autopar")


def _read_in(forward: types.FunctionType) -> Iterator[Any]:
    for name in _names(forward.__code__):
        if name in forward.__globals__:
            value = forward.__globals__[name]
            if isinstance(value, (*_PLAIN, list, tuple, dict, set)):
                yield value
    for cell in forward.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        if isinstance(value, (*_PLAIN, list, tuple, dict, set)):
            yield value


@cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return (*code.co_names, *inner)
