"""Cross-entropy of tokens and classes that may be divided among ranks, in torch or one kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.ir.pointwise import Pointwise

from .group import Group
from .kernels import cross_entropy as fused
from .kernels.support import fall_back, usable

# Elements of logits that are worked on at a time on CPU: a quarter to a half MiB, so that maximum,
# exponential and sum find them in the cache.
CROSS_ENTROPY_BLOCK = 1 << 17


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
    kernel: Pointwise | None = None,
    in_place: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`F.cross_entropy` where tokens and classes may be divided among ranks.

    `logits` are (C), (N, C) or (N, C, d1, ...), or (..., C) if `classes_last`. The classes here
    are those from `vocab_start` on, of `vocab_size` in all, if `vocab_group` is given. `weight`
    holds all classes, `target` the local tokens. With a `token_group`, 'mean' and 'sum' give this
    rank's part of the loss: their sum over the group is the loss, since 'mean' divides by the count
    (or weight) of the tokens of the whole group. Class probabilities as targets work while the
    classes are not divided.

    With a `kernel`, a program that is applied to the logits first and makes them `dtype` (default
    their own), the fused kernel runs where it can; its backward then writes the gradient over the
    logits if `in_place`. The loss is of `dtype`. Raises ValueError for an unknown reduction and for
    a program that reads further tensors.
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
            False,
            kernel,
            in_place,
            dtype,
        )
        return losses.view(shape) if reduction == "none" else losses
    dtype = dtype or logits.dtype
    if kernel is not None and not _fusible(logits, target):
        logits, kernel = kernel(logits).to(dtype), None
    count = None
    if reduction == "mean":
        count = _token_count(logits, target, weight, ignore_index)
        if token_group is not None and token_group.size > 1:
            flight = token_group.all_reduce(count)
            count = None
    here = logits.shape[_class_dim(logits)]
    classes = fused.Classes(0, here, ignore_index, label_smoothing)
    if vocab_group is not None:
        size = here if vocab_size is None else vocab_size
        classes = fused.Classes(vocab_start, size, ignore_index, label_smoothing)
    total = _total(logits, target, weight, reduction, classes, vocab_group, kernel, in_place)
    if reduction == "mean":
        if count is None:
            count = flight.wait()
        total = total / count.to(total.dtype)
    return total.to(dtype)


def _class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def _total(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    classes: fused.Classes,
    group: Group | None,
    kernel: Pointwise | None,
    in_place: bool,
) -> Tensor:
    """The sum of the local tokens' losses, or each if the reduction is 'none'."""
    if kernel is not None:
        losses = _fused_cross_entropy(logits, target, weight, classes, group, kernel, in_place)
    elif group is not None:
        losses = _divided_cross_entropy(logits, target, weight, classes, group)
    else:
        return F.cross_entropy(
            logits,
            target,
            weight,
            reduction="none" if reduction == "none" else "sum",
            ignore_index=classes.ignore_index,
            label_smoothing=classes.smoothing,
        )
    return losses if reduction == "none" else losses.sum()


def _by_token(logits: Tensor, target: Tensor) -> Tensor:
    """The logits as [tokens, classes]; copied where classes are not last."""
    dim = _class_dim(logits)
    return logits.movedim(dim, -1).reshape(target.numel(), logits.shape[dim])


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
    classes: fused.Classes,
    group: Group,
) -> Tensor:
    """Losses of the tokens, in float32 or better, of classes divided among the group."""
    if target.is_floating_point():
        raise ValueError(
            "cross_entropy: class probabilities as targets need all classes on each rank"
        )
    flat = _by_token(logits, target)
    ids = target.reshape(-1)
    kept = ids != classes.ignore_index
    _check_ids(ids, kept, classes.size)
    losses: Tensor = _DividedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat, ids, kept, weight, classes.smoothing, classes.start, classes.size, group
    )
    return losses.view(target.shape)


def _check_ids(ids: Tensor, kept: Tensor, vocab_size: int) -> None:
    """Raise IndexError for an id that is no class, where looking at ids costs no waiting."""
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = kept & ((ids < 0) | (ids >= vocab_size))
        if wrong.any():
            raise IndexError(f"Target {int(ids[wrong][0])} is out of bounds.")


def _fusible(logits: Tensor, target: Tensor) -> bool:
    """Whether the kernel takes these; warns once if not."""
    if target.is_floating_point():
        fall_back(fused.NAME, "its targets are class probabilities")
        return False
    # Offsets of logits are of 64 bits, classes and statistics of tokens of 32.
    return usable(fused.NAME, logits, largest=1 << 62) and usable(
        fused.NAME, target, largest=fused.MOST_TOKENS
    )


def _fused_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    classes: fused.Classes,
    group: Group | None,
    program: Pointwise,
    in_place: bool,
) -> Tensor:
    """Losses of the tokens by the kernel, in float32 or better."""
    ids = target.reshape(-1)
    _check_ids(ids, ids != classes.ignore_index, classes.size)
    flat = _by_token(logits, target)
    losses = fused.cross_entropy(flat, ids, classes, weight, group, program, in_place)
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
