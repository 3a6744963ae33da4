"""Ops whose shards need to know where they lie, or communicate by themselves.

Tensors are local; each op is differentiable, and its gradient has the kind that the lowered
language promises (see `autopar.ir.lowered`).
"""

from __future__ import annotations

import math
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

# Elements of logits that are worked on at a time on CPU: a quarter to a half MiB, so that maximum,
# exponential and sum find them in the cache.
CROSS_ENTROPY_BLOCK = 1 << 17


# --- Dropout ----------------------------------------------------------------------------------


def dropout(
    x: Tensor,
    p: float,
    seed: int,
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
    is made in one pass, along with what the fusion says of `x` and `extras`, in `dtype`. Raises
    ValueError if `p` is no probability or `x` not of the region's shape.
    """
    if isinstance(region, tuple):
        region = region[micro_batch]
    if tuple(x.shape) != local_shape(region):
        raise ValueError(f"dropout: shape {tuple(x.shape)} is not that of the region {region}")
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


# --- Cross-entropy ----------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    vocab_group: Group | None = None,
    token_group: Group | None = None,
    classes_last: bool = False,
) -> Tensor:
    """`F.cross_entropy` where tokens and classes may be divided among ranks.

    `logits` are (C), (N, C) or (N, C, d1, ...), or (..., C) if `classes_last`. The classes here
    are those from `vocab_start` on, of `vocab_size` in all, if `vocab_group` is given. `weight`
    holds all classes, `target` the local tokens. With a `token_group`, 'mean' and 'sum' give this
    rank's part of the loss: their sum over the group is the loss, since 'mean' divides by the count
    (or weight) of the tokens of the whole group. Class probabilities as targets work while the
    classes are not divided.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: reduction {reduction!r} is not mean, sum or none")
    if classes_last and logits.dim() > 2:
        shape = logits.shape[:-1]
        logits = logits.flatten(0, -2)
        target = target.flatten(0, -2) if target.is_floating_point() else target.flatten()
        losses = cross_entropy(
            logits,
            target,
            weight,
            reduction,
            ignore_index,
            label_smoothing,
            vocab_start,
            vocab_size,
            vocab_group,
            token_group,
        )
        return losses.view(shape) if reduction == "none" else losses
    count = None
    if reduction == "mean":
        count = _token_count(logits, target, weight, ignore_index)
        if token_group is not None and token_group.size > 1:
            flight = token_group.all_reduce(count)
            count = None
    if vocab_group is None:
        total = F.cross_entropy(
            logits,
            target,
            weight,
            reduction="none" if reduction == "none" else "sum",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    else:
        losses = _divided_cross_entropy(
            logits,
            target,
            weight,
            ignore_index,
            label_smoothing,
            vocab_start,
            logits.shape[_class_dim(logits)] if vocab_size is None else vocab_size,
            vocab_group,
        )
        total = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        if count is None:
            count = flight.wait()
        total = total / count.to(total.dtype)
    return total.to(logits.dtype)


def _class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def _token_count(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    """What a mean over the local tokens divides by."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if target.is_floating_point():
        tokens = math.prod(s for d, s in enumerate(logits.shape) if d != _class_dim(logits))
        return torch.tensor(tokens, dtype=dtype, device=logits.device)
    kept = target != ignore_index
    if weight is None:
        return kept.sum().to(dtype)
    return (weight[target.where(kept, 0)].to(dtype) * kept).sum()


def _divided_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    start: int,
    vocab_size: int,
    group: Group,
) -> Tensor:
    """Losses of the tokens, in float32 or better, of classes divided among the group."""
    if target.is_floating_point():
        raise ValueError(
            "cross_entropy: class probabilities as targets need all classes on each rank"
        )
    dim = _class_dim(logits)
    flat = logits.movedim(dim, -1).reshape(target.numel(), logits.shape[dim])
    ids = target.reshape(-1)
    kept = ids != ignore_index
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = kept & ((ids < 0) | (ids >= vocab_size))
        if wrong.any():
            raise IndexError(f"Target {int(ids[wrong][0])} is out of bounds.")
    losses: Tensor = _DividedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat, ids, kept, weight, label_smoothing, start, vocab_size, group
    )
    return losses.view(target.shape)


class _DividedCrossEntropy(torch.autograd.Function):
    """Cross-entropy over divided classes: one small message forward, none backward.

    With m, s the local maximum and the local sum of exp(l - m), all ranks' (m, s) give the
    log-sum-exp L. The softmax p over the local classes is kept, and becomes the gradient in one
    pass: the softmax over all classes is p * s * exp(m - L).

    For token i of class y and smoothing e, with W = sum_c w_c: loss_i = (1 - e) w_y (L - l_y) +
    e/C (W L - sum_c w_c l_c), as in torch's `cross_entropy_loss_label_smoothing`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        kept: Tensor,
        weight: Tensor | None,
        smoothing: float,
        start: int,
        vocab_size: int,
        group: Group,
    ) -> Tensor:
        tokens, classes = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        here = kept & (ids >= start) & (ids < start + classes)
        local = (ids - start).where(here, 0)
        mine = None if weight is None else weight[start : start + classes].to(dtype)
        # Rows: maximum, sum of exponentials, target's logit, smoothing's sum of logits.
        message = logits.new_zeros((4 if smoothing else 3, tokens), dtype=dtype)
        message[0].fill_(-math.inf)
        probabilities = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if classes:
            picked = logits.gather(1, local[:, None]).view(-1).to(dtype)
            message[2] = picked.where(here, 0.0)
            _local_softmax(logits, probabilities, message, mine)
        gathered = message[None]
        if group.size > 1:
            gathered = group.all_gather(gathered).wait()
        top = gathered[:, 0].amax(0)
        log_sum = top + (gathered[:, 1] * (gathered[:, 0] - top).exp()).sum(0).log()
        chosen = gathered[:, 2].sum(0)
        token_weight = kept.to(dtype) if weight is None else _weights(weight, ids, kept, dtype)
        losses = (log_sum - chosen) * token_weight * (1.0 - smoothing)
        whole_weight: Tensor | float = float(vocab_size)
        if weight is not None:
            whole_weight = weight.to(dtype).sum()
        if smoothing:
            rest = log_sum * whole_weight - gathered[:, 3].sum(0)
            losses = losses + rest * (smoothing / vocab_size)
        losses = losses.masked_fill(~kept, 0.0)
        shift = message[0].where(message[0] > -math.inf, 0.0)
        # Factor of p that makes the gradient of a loss with respect to logits, but for the
        # target's own -1 and the smoothing's constant.
        factor = token_weight * (1.0 - smoothing)
        if smoothing:
            factor = factor + whole_weight * (smoothing / vocab_size)
        factor = (factor * message[1] * (shift - log_sum).exp()).masked_fill(~kept, 0.0)
        ctx.save_for_backward(probabilities, factor, token_weight, here, local, kept, mine)
        ctx.smoothing, ctx.vocab_size = smoothing, vocab_size
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, factor, token_weight, here, local, kept, mine = ctx.saved_tensors
        # A new tensor: the probabilities may be needed by another backward.
        out = probabilities * (factor * grad)[:, None].to(probabilities.dtype)
        if ctx.smoothing:
            constant = (grad * kept * (ctx.smoothing / ctx.vocab_size))[:, None]
            out -= (constant if mine is None else constant * mine).to(out.dtype)
        if out.shape[1]:
            own = (grad * token_weight * here * (ctx.smoothing - 1.0))[:, None]
            out.scatter_add_(1, local[:, None], own.to(out.dtype))
        return out, None, None, None, None, None, None, None


def _weights(weight: Tensor, ids: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    return weight[ids.where(kept, 0)].to(dtype) * kept


def _local_softmax(
    logits: Tensor, probabilities: Tensor, message: Tensor, weight: Tensor | None
) -> None:
    """Fill `probabilities` and the rows of `message` that need all logits, block by block.

    Softmax of the local classes is one fused kernel, and its maximum is exp(0) / sum.
    """
    tokens, classes = logits.shape
    block = max(1, CROSS_ENTROPY_BLOCK // classes)
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        block = max(1, tokens)
    for begin in range(0, tokens, block):
        part = logits[begin : begin + block].to(message.dtype)
        end = begin + part.shape[0]
        here = probabilities[begin:end]
        if here.dtype == part.dtype:
            torch.softmax(part, 1, out=here)
        else:
            wide = part.softmax(1)
            here.copy_(wide)
            here = wide
        torch.amax(part, 1, out=message[0, begin:end])
        torch.reciprocal(here.amax(1), out=message[1, begin:end])
        if message.shape[0] > 3:
            message[3, begin:end] = part.sum(1) if weight is None else part @ weight
    masked = message[0] == -math.inf  # no class of theirs is here: softmax is 0 / 0
    if logits.device.type != "cpu" or masked.any():
        message[1].masked_fill_(masked, 0.0)
        probabilities.masked_fill_(masked[:, None], 0.0)


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
