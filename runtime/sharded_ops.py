"""Ops whose shards need to know where they lie, or communicate by themselves.

Tensors are local; each op is differentiable, and its gradient has the kind that the lowered
language promises (see `autopar.ir.lowered`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.ir.lowered import Region
from autopar.ir.pointwise import Fusion

from .group import Group
from .kernels import dropout as dropout_kernel
from .random import keep_mask, local_shape
from .random_keys import masked

# --- Dropout ----------------------------------------------------------------------------------


def dropout(
    x: Tensor,
    p: float,
    seed: int | Tensor,
    call: int,
    region: Region | tuple[Region, ...],
    micro_batch: int = 0,
    *,
    kernel: Fusion | None = None,
    extras: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`x * mask / (1 - p)`, with the mask of `autopar.runtime.random` for the region of `x`.

    Of several regions, `x` is that of its micro-batch. The result is contiguous. With a `kernel` it
    is made in one pass, along with what the fusion says of `x` and `extras`, in `dtype`. Given a
    table of keys by call for a seed, it is ops that a compiler fuses. Raises ValueError if `p` is
    no probability or `x` not of the region's shape.
    """
    if isinstance(region, tuple):
        region = region[micro_batch]
    if tuple(x.shape) != local_shape(region):
        raise ValueError(f"dropout: shape {tuple(x.shape)} is not that of the region {region}")
    if isinstance(seed, Tensor):
        return masked(x, p, seed, call, region)
    if kernel is not None:
        if dropout_kernel.takes(x, extras):
            return dropout_kernel.dropout(x, p, seed, call, region, kernel, extras, dtype)
        mask = keep_mask(p, seed, call, region, x.device)
        return dropout_kernel.reference(x, mask, p, kernel, extras, dtype)
    if p == 0.0:
        return x
    y: Tensor = _Dropout.apply(x, p, seed, call, region)  # type: ignore[no-untyped-call]
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, call: int, region: Region) -> Tensor:
        mask = keep_mask(p, seed, call, region, x.device)
        ctx.save_for_backward(mask)
        ctx.scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        return _masked_scale(x, mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return _masked_scale(grad, mask, ctx.scale), None, None, None, None


def _masked_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`x * (mask * scale)`, rounded as torch's dropout does; a third faster than mul by a bool."""
    return mask.to(x.dtype).mul_(scale).mul_(x)


# --- Embedding --------------------------------------------------------------------------------


def masked_embedding(weight: Tensor, ids: Tensor, start: int, padding_idx: int = -1) -> Tensor:
    """Rows `[start, start + len(weight))` of an embedding table; zeros for all other ids.

    The result is partial: its sum over the group is the whole table's embedding. `padding_idx` is
    an id of the whole table whose row gets no gradient, or negative. Negative ids raise IndexError
    on CPU; too large ones cannot be told from other ranks' and give zeros.
    """
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        lowest = int(ids.min())
        if lowest < 0:
            raise IndexError(f"index out of range in embedding: {lowest}")
    y: Tensor = _MaskedEmbedding.apply(  # type: ignore[no-untyped-call]
        weight, ids, start, padding_idx
    )
    return y


class _MaskedEmbedding(torch.autograd.Function):
    """Touches only the ids that are here: about one in n of them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, start: int, padding_idx: int) -> Tensor:
        rows, width = weight.shape
        flat = ids.reshape(-1) - start
        place = ((flat >= 0) & (flat < rows)).nonzero().view(-1)
        local = flat[place]
        ctx.save_for_backward(place, local)
        ctx.rows, ctx.padding = rows, padding_idx - start if padding_idx >= 0 else -1
        out = weight.new_zeros((flat.numel(), width))
        out.index_copy_(0, place, weight.index_select(0, local))
        return out.view(*ids.shape, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        place, local = ctx.saved_tensors
        picked = grad.reshape(-1, grad.shape[-1]).index_select(0, place)
        padding = ctx.padding if 0 <= ctx.padding < ctx.rows else -1
        dense = torch.ops.aten.embedding_dense_backward(picked, local, ctx.rows, padding, False)
        return dense, None, None, None


# --- Batch normalisation ----------------------------------------------------------------------


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: Group | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`F.batch_norm` with statistics over the batches of the whole group.

    `x` is (N, C, ...), N or any trailing dim divided, evenly or not. Returns the output and the new
    running mean and variance (the given ones if they do not change). The gradients of `weight` and
    `bias` are this rank's part of the sum.
    """
    if not training and running_mean is not None:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        return y, running_mean, running_var
    y, mean, var, count = _BatchNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, eps, group
    )
    if not training or running_mean is None or running_var is None:
        return y, running_mean, running_var
    unbiased = var * (count / (count - 1))
    return (
        y,
        torch.lerp(running_mean, mean.to(running_mean.dtype), momentum),
        torch.lerp(running_var, unbiased.to(running_var.dtype), momentum),
    )


