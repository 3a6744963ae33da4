"""Partition-invariant dropout in one process: the masks that any parallel plan would use.

`PartitionInvariantDropout` intercepts dropout while an ordinary module runs eagerly and numbers the
calls, so that the k-th random call of a forward here is the k-th of the captured graph. Random
calls are those with training on and p > 0, in the order in which they run.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import types
import warnings
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autopar.ir.lowered import Region

from .random import threshold, whole
from .sharded_ops import dropout


def sdpa_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    seed: int | Tensor = 0,
    call: int = 0,
    region: Region | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention` with our dropout on the attention probabilities.

    `region` says where the local probabilities [..., L, S] lie in the global ones; None if they are
    all here. Rows that attend to nothing give zeros, as in torch.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-2, -1)) * scale
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attention: is_causal and attn_mask exclude each other")
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        probabilities = scores.softmax(-1)
    else:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
        probabilities = torch.ops.aten._safe_softmax(scores, -1)
    if dropout_p > 0.0:
        where = whole(tuple(probabilities.shape)) if region is None else region
        probabilities = dropout(probabilities, dropout_p, seed, call, where)
    return probabilities @ value


class PartitionInvariantDropout(TorchFunctionMode):
    """Replace dropout inside the `with` block; `calls` counts the random calls so far.

    Enter one per forward. Activation checkpoints that are made inside recompute with the same
    masks, after the block has ended too. Dropouts of other kinds (feature and alpha dropout, those
    inside recurrent layers) stay torch's own, with a warning. In place of the seed there may be a
    table of keys by call (`autopar.runtime.random_keys`).
    """

    def __init__(self, seed: int | Tensor, first_call: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.calls = first_call
        self._first_call = first_call
        self._tokens: list[Any] = []

    def __enter__(self) -> PartitionInvariantDropout:
        _install_checkpoint_hooks()
        self.calls = self._first_call
        self._tokens.append(_ACTIVE.set(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _ACTIVE.reset(self._tokens.pop())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def next_call(self) -> int:
        self.calls += 1
        return self.calls - 1

    def drop(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """`F.dropout` as this mode computes it."""
        threshold(p)
        if not training or p == 0.0:
            return input
        y = dropout(input, p, self.seed, self.next_call(), whole(tuple(input.shape)))
        return input.copy_(y) if inplace else y

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """`F.scaled_dot_product_attention` as this mode computes it."""
        bound = SDPA.bind(*args, **kwargs)
        if not bound.arguments.get("dropout_p", 0.0):
            return F.scaled_dot_product_attention(*args, **kwargs)
        threshold(bound.arguments["dropout_p"])
        return sdpa_with_dropout(**bound.arguments, seed=self.seed, call=self.next_call())


# The mode whose block this thread is in.
_ACTIVE: ContextVar[PartitionInvariantDropout | None] = ContextVar("dropout_mode", default=None)


def within_a_forward() -> bool:
    """Whether this thread is in the block of a `PartitionInvariantDropout`."""
    return _ACTIVE.get() is not None


def _sdpa_signature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """What `F.scaled_dot_product_attention` accepts (it is a builtin and cannot be asked)."""


SDPA = inspect.signature(_sdpa_signature)


def _dropout(mode: PartitionInvariantDropout, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return mode.drop(*args, **kwargs)


def _torch_dropout(
    mode: PartitionInvariantDropout, func: Any, input: Tensor, p: float, train: bool
) -> Tensor:
    return mode.drop(input, p, train, inplace=func is torch.dropout_)


def _attention(mode: PartitionInvariantDropout, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return mode.attend(*args, **kwargs)


def multi_head_attention(
    mode: PartitionInvariantDropout, func: Any, *args: Any, **kwargs: Any
) -> Any:
    """Run torch's Python function with this mode's dropout in place of the names that it calls.

    Inside a handler the mode is off, and entering it again would come straight back here.
    """
    inner = types.FunctionType(
        func.__code__,
        {
            **func.__globals__,
            "dropout": mode.drop,
            "scaled_dot_product_attention": mode.attend,
            "has_torch_function": lambda tensors: False,
        },
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner(*args, **kwargs)


def _stays_native(mode: PartitionInvariantDropout, func: Any, *args: Any, **kwargs: Any) -> Any:
    warn_native(func, args, kwargs)
    return func(*args, **kwargs)


def warn_native(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Warn if a call is one whose masks depend on the plan."""
    if _HANDLERS.get(func) is _stays_native and _is_random(func, args, kwargs):
        warnings.warn(
            f"{func.__name__} draws from torch's generator, so its masks depend on the plan; "
            "use torch.nn.Dropout for masks that do not",
            stacklevel=4,
        )


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a feature or alpha dropout, or a recurrent layer, drops anything in this call."""
    if func in _RECURRENT:  # (..., has_biases, num_layers, dropout, train, bidirectional, ...)
        return any(
            isinstance(dropped, float) and dropped > 0.0 and train is True
            for dropped, train in itertools.pairwise(args)
        )
    default = not func.__name__.endswith("alpha_dropout") or func.__name__.startswith("feature")
    if func is F.feature_alpha_dropout:
        default = False
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", default))
    return bool(training) and p > 0.0


_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)

_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    torch.dropout_: _torch_dropout,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: multi_head_attention,
    **dict.fromkeys(
        (
            F.dropout1d,
            F.dropout2d,
            F.dropout3d,
            F.alpha_dropout,
            F.feature_alpha_dropout,
            torch.alpha_dropout,
            torch.alpha_dropout_,
            torch.feature_dropout,
            torch.feature_dropout_,
            torch.feature_alpha_dropout,
            torch.feature_alpha_dropout_,
            *_RECURRENT,
        ),
        _stays_native,
    ),
}


# --- Activation checkpoints -------------------------------------------------------------------
#
# `torch.utils.checkpoint.checkpoint` is imported by name everywhere, but it looks up the two
# functions that do the work in its module at each call. Both get the function to recompute first.


def _replaying(function: Callable[..., Any], runs_forward: bool) -> Callable[..., Any]:
    """`function`, numbering its random calls from now on in the same way whenever it runs.

    `runs_forward` says whether its first run is the forward itself, which counts in the mode that
    is active.
    """
    mode = _ACTIVE.get()
    if mode is None:
        return function
    seed, first_call = mode.seed, mode.calls
    is_forward = runs_forward

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_forward
        if is_forward:
            is_forward = False
            return function(*args, **kwargs)
        with PartitionInvariantDropout(seed, first_call):
            return function(*args, **kwargs)

    return run


_INSTALLING = threading.Lock()


def _install_checkpoint_hooks() -> None:
    """Make checkpoints remember the mode they are made in; without effect outside of any mode."""
    module: Any = torch.utils.checkpoint
    with _INSTALLING:
        if getattr(module, "_autopar_replays", False):
            return
        apply = module.CheckpointFunction.apply
        generator = module._checkpoint_without_reentrant_generator

        def apply_replaying(function: Callable[..., Any], *args: Any) -> Any:
            return apply(_replaying(function, runs_forward=True), *args)

        def generator_replaying(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return generator(_replaying(function, runs_forward=False), *args, **kwargs)

        module.CheckpointFunction.apply = staticmethod(apply_replaying)
        module._checkpoint_without_reentrant_generator = generator_replaying
        module._autopar_replays = True
