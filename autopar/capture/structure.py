"""Take a user's arguments or results apart into tensors and rebuild them."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size,
    torch.Generator, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType,
    types.ModuleType, nn.Module,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor: number `index` in the flat list. The same tensor twice is the same leaf twice."""

    index: int


@dataclasses.dataclass(frozen=True)
class Constant:
    """Anything else; equal to another constant of the same type and value."""

    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return False
        if self.value is other.value:
            return True
        if type(self.value) is not type(other.value):
            return False
        try:
            return bool(self.value == other.value)
        except Exception:  # the user's __eq__ may do anything; unequal only means a new capture
            return False

    __hash__ = None  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class Container:
    """A tuple, list, dict, dataclass or other object with tensors inside."""

    type: type
    keys: tuple[Hashable, ...]
    children: tuple[Structure, ...]
    build: Callable[[Sequence[Any]], Any] = dataclasses.field(compare=False, repr=False)


Structure = Leaf | Constant | Container


def take_apart(obj: object) -> tuple[list[Tensor], Structure]:
    """The tensors in `obj` in order, each once, and the structure that `rebuild` puts them in."""
    tensors: list[Tensor] = []
    seen: dict[int, int] = {}
    open_ids: set[int] = set()

    def visit(value: object) -> Structure:
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen[id(value)] = len(tensors)
                tensors.append(value)
            return Leaf(seen[id(value)])
        parts = None if isinstance(value, _ATOMS) or id(value) in open_ids else _split(value)
        if parts is None:
            return Constant(value)
        keys, children, build = parts
        open_ids.add(id(value))
        visited = tuple(visit(child) for child in children)
        open_ids.discard(id(value))
        if not isinstance(value, (tuple, list, dict)) and not any(map(_has_leaf, visited)):
            return Constant(value)
        return Container(type(value), keys, visited, build)

    return tensors, visit(obj)


def rebuild(structure: Structure, tensors: Sequence[Any]) -> Any:
    """The object that `structure` was taken from, with `tensors` in the places of the leaves."""
    if isinstance(structure, Leaf):
        return tensors[structure.index]
    if isinstance(structure, Constant):
        return structure.value
    return structure.build([rebuild(child, tensors) for child in structure.children])


def paths(structure: Structure, prefix: str = "") -> dict[int, str]:
    """A readable dotted name per leaf: `{0: "batch.x", 1: "labels"}`."""
    if isinstance(structure, Leaf):
        return {structure.index: prefix}
    found: dict[int, str] = {}
    if isinstance(structure, Container):
        for key, child in zip(structure.keys, structure.children, strict=True):
            for index, name in paths(child, f"{prefix}.{key}" if prefix else str(key)).items():
                found.setdefault(index, name)
    return found


def map_leaves(structure: Structure, index: Callable[[int], int]) -> Structure:
    """The same structure with its leaves renumbered."""
    if isinstance(structure, Leaf):
        return Leaf(index(structure.index))
    if isinstance(structure, Container):
        children = tuple(map_leaves(child, index) for child in structure.children)
        return dataclasses.replace(structure, children=children)
    return structure


def constants(structure: Structure) -> list[Any]:
    """Every constant in a structure."""
    if isinstance(structure, Constant):
        return [structure.value]
    if isinstance(structure, Container):
        return [value for child in structure.children for value in constants(child)]
    return []


def _has_leaf(structure: Structure) -> bool:
    if isinstance(structure, Container):
        return any(map(_has_leaf, structure.children))
    return isinstance(structure, Leaf)


_Parts = tuple[tuple[Hashable, ...], tuple[Any, ...], Callable[[Sequence[Any]], Any]]


def _split(value: Any) -> _Parts | None:
    kind = type(value)
    if isinstance(value, (tuple, list)):
        if hasattr(kind, "_fields"):  # a named tuple
            return kind._fields, tuple(value), lambda parts: kind(*parts)
        return tuple(range(len(value))), tuple(value), kind
    if isinstance(value, Mapping):
        return _split_mapping(value)
    if dataclasses.is_dataclass(value):
        fields = (field.name for field in dataclasses.fields(value))
        names = tuple(name for name in fields if hasattr(value, name))
    elif hasattr(value, "__dict__"):
        names = tuple(vars(value))
    else:
        return None

    def build(parts: Sequence[Any]) -> Any:
        new = copy.copy(value)
        for name, part in zip(names, parts, strict=True):
            object.__setattr__(new, name, part)
        return new

    return names, tuple(getattr(value, name) for name in names), build


def _split_mapping(value: Mapping[Any, Any]) -> _Parts:
    kind: Any = type(value)
    keys = tuple(value)

    def build(parts: Sequence[Any]) -> Any:
        items = dict(zip(keys, parts, strict=True))
        if kind in (dict, collections.OrderedDict):
            return kind(items)
        if dataclasses.is_dataclass(kind):  # Hugging Face's ModelOutput: a dict and a dataclass
            return kind(**items)  # type: ignore[operator]
        new = copy.copy(value)
        new.update(items)  # type: ignore[attr-defined]
        return new

    return keys, tuple(value.values()), build
