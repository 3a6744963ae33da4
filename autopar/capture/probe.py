"""Run a module on tensors without storage and record what it calls, at a small part of the cost
of a capture.

A record is what shows that a deep model does in every layer what it does in the layers that are
captured: each call with its constants, what it takes from which earlier call, parameter or input,
what shapes it gives, the modes it runs in, and the lines that led to it.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopar import compat

from .explain import TORCH
from .side_effects import SideEffects, observe
from .stand_ins import StandIns, device_of, replaced
from .structure import rebuild, take_apart
from .tandem import ITEM, Item, Ref

NAME = "name"  # the kind of references to parameters, buffers and inputs: the tag is the name


class UnknownTensorError(Exception):
    """Forward uses a tensor that is not the module's, nor an argument, nor made by a torch call."""


def probe(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], names: Mapping[int, str]
) -> list[Item]:
    """What `module(*args, **kwargs)` calls; the last item is what it returns and assigns.

    `names` are the names of the module's tensors by id. The module is left as it was. Raises
    whatever forward raises without real values, and `UnknownTensorError`.
    """
    try:
        return _probe(module, args, kwargs, names, _MetaTensors())
    except Exception:  # some code needs to be told a device on which it could run
        tensors = take_apart((tuple(args), dict(kwargs)))[0]
        return _probe(module, args, kwargs, names, StandIns(device_of(module, tensors)))


