"""One rank's call of an op, as prices need it: local shapes, dtypes, wanted gradients.

A size may be an int, a numpy array (one entry per candidate) or a sympy expression.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import tensor_inputs, values_of

from .families import canonical_name, op_name

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


def differentiable(op: LocalOp) -> tuple[bool, ...]:
    """Which inputs want gradients; by default every floating one."""
    if op.grads:
        return tuple(
            wanted and spec.dtype.is_floating_point
            for wanted, spec in zip(op.grads, op.inputs, strict=True)
        )
    return tuple(spec.dtype.is_floating_point for spec in op.inputs)
