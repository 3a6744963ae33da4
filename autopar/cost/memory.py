"""Bytes of training state, and what autograd keeps of every op until its backward.

`saved` says *which* tensors an op keeps, so that a tensor kept by several ops is counted once and
one that lives anyway (a parameter) not at all; `saved_bytes` adds them up for one op. As in
`compute`, sizes may be ints, numpy arrays or sympy expressions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .compute import LocalOp, differentiable, is_noop, numel
from .families import canonical_name, names, op_family

# Tensors of optimizer state per parameter, each of the parameter's shape and dtype.
OPTIMIZER_STATES: Mapping[str, int] = {
    "none": 0,
    "sgd": 0,
    "sgd_momentum": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "adam": 2,
    "adamw": 2,
}


@dataclass(frozen=True)
class StateBytes:
    """Bytes that training holds per parameter shard from step to step."""

    parameters: Any
    gradients: Any
    optimizer: Any

    @property
    def total(self) -> Any:
        return self.parameters + self.gradients + self.optimizer


def optimizer_state_bytes(
    local_numel: Any,
    dtype: torch.dtype = torch.float32,
    kind: str = "adamw",
    master: torch.dtype | None = None,
) -> Any:
    """Bytes of optimizer state of `local_numel` elements; an unknown `kind` counts as adamw.

    With a `master` dtype the states have that dtype and a master copy of the parameter is added.
    """
    states = OPTIMIZER_STATES.get(kind.lower(), 2)
    if master is None:
        return states * local_numel * dtype.itemsize
    return (states + 1) * local_numel * master.itemsize


def state_bytes(
    local_numel: Any,
    dtype: torch.dtype = torch.float32,
    kind: str = "adamw",
    master: torch.dtype | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> StateBytes:
    """Parameter, gradient and optimizer bytes of `local_numel` trained elements."""
    return StateBytes(
        local_numel * dtype.itemsize,
        local_numel * (gradient_dtype or dtype).itemsize,
        optimizer_state_bytes(local_numel, dtype, kind, master),
    )


@dataclass(frozen=True)
class Saved:
    """What an op keeps: positions of its inputs and outputs, and bytes of tensors of its own."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    own_bytes: Any = 0


NOTHING = Saved()

# Unary ops whose derivative autograd writes in terms of the result; the others keep the input.
_FROM_OUTPUT = names(
    """relu sigmoid tanh exp exp2 expm1 sqrt rsqrt reciprocal softmax log_softmax logsumexp
    leaky_relu relu6 elu celu selu"""
)
_KEEP_NOTHING = names(
    """add sub rsub neg sum mean cumsum zeros_like ones_like clone contiguous to type_as copy cat
    stack concat pad constant_pad_nd repeat tile roll flip tril triu lerp real imag conj
    avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d upsample_nearest2d"""
)
_KEEP_IDS = names(
    """embedding masked_embedding embedding_bag index gather index_select take take_along_dim
    index_put scatter scatter_add index_add index_copy index_fill where masked_fill
    repeat_interleave nll_loss"""
)


def _row_stats(op: LocalOp, per_row: int) -> Any:
    """`per_row` fp32 numbers for every row of the first input."""
    return per_row * 4 * numel(op.inputs[0].shape[:-1])


def _saved_matmul(op: LocalOp) -> Saved:
    name = canonical_name(op.name)
    first = 1 if name in ("addmm", "baddbmm", "addmv") else 0
    count = len(op.inputs) if name == "einsum" else 2
    return _each_for_the_others(op, *range(first, first + count))


def _each_for_the_others(op: LocalOp, *factors: int) -> Saved:
    """A product keeps each operand only if another one wants a gradient."""
    wanted = differentiable(op)
    there = [i for i in factors if i < len(wanted)]
    return Saved(tuple(i for i in there if any(wanted[j] for j in there if j != i)))


def _saved_attention(op: LocalOp) -> Saved:
    q, k = op.inputs[0], op.inputs[1]
    rows = numel(q.shape[:-1])
    if float(op.info.get("dropout_p", 0.0)) == 0.0:  # fused: the log-sum-exp of every row
        return Saved(tuple(range(len(op.inputs))), (0,), 4 * rows)
    # The plain path: probabilities, mask and dropped probabilities, scaled copies of q and k.
    scores = rows * k.shape[-2] * q.dtype.itemsize
    return Saved((2,), (), 3 * scores + q.bytes + k.bytes)