class _MetaTensors:
    """Stand-ins on the meta device: the fastest."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._made:
            like = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            made: Tensor = (
                nn.Parameter(like, requires_grad=tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else like.requires_grad_(tensor.requires_grad)
            )
            self._made[id(tensor)] = (tensor, made)
        return self._made[id(tensor)][1]

    def mode(self) -> contextlib.AbstractContextManager[Any]:
        return torch.device("meta")


def _probe(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Mapping[int, str],
    stand_ins: _MetaTensors | StandIns,
) -> list[Item]:
    tensors, structure = take_apart((tuple(args), dict(kwargs)))
    known = {id(stand_ins.of(t)): Ref(NAME, f"input {i}") for i, t in enumerate(tensors)}
    owned: list[Tensor] = [*module.parameters(), *module.buffers()]
    known.update({id(stand_ins.of(t)): Ref(NAME, names[id(t)]) for t in owned})
    args, kwargs = rebuild(structure, [stand_ins.of(t) for t in tensors])
    with replaced(module, stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, child in module.named_modules():
            for attribute, value in vars(child).items():
                if isinstance(value, Tensor):
                    known.setdefault(id(value), Ref(NAME, f"{name}.{attribute}"))
        recorder = _Recorder(known)

        def run() -> Any:
            with stand_ins.mode(), compat.pretend_compiling(), recorder:
                return module(*args, **kwargs)

        result, effects = observe(module, module, run)
    recorder.finish(result, effects)
    return recorder.items


class _Recorder(TorchFunctionMode):
    def __init__(self, known: Mapping[int, Ref]) -> None:
        super().__init__()
        self.items: list[Item] = []
        self._known = dict(known)
        self._alive: list[Any] = []  # an id is that of one tensor only while the tensor lives
        self._calls = Calls()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        if getattr(func, "__name__", "") == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):  # x.shape, x.device
                return result
            call = self._argument(args, tensors)
            refs = tuple(map(self._reference, tensors))
            modes = _modes()
        else:
            call = (self._argument(args, tensors), self._argument(kwargs, tensors))
            refs = tuple(map(self._reference, tensors))
            modes = _modes()
            result = self._calls.call(func, args, kwargs, (func, call, modes), tensors)
        made = self._results(result)
        self.items.append(Item((func, call, made, modes, _callers()), refs))
        return result

    def finish(self, result: Any, effects: SideEffects) -> None:
        """Add an item for what forward returns and assigns."""
        assigned = [(path, name, value) for path, name, value in effects.attributes]
        tensors, structure = take_apart((result, assigned, effects.buffers))
        refs = tuple(self._reference(tensor) for tensor in tensors)
        self.items.append(Item(("output", structure), refs))

    def _argument(self, value: Any, tensors: list[Tensor]) -> Any:
        """What is constant of an argument; its tensors go to `tensors`."""
        kind = type(value)
        if kind in _PLAIN:
            return (kind, value) if kind in _NUMBERS else value
        if isinstance(value, Tensor):
            tensors.append(value)
            return Tensor
        if isinstance(value, (tuple, list)):
            return (kind, *(self._argument(part, tensors) for part in value))
        if isinstance(value, dict):
            return (kind, *((k, self._argument(v, tensors)) for k, v in value.items()))
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return (slice, *(self._argument(part, tensors) for part in parts))
        self._alive.append(value)
        return (kind, id(value))

    def _reference(self, tensor: Tensor) -> Ref:
        found = self._known.get(id(tensor))
        if found is None:
            raise UnknownTensorError
        return found

    def _results(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            return self._result(result, 0)
        if isinstance(result, (tuple, list)):
            return tuple(
                self._result(part, i) if isinstance(part, Tensor) else type(part)
                for i, part in enumerate(result)
            )
        return type(result)

    def _result(self, tensor: Tensor, output: int) -> Any:
        self._known[id(tensor)] = Ref(ITEM, output, len(self.items))
        self._alive.append(tensor)
        return (tensor.shape, tensor.dtype, tensor.requires_grad)


class Calls:
    """Answers a call of torch as an equal one before it was answered: layers repeat themselves."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, tuple[int, ...]]] = {}

    def call(self, func: Any, args: Any, kwargs: Any, key: Any, tensors: Sequence[Tensor]) -> Any:
        """`func(*args, **kwargs)` or a tensor of the same type as it has given before.

        `key` and the types of `tensors`, which are those in the arguments, tell calls apart.
        """
        name = getattr(func, "__name__", "_")
        if (name.endswith("_") and not name.startswith("__")) or name in _WRITES or "out" in kwargs:
            return func(*args, **kwargs)
        types = tuple((t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors)
        known = self._known.get((key, types))
        if known is None:
            result = func(*args, **kwargs)
            if (parts := _parts(result)) is not None:
                places = tuple(
                    next((i for i, t in enumerate(tensors) if t is p), -1) for p in parts
                )
                if all(i >= 0 or _copies_well(p) for i, p in zip(places, parts, strict=True)):
                    self._known[key, types] = (result, places)
            return result
        result, places = known
        parts = [
            tensors[i] if i >= 0 else part.clone()
            for i, part in zip(places, _parts(result) or (), strict=True)
        ]
        return parts[0] if isinstance(result, Tensor) else type(result)(parts)


def _parts(result: Any) -> Sequence[Tensor] | None:
    """The tensors that a call gives; None if it gives anything else."""
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, (tuple, list)) and all(isinstance(part, Tensor) for part in result):
        return result
    return None


def _copies_well(tensor: Tensor) -> bool:
    copy = tensor.clone()
    return copy.requires_grad == tensor.requires_grad and copy.stride() == tensor.stride()


_WRITES = frozenset(
    {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
     "__ipow__", "__imod__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
)  # fmt: skip
_NUMBERS = frozenset({int, float, bool, complex})
_PLAIN = frozenset(
    {*_NUMBERS, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout,
     type(...), torch.Size}
)  # fmt: skip


def _modes() -> Any:
    return (
        torch.is_grad_enabled(),
        *(
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            for device in ("cpu", "cuda")
        ),
    )


def _callers() -> tuple[int, ...]:
    """Where in which functions the call stands, up to the probe's own.

    Inside of torch only which functions: on its first call one of them may take another way.
    """
    found: list[int] = []
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code is not _ROOT:
        code = frame.f_code
        found.append(id(code))
        if not code.co_filename.startswith(TORCH):
            found.append(frame.f_lasti)
        frame = frame.f_back
    return tuple(found)


_ROOT = _probe.__code__
