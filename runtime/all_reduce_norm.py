"""A sum over a group, a residual and RMSNorm as one op: one launch, or what they are in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.ir.pointwise import IDENTITY, Pointwise

from .group import Group
from .kernels import all_reduce_norm as kernel
from .kernels.support import fall_back
from .symmetric import workspace_of


def all_reduce_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    group: Group | None,
    *,
    epilogue: Pointwise = IDENTITY,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(epilogue(rms_norm(sum) * weight), sum) with `sum` of the group's `x` and of `residual`.

    RMSNorm is over the last dim, of size `weight`; `x` and `residual` have one shape. The first
    result is of `dtype` (default that of the sum). The gradient of every rank's `x` is that of the
    sum, and those of the others are as complete as those of the results. Raises ValueError for
    shapes that differ.
    """
    if x.shape != residual.shape or (weight is not None and weight.shape != x.shape[-1:]):
        wanted = "" if weight is None else f", {tuple(weight.shape)}"
        raise ValueError(
            f"all_reduce_norm: shapes {tuple(x.shape)}, {tuple(residual.shape)}{wanted}"
        )
    y, total = _AllReduceNorm.apply(  # type: ignore[no-untyped-call]
        x, residual, weight, eps, group, epilogue, dtype
    )
    return y, total


class _AllReduceNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        group: Group | None,
        epilogue: Pointwise,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        workspace = _workspace(x, residual, weight, group)
        if workspace is not None:
            y, total, scale = kernel.all_reduce_norm(
                workspace, x, residual, weight, eps, epilogue, dtype
            )
        else:
            summed = x if group is None else group.all_reduce(x).wait()
            total = summed + residual
            y, scale = kernel.normalised(total, weight, eps, epilogue, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, scale)
        ctx.epilogue, ctx.dtypes = epilogue, (x.dtype, residual.dtype)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, direct: Tensor | None) -> tuple[Any, ...]:
        total, weight, scale = ctx.saved_tensors
        of_sum, of_weight = direct, None
        if grad is not None:
            h = total.to(scale.dtype) * scale
            g = grad.to(scale.dtype)
            if ctx.epilogue:
                v = h if weight is None else h * weight.to(scale.dtype)
                g = g * ctx.epilogue.derivative()(v)
            if ctx.needs_input_grad[2]:
                of_weight = (g * h).sum_to_size(weight.shape).to(weight.dtype)
            g = g if weight is None else g * weight.to(scale.dtype)
            back = scale * (g - h * (g * h).mean(-1, keepdim=True))
            of_sum = back if direct is None else back + direct
        if of_sum is None:
            return (None,) * 7
        cast = {dtype: of_sum.to(dtype) for dtype in set(ctx.dtypes)}
        of_x, of_residual = (
            cast[dtype] if needed else None
            for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        )
        return of_x, of_residual, of_weight, None, None, None, None


def _workspace(
    x: Tensor, residual: Tensor, weight: Tensor | None, group: Group | None
) -> kernel.Workspace | None:
    """Where the kernel runs, or None; the same on all ranks."""
    if group is None or group.size == 1:
        return None
    # Agreed on first: what a rank finds out by itself must not let it leave the others alone.
    workspace = workspace_of(group, x.device)
    if not kernel.takes(x, residual, weight, group.size):
        return None
    if workspace is None:
        fall_back(kernel.NAME, "the ranks of a group have no symmetric memory")
    return workspace
