"""Time of one op on one device, from its local shapes: a roofline per op family.

Flops and bytes are plain arithmetic on shapes, so a size may be an int, a numpy array (one entry
per candidate) or a sympy expression. Times need numbers: int or arrays. Units: flops count a
multiply-add as 2, bytes are those read plus those written, times are seconds.

An op is its local call as a `LocalOp`. Matrix work takes
`max(w / rate(w), bytes / bandwidth["matmul"](bytes))` with `w = flops / narrow(min(m, n, k))`,
everything else `bytes / bandwidth[family](bytes)`; both plus the device's op overhead. Views are
free.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.fx

from autopar.ir.graph import tensor_inputs, values_of

from .cluster import Device
from .curve import Number
from .families import canonical_name, op_family, op_name

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class TensorSpec:
    """Local shape (ints, arrays of candidates, or sympy) and dtype of one tensor."""

    shape: Shape
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> Any:
        return numel(self.shape)

    @property
    def bytes(self) -> Any:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class LocalOp:
    """One rank's call of an op. `grads[i]`: whether the gradient of input i is wanted.

    `info` holds what shapes do not say: `equation` (einsum), `transposed` (convolution), `p` and
    `training` (dropout), `causal` and the global number of `rows` (attention).
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    grads: tuple[bool, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the op computes in: that of the first floating input, else of the output."""
        for spec in (*self.inputs, *self.outputs):
            if spec.dtype.is_floating_point:
                return spec.dtype
        return torch.float32


def numel(shape: Sequence[Any]) -> Any:
    """Number of elements; 1 for a scalar."""
    return reduce(operator.mul, shape, 1)


def local_op(
    node: torch.fx.Node,
    in_shapes: Sequence[Shape] | None = None,
    out_shapes: Sequence[Shape] | None = None,
) -> LocalOp:
    """The op of a graph node, with its local shapes (default: the global ones).

    `in_shapes` go with `ir.graph.tensor_inputs(node)`, `out_shapes` with `values_of(node)`.
    """
    values = [value for source in tensor_inputs(node) for value in values_of(source)[:1]]
    outs = values_of(node)
    shapes = in_shapes if in_shapes is not None else [v.shape for v in values]
    made = out_shapes if out_shapes is not None else [v.shape for v in outs]
    return LocalOp(
        op_name(node.target),
        tuple(TensorSpec(tuple(s), v.dtype) for s, v in zip(shapes, values, strict=True)),
        tuple(TensorSpec(tuple(s), v.dtype) for s, v in zip(made, outs, strict=True)),
        tuple(v.requires_grad for v in values),
        node_info(node),
    )


def node_info(node: torch.fx.Node) -> dict[str, Any]:
    """What a `LocalOp` needs of a node beyond shapes: see `LocalOp.info`."""
    name = op_name(node.target)
    named = dict(node.kwargs)
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        named.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    elif name == "dropout":
        named.update(zip(("input", "p"), node.args, strict=False))
    info: dict[str, Any] = {}
    if name == "einsum":
        info["equation"] = named.get("equation", node.args[0])
    for key in ("transposed", "training", "p", "dropout_p"):
        if isinstance(named.get(key), (bool, int, float)):
            info[key] = named[key]
    if "train" in named:
        info["training"] = named["train"]
    if isinstance(named.get("is_causal"), bool):
        info["causal"] = named["is_causal"]
        info["rows"] = values_of(node)[0].shape[-2]
    return info


def is_noop(op: LocalOp) -> bool:
    """Dropout that drops nothing."""
    name = canonical_name(op.name)
    return name in ("dropout", "feature_dropout", "alpha_dropout") and (
        op.info.get("training", True) is False or op.info.get("p", 0.5) == 0
    )


# ---------------------------------------------------------------------------------------------
# Flops


def einsum_sizes(equation: str, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Size of every letter of an einsum; the dims of `...` get digits."""
    left = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, Any] = {}
    for term, shape in zip(left, shapes, strict=False):
        head, dots, tail = term.partition("...")
        spare = len(shape) - len(head) - len(tail)
        letters = [*head, *(str(i) for i in range(spare) if dots), *tail]
        sizes.update(zip(letters, shape, strict=False))
    return sizes


def matmul_dims(op: LocalOp) -> tuple[Any, Any, Any, Any]:
    """(batch, m, n, k) of a matmul-like op; attention as q·kᵀ, einsum as a sum over letters."""
    name = canonical_name(op.name)
    if name == "einsum":
        return _einsum_dims(op)
    if name == "scaled_dot_product_attention":
        q, k = op.inputs[0].shape, op.inputs[1].shape
        return numel(q[:-2]), q[-2], k[-2], q[-1]
    first = 1 if name in ("addmm", "baddbmm", "addmv") else 0
    a, b = op.inputs[first].shape, op.inputs[first + 1].shape
    if name == "linear":
        return 1, numel(a[:-1]), (b[0] if len(b) == 2 else 1), a[-1]
    if len(b) == 1:
        return 1, numel(a[:-1]), 1, a[-1]
    if len(b) == 2:
        return 1, numel(a[:-1]), b[-1], a[-1]
    m = a[-2] if len(a) > 1 else 1
    return numel(op.outputs[0].shape[:-2]) if len(a) > 1 else numel(b[:-2]), m, b[-1], a[-1]


