"""What forward leaves behind in the module besides its result: new buffers, new attributes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .structure import Structure, map_leaves, take_apart

_CONTAINERS = (list, dict, set)


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Tensors that forward assigns to an attribute of a submodule: `path.name = value`."""

    path: str
    name: str
    value: Structure


@dataclasses.dataclass(frozen=True)
class SideEffects:
    """`buffers` maps names of buffers to the tensors assigned to them; `attributes` has the others
    as (path, name, new value)."""

    buffers: dict[str, Tensor]
    attributes: tuple[tuple[str, str, Any], ...]


def observe(
    module: nn.Module, stand_in: nn.Module, run: Callable[[], Any]
) -> tuple[Any, SideEffects]:
    """The result of `run` and what it did to `module`, which is as before afterwards.

    `run` is the code that dynamo puts after its graph. It sees `stand_in` for `module`: another
    module with the same submodules, parameters and buffers. Warns of changes that cannot be
    reproduced: Python numbers, and things appended to lists.
    """
    modules = {name: child for name, child in module.named_modules() if name}
    modules[""] = stand_in
    before = {name: _State(child) for name, child in modules.items()}
    result = run()
    buffers: dict[str, Tensor] = {}
    attributes: list[tuple[str, str, Any]] = []
    lost: list[str] = []
    for path, state in before.items():
        prefix = f"{path}." if path else ""
        for name, value in state.changed_buffers():
            buffers[f"{prefix}{name}"] = value
        for name, value in state.changed_attributes():
            if take_apart(value)[0]:
                attributes.append((path, name, value))
            else:
                lost.append(f"{prefix}{name}")
        lost += [f"{prefix}{name}" for name in state.restore()]
    if lost:
        warnings.warn(
            f"forward changes self.{', self.'.join(lost)}: this happens once, when autopar captures"
            " it, and not in every step; keep the value in a buffer, or change it outside forward",
            UserWarning,
            stacklevel=2,
        )
    return result, SideEffects(buffers, tuple(attributes))


class _State:
    """The attributes and buffers of one module, and the contents of its lists and dicts."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.buffers = dict(module._buffers)
        self.contents = {
            name: value.copy()
            for name, value in self.attributes.items()
            if type(value) in _CONTAINERS and not name.startswith("_")
        }

    def changed_buffers(self) -> list[tuple[str, Tensor]]:
        new = self.module._buffers.items()
        return [(k, v) for k, v in new if v is not None and v is not self.buffers.get(k)]

    def changed_attributes(self) -> list[tuple[str, Any]]:
        absent = object()
        new = vars(self.module).items()
        return [(k, v) for k, v in new if self.attributes.get(k, absent) is not v]

    def restore(self) -> list[str]:
        """Put everything back; the names of the lists and dicts whose contents had changed."""
        self.module._buffers.update(self.buffers)
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        changed = []
        for name, contents in self.contents.items():
            value: Any = self.attributes[name]
            if len(value) != len(contents) or not _same_items(value, contents):
                changed.append(name)
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(contents)
        return changed


def _same_items(value: Any, contents: Any) -> bool:
    if isinstance(value, dict):
        return all(k in contents and contents[k] is v for k, v in value.items())
    if isinstance(value, list):
        return all(a is b for a, b in zip(value, contents, strict=True))
    return bool(value == contents)


def attributes_of(
    effects: SideEffects, add_result: Callable[[Tensor], int]
) -> tuple[Attribute, ...]:
    """The attributes with their tensors as leaves; `add_result` numbers a tensor."""
    found = []
    for path, name, value in effects.attributes:
        tensors, structure = take_apart(value)
        numbers = [add_result(tensor) for tensor in tensors]
        found.append(Attribute(path, name, map_leaves(structure, numbers.__getitem__)))
    return tuple(found)
