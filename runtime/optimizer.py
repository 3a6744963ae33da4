"""Optimizer steps on this rank's pieces, without DTensor's dispatch.

An optimizer that treats every element by itself does the same to the pieces as to the whole.
So a copy of such an optimizer, with the local tensors in the place of the DTensors, makes its step,
and state that the step makes is wrapped as DTensors when it is over. Dispatching one fused AdamW
over 75 DTensors costs 20 ms on a CPU; this costs about one.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autopar.compat import dtensor_like, local_of

from .foreign_values import follow_gradients, seen
from .kernel_steps import WITH_KERNEL
from .on_stage import placed_like

ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


class LocalSteps:
    """The two hooks, and the local halves of the optimizers whose step is under way.

    The step itself runs on a copy of the optimizer that has the local tensors, so that one that
    raises leaves the user's as it was, and hooks of the user's see DTensors.
    """

    def __init__(self) -> None:
        self._with_kernel: WeakSet[nn.Module] = WeakSet()
        self._local: WeakKeyDictionary[Any, _LocalGroups] = WeakKeyDictionary()
        self._handles = (
            register_optimizer_step_pre_hook(self.before),
            register_optimizer_step_post_hook(self.after),
        )

    def close(self) -> None:
        """Take the hooks away, which must not be while an optimizer of any model makes its step."""
        for handle in self._handles:
            handle.remove()

    def use_kernel(self, module: nn.Module, wanted: bool) -> None:
        """Whether Adam and AdamW that have parameters of this module go through the kernel.

        Where it is usable; the steps of other optimizers are torch's own.
        """
        (self._with_kernel.add if wanted else self._with_kernel.discard)(module)

    def _is_for_kernel(self, optimizer: Any) -> bool:
        if type(optimizer) not in WITH_KERNEL or not self._with_kernel:
            return False
        theirs = {id(p) for module in self._with_kernel for p in module.parameters()}
        return any(id(p) in theirs for g in optimizer.param_groups for p in g["params"])

    def before(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let a copy with local tensors make the step, if the optimizer is one that may have them.

        The first positional argument is the optimizer that makes it.
        """
        self._local.pop(optimizer, None)  # of a step that raised
        if seen():
            follow_gradients(p for group in optimizer.param_groups for p in group["params"])
        if type(optimizer) not in ELEMENTWISE or _has_closure(args, kwargs):
            return None
        if args[0] is not optimizer:  # another parallel module's hook was here
            return None
        if not any(isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"]):
            return None
        self._come_first(optimizer)
        kind = type(optimizer)
        local: Any = object.__new__(WITH_KERNEL[kind] if self._is_for_kernel(optimizer) else kind)
        vars(local).update(vars(optimizer))
        local.state = defaultdict(dict)
        local.param_groups = self._local[optimizer] = _LocalGroups(optimizer, local.state)
        return (local, *args[1:]), kwargs

    def _come_first(self, optimizer: Any) -> None:
        """Let hooks that the user gave the optimizer for after its step see what the step made.

        An optimizer's own hooks run before those of all optimizers.
        """
        hooks = optimizer._optimizer_step_post_hooks
        if hooks and self.after not in hooks.values():
            handle = optimizer.register_step_post_hook(self.after)
            hooks.move_to_end(handle.id, last=False)

    def after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the optimizer what the step made of its state."""
        groups = self._local.pop(optimizer, None)
        if groups is None:
            return
        for name, value in vars(args[0]).items():
            if name not in ("state", "param_groups") and vars(optimizer).get(name) is not value:
                setattr(optimizer, name, value)
        groups.give_back()


@functools.cache
def local_steps() -> LocalSteps:
    """The hooks of this process, for all parallel modules, which stay.

    Hooks that went with their module, whenever its memory is collected, would go in the middle of
    a step of another module's optimizer, and the state that this step made would be lost.
    """
    return LocalSteps()


class _LocalGroups(Sequence[dict[str, Any]]):
    """The parameter groups of an optimizer with local tensors, made when the step asks for them.

    That is after all hooks, which may have set other gradients.
    """

    def __init__(self, optimizer: Any, state: dict[Tensor, dict[str, Any]]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._state = state
        self._groups: list[dict[str, Any]] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def _made(self) -> list[dict[str, Any]]:
        optimizer = self._optimizer()
        if not self._groups and optimizer is not None:
            for group in optimizer.param_groups:
                parameters = [self._localised(optimizer, p) for p in group["params"]]
                self._groups.append({**group, "params": parameters})
        return self._groups

    def __len__(self) -> int:
        return len(self._made())

    def __getitem__(self, index: Any) -> Any:
        return self._made()[index]

    def _localised(self, optimizer: Any, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            local = parameter
        else:
            local = local_of(parameter).detach().requires_grad_(parameter.requires_grad)
            local.grad = _local_gradient(parameter)
        self._pairs.append((local, parameter))
        state = optimizer.state.get(parameter)
        if state is not None:
            self._state[local] = {
                name: local_of(value) if isinstance(value, DTensor) else value
                for name, value in state.items()
            }
        return local

    def give_back(self) -> None:
        """Put what is new in the state into the optimizer's own, wrapped as its parameters are."""
        optimizer = self._optimizer()
        for local, parameter in self._pairs:
            if local not in self._state or optimizer is None:
                continue
            own = optimizer.state[parameter]
            for name, value in self._state[local].items():
                known = own.get(name)
                if (local_of(known) if isinstance(known, DTensor) else known) is not value:
                    own[name] = _wrapped(value, local, parameter)


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A closure runs the model inside the step, which needs its DTensors."""
    return kwargs.get("closure") is not None or any(callable(a) for a in args[1:])


def _local_gradient(parameter: DTensor) -> Tensor | None:
    gradient = parameter.grad
    if not isinstance(gradient, DTensor):
        return gradient
    if gradient.placements != parameter.placements:
        gradient = placed_like(gradient, parameter)
    return local_of(gradient)


def _wrapped(value: Any, local: Tensor, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor):
        return value
    if value.shape != local.shape or value.dim() == 0:
        return value
    return dtensor_like(value, parameter)