def _saved_norm(op: LocalOp) -> Saved:
    affine = (1,) if len(op.inputs) > 1 else ()
    name = canonical_name(op.name)
    if name == "batch_norm":
        return Saved((0, *affine), (), 2 * 4 * op.inputs[0].shape[1])
    if name == "rms_norm":  # a composite: the normalised input too
        return Saved((0, *affine), (), op.inputs[0].bytes + _row_stats(op, 1))
    if name in ("group_norm", "instance_norm"):
        return Saved((0, *affine), (), 2 * 4 * op.inputs[0].shape[0] * op.inputs[0].shape[1])
    return Saved((0, *affine), (), _row_stats(op, 2))


def _saved_dropout(op: LocalOp) -> Saved:
    return NOTHING if is_noop(op) else Saved((), (), op.outputs[0].numel)


def _saved_pool(op: LocalOp) -> Saved:
    if canonical_name(op.name) in _KEEP_NOTHING:
        return NOTHING
    return Saved((0,), (), 8 * op.outputs[0].numel)


def _saved_reduction(op: LocalOp) -> Saved:
    name = canonical_name(op.name)
    if name in _KEEP_NOTHING or not op.outputs:
        return NOTHING
    if len(op.outputs) > 1:  # max over a dim keeps the places
        return Saved((), (1,))
    return Saved((0,), () if name in ("var", "std", "var_mean") else (0,))


def _saved_pointwise(op: LocalOp) -> Saved:
    name = canonical_name(op.name)
    if name in _FROM_OUTPUT:
        return Saved((), (0,))
    if name == "div" and len(op.inputs) > 1:
        wanted = differentiable(op)
        return Saved((0, 1) if wanted[1] else (1,))
    if name == "pow" and len(op.inputs) > 1:
        return Saved((0, 1), (0,))
    if name == "mul" and len(op.inputs) > 1:
        return _each_for_the_others(op, 0, 1)
    if name in ("mul", "div"):  # by a number
        return NOTHING
    return Saved(tuple(range(len(op.inputs))))


_BY_FAMILY: Mapping[str, Callable[[LocalOp], Saved]] = {
    "view": lambda op: NOTHING,
    "create": lambda op: NOTHING,
    "matmul": _saved_matmul,
    "conv": lambda op: _each_for_the_others(op, 0, 1),
    "attention": _saved_attention,
    "norm": _saved_norm,
    "batch_norm": _saved_norm,
    "dropout": _saved_dropout,
    "pool": _saved_pool,
    "reduction": _saved_reduction,
    "copy": lambda op: NOTHING,
}


def saved(op: LocalOp) -> Saved:
    """What autograd keeps of one call; nothing where no input wants a gradient."""
    name, family = canonical_name(op.name), op_family(op.name)
    if not any(differentiable(op)) or not op.outputs:
        return NOTHING
    if name == "cross_entropy":  # log-probabilities and the targets
        return Saved(tuple(range(1, len(op.inputs))), (), op.inputs[0].bytes)
    if name in _KEEP_IDS:
        return Saved(tuple(i for i, t in enumerate(op.inputs) if not t.dtype.is_floating_point))
    if name in ("topk", "sort"):
        return Saved((), (1,))
    if family in _BY_FAMILY:
        return _BY_FAMILY[family](op)
    if name in _KEEP_NOTHING:
        return NOTHING
    return _saved_pointwise(op)


def moment_bytes(op: LocalOp) -> Any:
    """Bytes that the backward of an op takes beside its gradients, and gives back with its end.

    A cross-entropy makes the gradient of the log-probabilities first: a tensor as large as they.
    """
    if canonical_name(op.name) == "cross_entropy" and any(differentiable(op)):
        return op.inputs[0].bytes
    return 0


def saved_bytes(op: LocalOp, free_inputs: Collection[int] = ()) -> Any:
    """Bytes that one call keeps until its backward, tensors counted once per call.

    `free_inputs` are positions of inputs that live anyway: parameters, or what another op has kept.
    """
    kept = saved(op)
    total = kept.own_bytes
    for i in kept.inputs:
        if i not in free_inputs:
            total = total + op.inputs[i].bytes
    for i in kept.outputs:
        total = total + op.outputs[i].bytes
    return total
