"""Local rewrites while a graph is built: drop what does nothing, one spelling per operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from autopar import complex_ops
from autopar.ir.graph import Value, value_of

aten = torch.ops.aten

Node = torch.fx.Node
Call = tuple[Any, Any, Any, Any]  # target, args, kwargs, value


def simplify(target: Any, args: Any, kwargs: Any, value: Any) -> Node | Call | list[Node | Call]:
    """The node that this call equals, or the call to make in its place.

    A list stands for the outputs of an op that becomes one call per output.
    """
    rule = _RULES.get(target)
    kwargs = {name: arg for name, arg in kwargs.items() if name not in _PLACEMENT}
    call = (target, args, kwargs, value)
    return call if rule is None else rule(call)


def _same_as_input(call: Call) -> Node | Call:
    """Copies, aliases and layouts: nothing in a functional graph."""
    _, args, _, value = call
    return args[0] if _same(args[0], value) else call


def _detach(call: Call) -> Node | Call:
    source: Node = call[1][0]
    return call if value_of(source).requires_grad else source


def _to_copy(call: Call) -> Node | Call:
    _, args, kwargs, value = call
    if _same(args[0], value):
        return args[0]  # type: ignore[no-any-return]
    return aten._to_copy.default, args, {"dtype": kwargs["dtype"]}, value


def _view(call: Call) -> Node | Call:
    _, args, _, value = call
    if _same(args[0], value):
        return args[0]  # type: ignore[no-any-return]
    return aten.reshape.default, (args[0], list(value.shape)), {}, value


def _expand(call: Call) -> Node | Call:
    _, args, _, value = call
    if _same(args[0], value):
        return args[0]  # type: ignore[no-any-return]
    return aten.expand.default, (args[0], list(value.shape)), {}, value


def _dropout(call: Call) -> Node | Call:
    _, args, _, _ = call
    source, p, train = args
    return call if train and p != 0 else source


def _copy(call: Call) -> Node | Call:
    """`copy(written, source)` is `source`, in the dtype and shape of `written`."""
    _, args, _, value = call
    source: Node = args[1]
    came = value_of(source)
    value = dataclasses.replace(value, requires_grad=came.requires_grad)
    if came.dtype != value.dtype and came.shape == value.shape:
        return aten._to_copy.default, (source,), {"dtype": value.dtype}, value
    if came.dtype == value.dtype:
        return _expand((aten.expand.default, (source,), {}, value))
    return call


def _fill(call: Call) -> Call:
    """Filling with a constant needs no constant tensor."""
    _, args, _, value = call
    tensor = args[1].meta.get("tensor") if isinstance(args[1], Node) else None
    if tensor is None or tensor.numel() != 1:
        return call
    value = dataclasses.replace(value, requires_grad=False)
    return aten.full_like.default, (args[0], tensor.item()), {}, value


def _slice_scatter(call: Call) -> Node | Call:
    _, args, _, value = call
    source: Node = args[1]
    return source if value_of(source).shape == value.shape else _put(call)


def _put(call: Call) -> Call:
    """A write into a part of a tensor, with a derivative for complex ones."""
    target, args, kwargs, value = call
    complex_op = _FOR_COMPLEX[target] if value.dtype.is_complex else target
    return complex_op, args, kwargs, value


def _broadcast_tensors(call: Call) -> list[Node | Call]:
    _, args, _, values = call
    return [
        _expand((aten.expand.default, (source,), {}, dataclasses.replace(
            value, requires_grad=value_of(source).requires_grad
        )))
        for source, value in zip(args[0], values, strict=True)
    ]  # fmt: skip


def _neutral(element: float) -> Callable[[Call], Node | Call]:
    """Adding 0, multiplying by 1."""

    def rule(call: Call) -> Node | Call:
        _, args, kwargs, value = call
        neutral = isinstance(args[1], (int, float)) and args[1] == element
        if neutral and isinstance(args[0], Node) and not kwargs and _same(args[0], value):
            return args[0]
        return call

    return rule


def _same(source: Node, value: Value) -> bool:
    came = value_of(source)
    return came.shape == value.shape and came.dtype == value.dtype


# Nothing to the values. A rank has one device, which its executor knows.
_PLACEMENT = ("device", "pin_memory", "layout", "memory_format", "non_blocking")

_FOR_COMPLEX: dict[Any, Any] = {
    aten.slice_scatter.default: complex_ops.slice_scatter.default,
    aten.select_scatter.default: complex_ops.select_scatter.default,
}

_RULES: dict[Any, Callable[[Call], Any]] = {
    aten.add.Tensor: _neutral(0),
    aten.sub.Tensor: _neutral(0),
    aten.mul.Tensor: _neutral(1),
    aten.div.Tensor: _neutral(1),
    aten.clone.default: _same_as_input,
    aten.contiguous.default: _same_as_input,
    aten.alias.default: _same_as_input,
    aten.lift_fresh.default: _same_as_input,
    aten.lift_fresh_copy.default: _same_as_input,
    aten.slice.Tensor: _same_as_input,
    aten.detach.default: _detach,
    aten._to_copy.default: _to_copy,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.expand.default: _expand,
    aten.dropout.default: _dropout,
    aten.copy.default: _copy,
    aten.fill.Tensor: _fill,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _put,
    aten.broadcast_tensors.default: _broadcast_tensors,
}
