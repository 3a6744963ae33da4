"""Cross-entropy of classes that may be divided among ranks, by reading the logits once each way.

The forward takes a rank's maximum, sum of exponentials and target's logit from one pass over its
logits (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3); a small message
combines the ranks. The backward computes (softmax - target) from the logits, with the prologue's
derivative, and may write it over them. Neither keeps probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.errors import UserError
from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise
from autopar.runtime.group import Group

from .ahead import Specialisation
from .cross_entropy_source import emit, emit_backward, emit_combine
from .emit import Kernel, compute_type
from .launch import block_size, cdiv, launch

NAME = "cross_entropy"
TILE_BYTES = 8192  # of logits at a time: 64 bytes for each of 128 threads
WARPS = 4
TOKENS = 256  # per program that combines the ranks
MOST_TOKENS = (1 << 28) - 1  # four statistics of each are reached by 32 bits; logits by 64


@dataclass(frozen=True)
class Classes:
    """The classes here, those from `start` on of `size` in all, and how a loss counts them."""

    start: int
    size: int
    ignore_index: int = -100
    smoothing: float = 0.0

    def shared(self, weight: Tensor | None) -> dict[str, Any]:
        """Constants of all three kernels."""
        return {
            "IGNORED": self.ignore_index,
            "SMOOTH": self.smoothing != 0.0,
            "WEIGHTED": weight is not None,
        }

    def factors(self) -> dict[str, Any]:
        """Constants of a loss: what is the target's, and what is each class's."""
        return {
            "KEEP": 1.0 - self.smoothing,
            "SPREAD": self.smoothing / max(self.size, 1),
            "CLASSES": self.size,
        }


def cross_entropy(
    logits: Tensor,
    ids: Tensor,
    classes: Classes,
    weight: Tensor | None = None,
    group: Group | None = None,
    program: Pointwise = IDENTITY,
    in_place: bool = False,
) -> Tensor:
    """Losses [tokens] of logits [tokens, classes here], in float32 (float64 for float64 logits).

    `ids` [tokens] are classes of all ranks', `weight` [classes of all]; the members of `group` hold
    the classes together. `program` is applied to the logits first. If `in_place`, the backward
    writes the gradient over the logits, whose version it counts on: a second backward raises
    UserError. An id that is no class has the loss nan; ignored tokens have a gradient of zeros.
    Raises ValueError if the program reads further tensors.
    """
    if program.extras:
        raise ValueError(f"cross_entropy: {program} reads more than the logits")
    losses: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, ids.contiguous(), classes, weight, group, program, in_place
    )
    return losses


def reference(
    logits: Tensor,
    ids: Tensor,
    classes: Classes,
    weight: Tensor | None = None,
    program: Pointwise = IDENTITY,
) -> Tensor:
    """The same of one rank in torch."""
    wide = program(logits)
    return F.cross_entropy(
        wide,
        ids,
        None if weight is None else weight.to(wide.dtype),
        reduction="none",
        ignore_index=classes.ignore_index,
        label_smoothing=classes.smoothing,
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        classes: Classes,
        weight: Tensor | None,
        group: Group | None,
        program: Pointwise,
        in_place: bool,
    ) -> Tensor:
        logits = _by_rows(logits)
        tokens = logits.shape[0]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weight = None if weight is None else weight.contiguous()
        whole = None
        if weight is not None and classes.smoothing:
            whole = weight.sum(dtype=dtype)
        parts = 4 if classes.smoothing else 3
        message = torch.empty((1, parts, tokens), dtype=dtype, device=logits.device)
        kernel = emit(program, compute_type(dtype))
        _over_rows(kernel, logits, [logits, ids, weight, message], classes, weight)
        if group is not None and group.size > 1:
            message = group.all_gather(message).wait()
        losses, log_sums = message.new_empty((2, tokens)).unbind()
        block = block_size(TOKENS)
        launch(
            emit_combine(compute_type(dtype)),
            (cdiv(tokens, block),),
            *(message, ids, weight, whole, losses, log_sums),
            tokens,
            message.shape[0],
            classes.size,
            **classes.shared(weight),
            **classes.factors(),
            PARTS=parts,
            BLOCK=block,
        )
        ctx.save_for_backward(logits, ids, weight, whole, log_sums)
        ctx.classes, ctx.program, ctx.in_place, ctx.spent = classes, program, in_place, False
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise UserError(
                "a second backward through cross_entropy, whose first one wrote the gradient over"
                " the logits",
                fix='keep the logits: parallelize(..., kernels="off")',
            )
        logits, ids, weight, whole, log_sums = ctx.saved_tensors
        out = (
            logits
            if ctx.in_place
            else torch.empty_strided(
                logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
            )
        )
        grad = grad.to(log_sums.dtype)
        if grad.stride(0) not in (0, 1):
            grad = grad.contiguous()
        tensors = [logits, out, ids, weight, whole, log_sums, grad]
        kernel = emit_backward(ctx.program, compute_type(log_sums.dtype))
        classes: Classes = ctx.classes
        _over_rows(kernel, logits, tensors, classes, weight, grad.stride(0), **classes.factors())
        if ctx.in_place:
            ctx.spent = True
            torch.autograd.graph.increment_version(logits)
            out = out.detach()
        return out, None, None, None, None, None, None


def _over_rows(
    kernel: Kernel,
    logits: Tensor,
    tensors: list[Tensor | None],
    classes: Classes,
    weight: Tensor | None,
    *more: int,
    **constants: Any,
) -> None:
    """Launch a kernel of one or a few rows per program."""
    tokens, here = logits.shape
    tile = block_size(TILE_BYTES // logits.element_size())
    block = min(tile, 1 << (here + 14).bit_length())
    rows = tile // block
    launch(
        kernel,
        (cdiv(tokens, rows),),
        *tensors,
        tokens,
        here,
        logits.stride(0),
        classes.start,
        *more,
        num_warps=WARPS,
        **classes.shared(weight),
        **constants,
        ROWS=rows,
        BLOCK=block,
    )


def _by_rows(logits: Tensor) -> Tensor:
    """The logits with adjacent classes and rows not far apart; copied if they are not so."""
    tokens, classes = logits.shape
    if logits.is_contiguous():
        return logits.view(tokens, classes)
    stride, adjacent = logits.stride()
    if adjacent == 1 and classes <= stride <= 2 * classes:
        return logits
    return logits.contiguous()


def specialisations() -> list[Specialisation]:
    """Plain in three dtypes; soft-capped, and smoothed with weights, in bfloat16; the message."""
    cap = parse_pointwise("t0 = div(x, 30.0); t1 = tanh(t0); mul(t1, 30.0)")
    plain, smooth = Classes(0, 50257), Classes(0, 50257, smoothing=0.1)
    forms = [_combined(plain)]
    for dtype in ("fp32", "bf16", "fp16"):
        forms += _forms(dtype, IDENTITY, plain, False)
    forms += _forms("bf16", cap, plain, False)
    forms += _forms("bf16", IDENTITY, smooth, True)
    return forms


def _forms(
    dtype: str, program: Pointwise, classes: Classes, weighted: bool
) -> tuple[Specialisation, Specialisation]:
    weight = torch.empty(1) if weighted else None
    pointers = {"x_ptr": f"*{dtype}", "dx_ptr": f"*{dtype}", "ids_ptr": "*i64"}
    if weighted:
        pointers.update(weight_ptr="*fp32", whole_ptr="*fp32")
    absent = {} if weighted else {"weight_ptr": None, "whole_ptr": None}
    numbers = dict.fromkeys(("rows", "classes", "stride", "start"), "i32")
    tile = {"ROWS": 1, "BLOCK": TILE_BYTES // (4 if dtype == "fp32" else 2)}
    constants = {**classes.shared(weight), **tile}
    names = ("x_ptr", "ids_ptr", "weight_ptr")
    forward = {n: pointers[n] for n in names if n in pointers}
    forward.update(out_ptr="*fp32", **numbers)
    missing = {n: None for n in absent if n in names}
    backward = {**pointers, "log_sums_ptr": "*fp32", "grad_ptr": "*fp32", **numbers}
    backward["grad_stride"] = "i32"
    aligned = ("x_ptr", "dx_ptr")
    return (
        # It stores a few numbers per row: nothing wide.
        Specialisation(
            emit(program), forward, {**constants, **missing}, aligned[:1], WARPS, wide=False
        ),
        Specialisation(
            emit_backward(program),
            backward,
            {**constants, **classes.factors(), **absent},
            aligned,
            WARPS,
        ),
    )


def _combined(classes: Classes) -> Specialisation:
    pointers = dict.fromkeys(("message_ptr", "losses_ptr", "log_sums_ptr"), "*fp32")
    numbers = dict.fromkeys(("rows", "members", "classes"), "i32")
    constants = {**classes.shared(None), **classes.factors(), "PARTS": 3, "BLOCK": TOKENS}
    return Specialisation(
        emit_combine(),
        {**pointers, "ids_ptr": "*i64", **numbers},
        {**constants, "weight_ptr": None, "whole_ptr": None},
        tuple(pointers),
        wide=False,
    )
