"""Rows copied to where they are wanted, and scaled: the adjoint of `combine`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .combine import combine, weight_gradient
from .permute import gather_rows


def spread(x: Tensor, order: Tensor, position: Tensor, weight: Tensor | None = None) -> Tensor:
    """`y[i] = weight.view(-1)[order[i]] * x[order[i] // k]`, [len(order), width].

    `x` is [tokens, width]; `order` are slots, integers below tokens * k, none of them twice.
    `position` [tokens, k] says where each slot is in `order`, or -1. `weight` is [tokens, k] (ones
    if None). Differentiable in `x` and `weight`.
    """
    y: Tensor = _Spread.apply(x, order, position, weight)  # type: ignore[no-untyped-call]
    return y


def reference(x: Tensor, order: Tensor, ways: int, weight: Tensor | None = None) -> Tensor:
    """The same in torch."""
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = x.index_select(0, order // ways).to(compute)
    if weight is not None:
        rows = weight.reshape(-1).index_select(0, order)[:, None].to(compute) * rows
    return rows.to(x.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order: Tensor, position: Tensor, weight: Tensor | None
    ) -> Tensor:
        weight = None if weight is None else weight.contiguous()
        saved = [] if weight is None else [weight]
        saved += [x] if ctx.needs_input_grad[3] else []
        ctx.weighted = weight is not None
        ctx.save_for_backward(position, *saved)
        return gather_rows(x, order, weight=weight, slots=position.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        position, *saved = ctx.saved_tensors
        weight = saved[0] if ctx.weighted else None
        of_x, of_weight = None, None
        if ctx.needs_input_grad[0]:
            of_x = combine(grad, position, weight)
        if ctx.needs_input_grad[3]:
            of_weight = weight_gradient(saved[1], grad, position, saved[0])
        return of_x, None, None, of_weight
