"""Run a region of a program, and run it again in the backward (activation checkpointing)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from autopar.compat import TorchDispatchMode
from autopar.cost.families import op_family

Body = Callable[..., tuple[Any, ...]]

# Kernels beside those in the tables of families.
_ATTENTION = frozenset(
    {
        "_scaled_dot_product_cudnn_attention",
        "_efficient_attention_forward",
        "causal_rows",
    }
)


def run_region(
    body: Body, selective: bool, to_the_end: bool, is_random: bool, *inputs: Any
) -> tuple[Any, ...]:
    """`body(*inputs)`, whose saved tensors the backward makes anew from the inputs.

    A selective body takes a `Kept` first, which holds what is not computed again. With `to_the_end`
    the recomputation begins when the backward reaches the outputs and runs all of the body, else
    it begins when a saved tensor is wanted and stops with the last one. `is_random` says that
    the body draws from torch's generator.
    """
    kept = Kept() if selective else None
    first = () if kept is None else (kept,)
    if not torch.is_grad_enabled():
        return body(*first, *inputs)

    def run(*arguments: Any) -> tuple[Any, ...]:
        if kept is not None:
            kept.begin()
        outputs = body(*first, *arguments)
        return _wanting_the_end(outputs) if to_the_end else outputs

    outputs: tuple[Any, ...] = checkpoint(
        run,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=is_random,
        early_stop=not to_the_end,
    )
    return outputs


def _wanting_the_end(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The outputs behind one autograd node that unpacks a tensor saved after all others."""
    at = [i for i, y in enumerate(outputs) if isinstance(y, Tensor) and y.requires_grad]
    if not at:
        return outputs
    token = outputs[at[0]].new_empty(0)
    made = _End.apply(token, *(outputs[i] for i in at))  # type: ignore[no-untyped-call]
    found = list(outputs)
    for i, y in zip(at, made, strict=True):
        found[i] = y
    return tuple(found)


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(token)
        ctx.set_materialize_grads(False)
        return tuple(y.view_as(y) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # what the recomputation makes last
        return None, *gradients


class Kept:
    """What a selective region keeps, in order of execution: recorded once, then played back.

    Played back, a matrix product or attention still goes through autograd, which saves its inputs;
    only the kernel is skipped. A collective saves nothing, and is skipped altogether.
    """

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._replaying: bool | None = None
        self._at = 0

    def begin(self) -> None:
        """Start a run of the region: the first one records."""
        self._replaying = self._replaying is not None
        self._at = 0

    def matmul(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call whose products and convolutions are kept."""
        with _Kernels(self, ("matmul", "conv")):
            return function(*args, **kwargs)

    def attention(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call whose fused attention is kept; attention spelled out in products is not."""
        with _Kernels(self, ("attention",)):
            return function(*args, **kwargs)

    def unread(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A product that no saved tensor needs: played back, its elements are undefined."""
        with _Kernels(self, ("matmul", "conv"), keeps=False):
            return function(*args, **kwargs)

    def received(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """An exchange, or the `close` of one, whose outputs are kept."""
        return self._received(partial(function, **options), args, keeps=True)

    def received_unread(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """An exchange, or the `close` of one, whose outputs no saved tensor needs."""
        return self._received(partial(function, **options), args, keeps=False)

    def sent(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The `open` of an exchange that is not played back."""
        edges = len(args[3:])  # after the op, its specs and its group
        return (None,) * (edges + 1) if self._replaying else function(*args, **options)

    def _received(self, function: Callable[..., Any], args: tuple[Any, ...], keeps: bool) -> Any:
        if self._replaying:
            many, notes = self._next()
            leaves = tuple(_tensor(x).requires_grad_(grad) for x, grad in notes)
            return leaves if many else leaves[0]
        out = function(*args)
        outputs = out if isinstance(out, tuple) else (out,)
        note = _alias if keeps else _Blank.of
        self._entries.append(
            (isinstance(out, tuple), tuple((note(x), x.requires_grad) for x in outputs))
        )
        return out

    def kernel(self, call: Callable[[], Any], keeps: bool) -> Any:
        """The result of a kernel, below autograd."""
        if self._replaying:
            return tree_map_only((Tensor, _Blank), _tensor, self._next())
        out = call()
        # Not the tensors themselves, which autograd gives the history that holds this region.
        self._entries.append(tree_map_only(Tensor, _alias if keeps else _Blank.of, out))
        return out

    def _next(self) -> Any:
        self._at += 1
        return self._entries[self._at - 1]


def _alias(x: Tensor) -> Tensor:
    return x.detach()


@dataclass(frozen=True)
class _Blank:
    """Stands for a tensor that nobody will read."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> _Blank:
        return _Blank(x.shape, x.dtype, x.device)

    def tensor(self) -> Tensor:
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


def _tensor(kept: Tensor | _Blank) -> Tensor:
    return kept.detach() if isinstance(kept, Tensor) else kept.tensor()


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what the kernels of some families give."""

    def __init__(self, kept: Kept, families: tuple[str, ...], keeps: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept, self.families, self.keeps = kept, families, keeps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def call() -> Any:
            return func(*args, **(kwargs or {}))

        name = func._schema.name.split("::")[-1]
        family = "attention" if name in _ATTENTION else op_family(name)
        return self.kept.kernel(call, self.keeps) if family in self.families else call()
