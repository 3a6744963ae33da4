"""Bytes that an op moves: read plus written, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .families import canonical_name, op_family
from .local_op import LocalOp, TensorSpec, differentiable, is_noop


def total_bytes(specs: Sequence[TensorSpec]) -> Any:
    """Bytes of some tensors together."""
    return sum((spec.bytes for spec in specs), start=0)


def op_bytes(op: LocalOp) -> Any:
    """Bytes read and written by the forward; 0 for views."""
    family = op_family(op.name)
    outs = total_bytes(op.outputs)
    if family == "view" or is_noop(op):
        return 0
    if family in ("embedding", "gather"):
        ids = total_bytes([spec for spec in op.inputs if not spec.dtype.is_floating_point])
        return ids + 2 * outs
    if family == "scatter":
        return 2 * outs + 2 * total_bytes(op.inputs[1:])
    if family == "create":
        return outs
    name = canonical_name(op.name)
    if name == "cross_entropy":  # log-probabilities are written, then read at the targets
        return 2 * op.inputs[0].bytes
    if name == "nll_loss":
        return 2 * total_bytes(op.inputs[1:])
    if family == "dropout":
        return total_bytes(op.inputs) + outs + op.outputs[0].numel  # the mask: one byte each
    return total_bytes(op.inputs) + outs


_ADDITIVE = ("add", "sub", "rsub", "neg", "lerp")
_NO_GRADIENT_WORK = ("clone", "contiguous", "copy", "cat", "concat", "stack")
_SLICES = ("slice", "select", "narrow", "as_strided", "diagonal", "unfold")
_SPLITS = ("split", "split_with_sizes", "tensor_split", "chunk", "unbind")


def backward_bytes(op: LocalOp) -> Any:
    """Bytes read and written by the backward of an op that is not matrix work."""
    family, name = op_family(op.name), canonical_name(op.name)
    wanted = [spec for spec, needed in zip(op.inputs, differentiable(op), strict=True) if needed]
    if not wanted or is_noop(op) or family == "create" or not op.outputs:
        return 0
    out = op.outputs[0].bytes
    if family == "view":
        return _view_backward_bytes(name, op.inputs[0].bytes, total_bytes(op.outputs))
    if family == "embedding":  # a dense gradient of the whole local table, then the rows added
        return op.inputs[0].bytes + 3 * out
    if family == "gather":
        return op.inputs[0].bytes + 3 * out
    if family == "scatter":
        return 2 * out + 2 * total_bytes(wanted[1:])
    if name in _ADDITIVE:
        return _broadcast_bytes(wanted, out) + (2 * out if name == "neg" else 0)
    if name in _NO_GRADIENT_WORK:
        return 0
    if family == "copy":
        return out + total_bytes(wanted)
    if name == "cross_entropy":
        return 2 * op.inputs[0].bytes
    if name == "nll_loss":
        return op.inputs[0].bytes
    if family == "dropout":
        return 2 * out + op.outputs[0].numel
    if family in ("norm", "batch_norm"):
        return 3 * op.inputs[0].bytes
    if family in ("reduction", "pool", "sort"):
        return out + total_bytes(wanted)
    if len(op.inputs) == 1:
        return 3 * out
    return sum((2 * out + spec.bytes for spec in wanted), start=0)


def _view_backward_bytes(name: str, whole: Any, part: Any) -> Any:
    if name in _SLICES:  # zeros, then the slice copied in
        return whole + 2 * part
    if name in _SPLITS:  # one concatenation
        return 2 * whole
    if name in ("expand", "expand_as"):
        return (part + whole) * _larger(part, whole)
    return 0


def _broadcast_bytes(wanted: Sequence[TensorSpec], out: Any) -> Any:
    """Gradients of broadcast operands are sums; those of full operands pass through."""
    return sum(((out + spec.bytes) * _larger(out, spec.bytes) for spec in wanted), start=0)


def _larger(a: Any, b: Any) -> Any:
    """1 where a > b else 0, for numbers, arrays and sympy (undecided comparisons count as 1)."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.asarray(np.greater(a, b), dtype=np.int64)
    answer = a > b
    try:
        return int(bool(answer))
    except TypeError:
        return 1
