"""Gradients of weights later than those of inputs: what zero-bubble schedules fill bubbles with.

While `deferring(queue)` is entered, matrix products with a leaf weight go through an autograd
Function whose backward makes the gradient of the input at once, and puts that of the weight into
the queue. The collectives of a backward stay where they are: nothing is traversed twice, and every
rank of a stage issues them in the order of its program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Queue = list[Callable[[], None]]
Add = Callable[[Tensor, Tensor], None]  # a gradient to that of a leaf

_aten = torch.ops.aten


def add_to_leaf(leaf: Tensor, gradient: Tensor) -> None:
    """Add to the gradient of a leaf, as autograd does."""
    if leaf.grad is None:
        leaf.grad = gradient
    else:
        leaf.grad.add_(gradient)


@contextmanager
def deferring(queue: Queue, add: Add = add_to_leaf) -> Iterator[None]:
    """Put what makes gradients of leaf weights of products in here into `queue` in the backward.

    `add` is called with a weight and its gradient when that is made.
    """
    with _Deferring(queue, add):
        yield


def drain(queue: Queue) -> None:
    """Make the gradients in the queue, in order, and let go of what they are made of.

    The graph holds the queue: what stayed in it would hold the graph for ever.
    """
    queue.reverse()
    while queue:
        queue.pop()()


class _Deferring(TorchFunctionMode):
    def __init__(self, queue: Queue, add: Add) -> None:
        super().__init__()
        self.queue, self.add = queue, add

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        product = _PRODUCTS.get(func)
        if product is not None and torch.is_grad_enabled():
            found = product(*args, **(kwargs or {}))
            if found is not None:
                return _Product.apply(self.queue, self.add, *found)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _is_leaf(weight: Any) -> bool:
    return (
        isinstance(weight, Tensor) and weight.requires_grad and weight.is_leaf and weight.dim() == 2
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...] | None:
    return (x, weight, bias, True) if _is_leaf(weight) else None


def _mm(x: Tensor, weight: Tensor) -> tuple[Any, ...] | None:
    return (x, weight, None, False) if _is_leaf(weight) and x.dim() > 1 else None


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, **factors: Any) -> tuple[Any, ...] | None:
    plain = all(f == 1 for f in factors.values()) and bias.dim() == 1
    return (x, weight, bias, False) if plain and _is_leaf(weight) else None


# (x, weight, bias, whether the weight is [out, in]) of a call, or None where it is left alone.
_PRODUCTS: Mapping[Any, Callable[..., tuple[Any, ...] | None]] = {
    _aten.linear.default: _linear,
    torch.nn.functional.linear: _linear,
    _aten.mm.default: _mm,
    _aten.matmul.default: _mm,
    _aten.addmm.default: _addmm,
}


class _Product(torch.autograd.Function):
    """`x @ weight` (or its transpose) plus `bias`, the weight's gradient deferred."""

    @staticmethod
    def forward(
        ctx: Any,
        queue: Queue,
        add: Add,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        ctx.queue, ctx.add, ctx.weight, ctx.transposed = queue, add, weight, transposed
        ctx.save_for_backward(x)
        if transposed:
            return torch.nn.functional.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x = ctx.saved_tensors[0].detach()  # without its graph, which holds the queue
        weight: Tensor = ctx.weight
        _, _, of_x, _, of_bias, _ = ctx.needs_input_grad
        transposed: bool = ctx.transposed
        add: Add = ctx.add

        @torch.no_grad()
        def make() -> None:
            rows, given = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            add(weight, given.t() @ rows if transposed else rows.t() @ given)

        ctx.queue.append(make)
        dx = (gradient @ weight if transposed else gradient @ weight.t()) if of_x else None
        db = gradient.reshape(-1, gradient.shape[-1]).sum(0) if of_bias else None
        return None, None, dx, None, db, None