class _BatchNorm(torch.autograd.Function):
    """One message of counts, means and variances forward, one of two sums per channel backward.

    Statistics are combined as in Chan, Golub, LeVeque 1983: squared deviations from the rank's own
    mean, plus those of the means. The elementwise work is done by torch's evaluation kernels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: Group | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, var, count = _statistics(x, dtype, group)
        scale = None if weight is None else weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        if x.numel():
            y = torch.native_batch_norm(x, scale, offset, mean, var, False, 0.0, eps)[0]
        else:
            y = torch.empty_like(x)
        ctx.save_for_backward(x, scale, mean, var, count)
        ctx.eps, ctx.group = eps, group
        ctx.dtypes = (
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
        )
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, scale, mean, var, count = ctx.saved_tensors
        group: Group | None = ctx.group
        sums = mean.new_zeros((2, mean.numel()))  # of grad * normalised x, and of grad
        if x.numel():
            _, sums[0], sums[1] = torch.ops.aten.native_batch_norm_backward(
                grad, x, scale, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        of_weight, of_bias = ctx.dtypes
        grad_weight = sums[0].to(of_weight) if ctx.needs_input_grad[1] else None
        grad_bias = sums[1].to(of_bias) if ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            total = sums
            if group is not None and group.size > 1:
                total = group.all_reduce(sums).wait()
            inverse = torch.rsqrt(var + ctx.eps)
            slope = inverse if scale is None else inverse * scale
            # grad_x = slope * (grad - total[1] / count - (x - mean) * inverse * total[0] / count)
            of_x = -slope * inverse * total[0] / count
            grad_x = _affine(x, mean, of_x, -slope * total[1] / count, grad, slope)
        return grad_x, grad_weight, grad_bias, None, None


def _affine(
    x: Tensor, mean: Tensor, of_x: Tensor, constant: Tensor, grad: Tensor, of_grad: Tensor
) -> Tensor:
    """`(x - mean) * of_x + constant + grad * of_grad`, factors per channel.

    The evaluation kernel does the first part in one pass, in half the time of broadcast products.
    """
    if not x.numel():
        return torch.empty_like(x)
    wide = x.to(mean.dtype)
    ones = torch.ones_like(mean)
    out = torch.native_batch_norm(wide, of_x, constant, mean, ones, False, 0.0, 0.0)[0]
    return out.addcmul_(grad, of_grad.view(1, -1, *(1,) * (x.dim() - 2))).to(x.dtype)


def _statistics(
    x: Tensor, dtype: torch.dtype, group: Group | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over the group, and the count of values."""
    channels = x.shape[1]
    local = x.numel() // channels if channels else 0
    message = torch.zeros(2 * channels + 1, dtype=dtype, device=x.device)
    if local:
        if x.dtype == dtype and x.device.type == "cpu":  # a third of the time of var_mean
            mean, var = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
        else:
            dims = [d for d in range(x.dim()) if d != 1]
            var, mean = torch.var_mean(x.to(dtype), dims, correction=0)
        message[:channels], message[channels:-1], message[-1] = mean, var, local
    if group is None or group.size == 1:
        return message[:channels], message[channels:-1], message[-1]
    parts = group.all_gather(message[None]).wait()
    means, vars_, counts = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
    count = counts.sum()
    share = counts / count
    mean = (means * share).sum(0)
    var = ((vars_ + (means - mean) ** 2) * share).sum(0)
    return mean, var, count