def _einsum_dims(op: LocalOp) -> tuple[Any, Any, Any, Any]:
    equation = str(op.info["equation"]).replace(" ", "")
    sizes = einsum_sizes(equation, [spec.shape for spec in op.inputs])
    if len(op.inputs) != 2:
        return 1, numel(list(sizes.values())), 1, 1
    left, _, out = equation.partition("->")
    terms = [
        set(term.replace("...", "")) | {s for s in sizes if s.isdigit() and "..." in term}
        for term in left.split(",")
    ]
    kept = set(out.replace("...", "")) | {s for s in sizes if s.isdigit() and "..." in out}

    def size(letters: set[str]) -> Any:
        return numel([sizes[letter] for letter in sorted(letters)])

    both = terms[0] & terms[1]
    return (
        size(both & kept),
        size(terms[0] - terms[1]),
        size(terms[1] - terms[0]),
        size(both - kept),
    )


def op_flops(op: LocalOp) -> Any:
    """Flops of the forward; 0 for what is not matrix work (its time is in bytes)."""
    family = op_family(op.name)
    if family == "matmul":
        batch, m, n, k = matmul_dims(op)
        return 2 * batch * m * n * k
    if family == "attention":
        batch, m, n, k = matmul_dims(op)
        return 2 * batch * m * n * (k + op.inputs[2].shape[-1])
    if family == "conv":
        weight = op.inputs[1].shape
        transposed = op.info.get("transposed") or op.name.startswith("conv_transpose")
        pixels = op.inputs[0].numel if transposed else op.outputs[0].numel
        return 2 * pixels * numel(weight[1:])
    return 0


# ---------------------------------------------------------------------------------------------
# Bytes


def _total(specs: Sequence[TensorSpec]) -> Any:
    return sum((spec.bytes for spec in specs), start=0)


def op_bytes(op: LocalOp) -> Any:
    """Bytes read and written by the forward; 0 for views."""
    family = op_family(op.name)
    outs = _total(op.outputs)
    if family == "view" or is_noop(op):
        return 0
    if family in ("embedding", "gather"):
        ids = _total([spec for spec in op.inputs if not spec.dtype.is_floating_point])
        return ids + 2 * outs
    if family == "scatter":
        return 2 * outs + 2 * _total(op.inputs[1:])
    if family == "create":
        return outs
    name = canonical_name(op.name)
    if name == "cross_entropy":  # log-probabilities are written, then read at the targets
        return 2 * op.inputs[0].bytes
    if name == "nll_loss":
        return 2 * _total(op.inputs[1:])
    if family == "dropout":
        return _total(op.inputs) + outs + op.outputs[0].numel  # the mask: one byte each
    return _total(op.inputs) + outs


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
        return _view_backward_bytes(name, op.inputs[0].bytes, _total(op.outputs))
    if family == "embedding":  # a dense gradient of the whole local table, then the rows added
        return op.inputs[0].bytes + 3 * out
    if family == "gather":
        return op.inputs[0].bytes + 3 * out
    if family == "scatter":
        return 2 * out + 2 * _total(wanted[1:])
    if name in _ADDITIVE:
        return _broadcast_bytes(wanted, out) + (2 * out if name == "neg" else 0)
    if name in _NO_GRADIENT_WORK:
        return 0
    if family == "copy":
        return out + _total(wanted)
    if name == "cross_entropy":
        return 2 * op.inputs[0].bytes
    if name == "nll_loss":
        return op.inputs[0].bytes
    if family == "dropout":
        return 2 * out + op.outputs[0].numel
    if family in ("norm", "batch_norm"):
        return 3 * op.inputs[0].bytes
    if family in ("reduction", "pool", "sort"):
        return out + _total(wanted)
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


def differentiable(op: LocalOp) -> tuple[bool, ...]:
    """Which inputs want gradients; by default every floating one."""
    if op.grads:
        return tuple(
            wanted and spec.dtype.is_floating_point
            for wanted, spec in zip(op.grads, op.inputs, strict=True)
        )
    return tuple(spec.dtype.is_floating_point for spec in op.inputs)


# ---------------------------------------------------------------------------------------------
# Times


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
    nbytes = _numbers(_total(op.inputs) + _total(op.outputs))
    if family == "matmul":  # as much work as a product that is not narrow and takes as long
        _, m, n, k = matmul_dims(op)
        smallest = np.minimum(np.minimum(m, n), k)
        flops = flops / device.narrow(
            smallest.astype(np.float64) if isinstance(smallest, np.ndarray) else float(smallest)
        )
    rate = device.rate_curve(dtype_name(op.dtype), rates or family)(flops)
    return np.maximum(flops / rate, nbytes / device.bandwidth_curve("matmul")(nbytes))


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
    """Seconds of one step of a fused optimizer on `local_numel` elements: all memory traffic.

    An unknown `kind` is priced as adamw.
    """
    passes = OPTIMIZER_PASSES.get(kind.lower(), 7)
    if passes == 0:
        return _numbers(local_numel) * 0.0
    return _memory_time(device, "adamw", passes * local_numel * dtype.itemsize)
