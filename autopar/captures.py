"""The captures of one module: made from a plain twin, kept by mode, found again by call."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .capture import Capture, CaptureMismatchError, capture
from .capture.fingerprint import fingerprint
from .closures import copy_closures
from .code_names import Code
from .index_checks import Indices, indices_of
from .ir.hint import Hint
from .ir.rule import Choice
from .passes.hints import with_hints
from .passes.prepare import prepare
from .programs import Runnable
from .python_state import python_state, warn_recaptured
from .runtime.agree import number
from .runtime.deferred import DeferredTensor

_MODES = 16  # whose captures are kept
_CAPTURES = 64  # of a mode: for shapes that are fixed and arguments that are no tensors
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass
class Captured:
    """A capture with the choices of its ops under the plan, and its programs by batch sizes."""

    capture: Capture
    choices: Mapping[str, Mapping[str, Choice]]
    programs: dict[tuple[int, ...], Runnable] = field(default_factory=dict)

    @cached_property
    def indices(self) -> tuple[Indices, ...]:
        """Inputs that are indices, with what they may be."""
        return indices_of(self.capture.graph)

    @cached_property
    def number(self) -> int:
        """One that captures of other operations, constants or sizes do not have, and not 0."""
        return 1 + number(fingerprint(self.capture.graph, sizes=True))


class Found(NamedTuple):
    """A capture that is valid for a call, with the call's tensors and sizes."""

    captured: Captured
    inputs: list[Tensor]
    sizes: dict[Any, int]


class Captures:
    """What is known of the forward of a module whose class was `original`.

    `hints` are put into the captured graphs.
    """

    def __init__(
        self, module: nn.Module, original: type[nn.Module], device_type: str, hints: Sequence[Hint]
    ) -> None:
        self.module = module
        self.original = original
        self.device_type = device_type
        self.hints = hints
        self._known: dict[tuple[Any, ...], list[Captured]] = {}
        self._assigned: set[tuple[str, str]] = set()  # attributes that forward assigns
        self._code = Code()
        self._told = False

    def copied(self, module: nn.Module) -> Captures:
        """Those of a deep copy of the module: none yet."""
        return Captures(module, self.original, self.device_type, self.hints)

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Found | None:
        """The capture that is valid for a call, if there is one."""
        for captured in self._of_mode():
            try:
                inputs = captured.capture.flatten(args, kwargs)
            except CaptureMismatchError:
                continue
            sizes = captured.capture.bind(inputs)
            if sizes is not None:
                return Found(captured, inputs, sizes)
        return None

    def keep(self, new: Captured) -> None:
        """From now on, this is found; it takes the place of one of the same operations."""
        made = new.capture.attributes
        self._assigned |= {(attribute.path, attribute.name) for attribute in made}
        known = self._of_mode()
        others = [old for old in known if old.number != new.number]
        if len(others) >= _CAPTURES:
            self._told = self._told or warn_recaptured()
        known[:] = [new, *others[: _CAPTURES - 1]]

    def make(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, grad: bool
    ) -> Capture:
        """Capture a plain twin of the module: whole parameters that are never touched."""
        twin = self._twin()
        if training != self.module.training:
            twin.train(training)
        with torch.set_grad_enabled(grad):
            made = capture(twin, args, dict(kwargs))
        return replace(made, graph=with_hints(prepare(made.graph), self.hints, strict=False))

    def _of_mode(self) -> list[Captured]:
        """Those of this mode; of modes that were used longest ago some are forgotten."""
        mode = self._mode()
        known = self._known.pop(mode, None)
        if known is None:
            known = []
            while len(self._known) >= _MODES:
                self._known.pop(next(iter(self._known)))
                self._told = self._told or warn_recaptured()
        self._known[mode] = known
        return known

    def _mode(self) -> tuple[Any, ...]:
        """Captures are valid for one mode: train or eval per submodule, gradients, autocast, and
        what forward reads that is no tensor.
        """
        autocast = (
            torch.is_autocast_enabled(self.device_type),
            str(torch.get_autocast_dtype(self.device_type)),
        )
        training = tuple(m.training for m in self.module.modules())
        requires = tuple((p.requires_grad, p.dtype) for p in self.module.parameters())
        buffers = tuple((b.dtype, b.shape) for b in self.module.buffers())
        state = requires, buffers, python_state(self.module, self._assigned, self._code)
        return training, state, torch.is_grad_enabled(), autocast, torch.get_default_dtype()

    def _twin(self) -> nn.Module:
        memo: dict[int, Any] = {id(self.module.__dict__["autopar"]): None}
        for parameter in self.module.parameters():
            # Never written, so that the operating system never gives it memory; GPUs would.
            on_gpu = isinstance(parameter, DeferredTensor) and parameter.device.type != "cpu"
            device = torch.device("meta") if on_gpu else parameter.device
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for child in self.module.modules():  # what forward left there, with its graph
            for value in tree_leaves(dict(vars(child))):
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach()
        kept = self.module.__class__
        self.module.__class__ = self.original
        try:
            copy_closures(self.module, memo)
            twin = copy.deepcopy(self.module, memo)
        finally:
            self.module.__class__ = kept
        for hooks in _HOOKS:  # the module's own call runs them, around what is captured
            vars(twin)[hooks].clear()
        return twin
