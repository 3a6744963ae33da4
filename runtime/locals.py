"""This rank's pieces of DTensor parameters, differentiable, without DTensor's dispatch.

`DTensor.to_local` costs 50 to 100 microseconds a parameter and direction; all parameters of a
program together pass through one autograd node here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from autopar.compat import dtensor_like, local_of


def local_tensors(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The local tensor of every DTensor (others as they are); gradients come back as DTensors."""
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
        return [local_of(p).detach() if isinstance(p, DTensor) else p for p in parameters]
    found: tuple[Tensor, ...] = _Locals.apply(*parameters)  # type: ignore[no-untyped-call]
    return list(found)


def take_whole_gradients(outputs: Sequence[Any]) -> None:
    """Let the gradients that come back for a program's results be whole, ordinary tensors.

    Where a loop adds something of the parameters to a loss (their squares, say), they are DTensors,
    which must not meet the pieces that the program computed with.
    """
    nodes = {x.grad_fn for x in outputs if isinstance(x, Tensor) and x.grad_fn is not None}
    for node in nodes:
        node.register_prehook(_whole_gradients)


def _whole_gradients(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)


class _Locals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)
        found = tuple((local_of(p) if isinstance(p, DTensor) else p).detach() for p in parameters)
        fixed = [x for x, p in zip(found, parameters, strict=True) if not p.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given: set[int] = set()
        found: list[Tensor | None] = []
        for g, p in zip(gradients, ctx.parameters, strict=True):
            found.append(_wrapped(g, p, given) if g is not None and isinstance(p, DTensor) else g)
        return tuple(found)


def _wrapped(gradient: Tensor, parameter: DTensor, given: set[int]) -> DTensor:
    """The gradient as a DTensor that owns its memory and is laid out as its parameter.

    Autograd takes the DTensor as `.grad` without a copy, and fused optimizers read it by the
    parameter's strides; `given` are the addresses that other parameters' gradients already have.
    """
    local = local_of(parameter)
    if gradient.stride() != local.stride() or gradient.data_ptr() in given:
        gradient = torch.empty_like(local, dtype=gradient.dtype).copy_(gradient)
    if gradient.numel():
        given.add(gradient.data_ptr())
    return dtensor_like(gradient, parameter)
