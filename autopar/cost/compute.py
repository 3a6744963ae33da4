"""Time of one op on one device, from its local shapes: a roofline per op family.

Flops and bytes are plain arithmetic on shapes, so a size may be an int, a numpy array (one entry
per candidate) or a sympy expression. Times need numbers: int or arrays. Units: flops count a
multiply-add as 2, bytes are those read plus those written, times are seconds.

An op is its local call as a `LocalOp`. Matrix work takes
`max(w / rate(w), bytes / bandwidth["matmul"](bytes))` with `w = flops / narrow(min(m, n, k))`, and
of the smaller of the two the share `serial_traffic` that the device cannot do at the same time;
everything else `bytes / bandwidth[family](bytes)`; both plus the device's op overhead. Views are
free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .cluster import Device
from .curve import Number
from .families import canonical_name, op_family
from .flops import contractions, einsum_sizes, matmul_dims, op_flops
from .local_op import (
    LocalOp,
    Shape,
    TensorSpec,
    differentiable,
    is_noop,
    local_op,
    node_info,
    numel,
)
from .traffic import backward_bytes, op_bytes, total_bytes

__all__ = [
    "OPTIMIZER_PASSES",
    "LocalOp",
    "Shape",
    "TensorSpec",
    "accumulate_time",
    "backward_bytes",
    "backward_time",
    "copy_time",
    "differentiable",
    "dtype_name",
    "einsum_sizes",
    "forward_time",
    "is_noop",
    "local_op",
    "matmul_dims",
    "node_info",
    "numel",
    "op_bytes",
    "op_flops",
    "optimizer_time",
]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _memory_time(device: Device, family: str, nbytes: Any) -> Number:
    nbytes = _numbers(nbytes)
    return nbytes / device.bandwidth_curve(family)(nbytes)


def _numbers(value: Any) -> Number:
    """Arrays as float64 arrays, everything else as a float."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    return float(value)


def _matrix_time(
    device: Device, op: LocalOp, factor: Number = 1.0, rates: str | None = None
) -> Number:
    """One product with the op's operands and result; `factor` scales its flops."""
    family = op_family(op.name)
    flops = _numbers(op_flops(op)) * factor
    nbytes = _numbers(total_bytes(op.inputs) + total_bytes(op.outputs))
    if family == "matmul":  # as much work as a product that is not narrow and takes as long
        _, m, n, k = matmul_dims(op)
        smallest = np.minimum(np.minimum(m, n), k)
        flops = flops / device.narrow(
            smallest.astype(np.float64) if isinstance(smallest, np.ndarray) else float(smallest)
        )
    rate = device.rate_curve(dtype_name(op.dtype), rates or family)(flops)
    arithmetic = flops / rate
    traffic = nbytes / device.bandwidth_curve("matmul")(nbytes)
    longer = np.maximum(arithmetic, traffic)
    if family != "matmul" or _is_absent(device.serial_traffic):
        return longer  # rates of the other families are measured with what they move
    return longer + device.serial_traffic * np.minimum(arithmetic, traffic)


def _is_absent(figure: Any) -> bool:
    """Whether a profile does not have a figure; a formula without it is shorter to read."""
    return bool(getattr(figure, "hint", figure) == 0)


def _is_chain(op: LocalOp) -> bool:
    """Whether an op is several products, one after the other."""
    return len(op.inputs) > 2 and canonical_name(op.name) == "einsum"


def _causal_share(op: LocalOp) -> Number:
    """Fused attention skips what a causal mask hides: half of the work.

    Of n devices that divide the rows, the last one does most: all keys but half of those at its own
    rows, `1 - 1/2n`.
    """
    if not op.info.get("causal"):
        return 1.0
    rows, keys = (_numbers(spec.shape[-2]) for spec in op.inputs[:2])
    last = _numbers(op.info.get("rows", op.inputs[0].shape[-2])) - rows / 2
    return np.minimum(1.0, last / np.maximum(keys, 1.0))


def forward_time(device: Device, op: LocalOp) -> Number:
    """Seconds of the op's forward on `device`."""
    family = op_family(op.name)
    if family == "view" or is_noop(op):
        return 0.0
    if _is_chain(op):
        return sum((forward_time(device, pair) for pair in contractions(op)), start=0.0)
    if family in ("matmul", "conv", "attention"):
        return _matrix_time(device, op, _causal_share(op)) + device.op_overhead_s
    return _memory_time(device, family, op_bytes(op)) + device.op_overhead_s


def backward_time(device: Device, op: LocalOp) -> Number:
    """Seconds of the op's backward for the inputs that want gradients.

    Matmul and convolution: one product as large as the forward per differentiable operand.
    Attention: 2.5 forwards (five products for two; the scores are recomputed), FlashAttention-2,
    arXiv:2307.08691 section 3. The rest: bytes moved.
    """
    family = op_family(op.name)
    grads = differentiable(op)
    if not any(grads) or is_noop(op):
        return 0.0
    if _is_chain(op):
        return sum((backward_time(device, pair) for pair in contractions(op)), start=0.0)
    overhead = device.op_overhead_s
    if family == "attention":
        return _matrix_time(device, op, 2.5 * _causal_share(op), "attention_backward") + overhead
    if family in ("matmul", "conv"):
        first = 1 if canonical_name(op.name) in ("addmm", "baddbmm", "addmv") else 0
        operands = grads[first : first + 2]
        once = _matrix_time(device, op, rates=f"{family}_backward") + overhead
        total: Number = sum(operands) * once
        bias = grads[:first] if first else grads[2:3]
        if any(bias):
            total = total + _memory_time(device, "reduction", op.outputs[0].bytes) + overhead
        return total
    nbytes = backward_bytes(op)
    if isinstance(nbytes, int) and nbytes == 0:
        return 0.0
    return _memory_time(device, f"{family}_backward", nbytes) + overhead * (_numbers(nbytes) > 0)


def accumulate_time(device: Device, nbytes: Any) -> Number:
    """Seconds to add one more gradient into a value that is used several times (or into .grad)."""
    return _memory_time(device, "pointwise", 3 * nbytes) + device.op_overhead_s


def copy_time(device: Device, nbytes: Any) -> Number:
    """Seconds to copy `nbytes` (read and written): packing around a collective, contiguous()."""
    return _memory_time(device, "copy", 2 * nbytes) + device.op_overhead_s


# Tensors read and written per element by one step of a fused optimizer.
OPTIMIZER_PASSES: Mapping[str, int] = {
    "adamw": 7,  # reads p, g, m, v; writes p, m, v
    "adam": 7,
    "sgd": 3,
    "sgd_momentum": 5,
    "adagrad": 5,
    "rmsprop": 5,
    "none": 0,
}


def optimizer_time(
    device: Device, local_numel: Any, dtype: torch.dtype = torch.float32, kind: str = "adamw"
) -> Number:
    """Seconds of one step of a fused optimizer on one parameter's `local_numel` elements.

    Memory traffic, and what a parameter costs whatever its size. An unknown `kind` is priced as
    adamw.
    """
    passes = OPTIMIZER_PASSES.get(kind.lower(), 7)
    if passes == 0:
        return _numbers(local_numel) * 0.0
    traffic = _memory_time(device, "adamw", passes * local_numel * dtype.itemsize)
    if _is_absent(device.optimizer_overhead_s):
        return traffic
    return traffic + device.optimizer_overhead_s
