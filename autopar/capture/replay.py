"""Run dynamo's graph node by node, with what ATen cannot express rewritten on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import autopar.ops  # noqa: F401 (registers torch.ops.autopar)
from autopar.errors import UserError

from .autocast import Autocast
from .autograd_function import AutogradFunctionOp, TracedFunctions
from .explain import source_of
from .symbols import NeedsStaticError


@dataclasses.dataclass
class State:
    """Where a replay is: gradient mode, autocast, activation-checkpointing region."""

    grad: bool
    autocast: list[Autocast]
    functions: TracedFunctions
    region: int | None = None
    regions: int = 0
    # Tensors made without gradients, by id, with what stands for them where gradients are on.
    without_grad: dict[int, tuple[Tensor, Tensor | None]] = dataclasses.field(default_factory=dict)


class Replay(torch.fx.Interpreter):
    """Interprets a dynamo graph inside the tracing modes of `trace.py`.

    Inlines activation checkpointing, keeps `autograd.Function`s whole, turns `no_grad` blocks into
    detach, hidden buffer writes into visible ones, and autocast into casts.
    """

    def __init__(self, module: torch.fx.GraphModule, state: State) -> None:
        super().__init__(module)
        self.state = state

    def run_node(self, n: torch.fx.Node) -> Any:
        custom = dict(n.meta.get("custom") or {})
        custom["autopar_region"] = self.state.region
        n.meta["custom"] = custom
        result = super().run_node(n)
        if n.op in ("call_function", "call_method") and not self.state.grad:
            self._made_without_grad(n, result)
        return result

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if self.state.grad:
            if not self.state.without_grad:
                return args, kwargs
            return pytree.tree_map_only(Tensor, self._with_grad, (args, kwargs))
        if n.op in ("call_function", "call_method") and _is_in_place(n):
            # Nothing detaches what is written later, when the written tensor is used.
            detach = torch.ops.aten.detach.default
            if "out" in kwargs:
                args = pytree.tree_map_only(Tensor, detach, args)
            else:
                args = (*args[:1], *pytree.tree_map_only(Tensor, detach, args[1:]))
        return args, kwargs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._higher_order(target, args, kwargs)
        special = _SPECIAL.get(target)
        if special is not None:
            return special(self, *args, **kwargs)
        return super().call_function(target, args, kwargs)

    def where(self) -> str | None:
        """The user's line of the node that is running."""
        meta = torch.fx.traceback.get_current_meta()
        return source_of(meta.get("stack_trace") or "") or None

    def nested(self, module: torch.fx.GraphModule, args: Sequence[Any]) -> Any:
        return Replay(module, self.state).run(*args, enable_io_processing=False)

    def _higher_order(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = target.name()
        if name == "tag_activation_checkpoint":
            return self._checkpoint(args[0], args[1:])
        if name in ("wrap", "invoke_subgraph", "wrap_activation_checkpoint"):
            rest = args[2:] if name == "invoke_subgraph" else args[1:]
            return self.nested(args[0], rest)
        if name == "autograd_function_apply":
            return self._autograd_function(args[0], args[1], args[2:], kwargs)
        raise UserError(
            f"forward uses torch's higher-order operator {name}, which autopar cannot shard",
            where=self.where(),
            fix="write it with ordinary operations (torch.where for cond, a Python loop for scan)",
        )

    def _checkpoint(self, body: torch.fx.GraphModule, args: Sequence[Any]) -> Any:
        outer = self.state.region
        if outer is None:  # a checkpoint inside another belongs to the outer one
            self.state.region = self.state.regions
            self.state.regions += 1
        try:
            return self.nested(body, args)
        finally:
            self.state.region = outer

    def _autograd_function(self, forward: Any, backward: Any, args: Any, options: Any) -> Any:
        if not all(isinstance(arg, Tensor) for arg in args):
            if any(isinstance(arg, (torch.SymInt, torch.SymFloat)) for arg in args):
                raise NeedsStaticError
            raise UserError(
                "an autograd.Function in forward takes something that is neither a tensor nor a "
                "constant",
                where=self.where(),
                fix="pass only tensors and Python constants to its apply()",
            )
        if options.get("dirty_idx"):
            raise UserError(
                "an autograd.Function in forward changes its input in place (ctx.mark_dirty)",
                where=self.where(),
                fix="return a new tensor from its forward",
            )
        name = f"autograd_function_{len(self.state.functions)}"
        function = AutogradFunctionOp(name, forward, backward, dict(options))
        return self.state.functions.trace(function, args)

    def _with_grad(self, tensor: Tensor) -> Tensor:
        """What stands for `tensor`, made in a `no_grad` block, outside of it."""
        entry = self.state.without_grad.get(id(tensor))
        if entry is None:
            return tensor
        original, detached = entry
        if detached is None:
            detached = torch.ops.aten.detach.default(original)
            self.state.without_grad[id(tensor)] = (original, detached)
        return detached

    def _made_without_grad(self, n: torch.fx.Node, result: Any) -> None:
        written = {id(self.env.get(arg)) for arg in n.all_input_nodes}
        for tensor in pytree.tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            if id(tensor) not in written:
                self.state.without_grad[id(tensor)] = (tensor, None)
        if _writes_into_grad(n):
            raise UserError(
                "forward changes a tensor that requires grad in place inside torch.no_grad()",
                where=source_of(n.meta.get("stack_trace") or "") or None,
                fix="write y = x.detach() ... out of place, or change it outside forward",
            )


def _is_in_place(n: torch.fx.Node) -> bool:
    if n.kwargs.get("out") is not None:
        return True
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("setitem", *_IN_PLACE)


def _writes_into_grad(n: torch.fx.Node) -> bool:
    """Whether `n` writes into a tensor that requires grad."""
    first = n.kwargs.get("out") or (n.args[0] if n.args else None)
    value = first.meta.get("example_value") if isinstance(first, torch.fx.Node) else None
    return _is_in_place(n) and isinstance(value, Tensor) and value.requires_grad


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor")


def _set_grad_enabled(replay: Replay, enabled: bool) -> None:
    replay.state.grad = enabled


def _enter_autocast(
    replay: Replay, device_type: str, dtype: torch.dtype | None, enabled: bool, cache: bool = True
) -> None:
    del cache
    chosen = (dtype or torch.get_autocast_dtype(device_type)) if enabled else None
    replay.state.autocast.append(Autocast(device_type, chosen))


def _exit_autocast(replay: Replay, mode: object) -> None:
    del mode
    replay.state.autocast.pop()


def _enter_inference_mode(replay: Replay, enabled: bool) -> bool:
    before = replay.state.grad
    replay.state.grad = before and not enabled
    return before


def _exit_inference_mode(replay: Replay, before: bool) -> None:
    replay.state.grad = before


def _batch_norm(
    replay: Replay,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, whose write to the running statistics no schema tells of."""
    y, new_mean, new_var = torch.ops.autopar.batch_norm.default(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    if training and running_mean is not None and running_var is not None:
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return y  # type: ignore[no-any-return]


def _aten_batch_norm(
    replay: Replay, input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool,
    momentum: float, eps: float, cudnn_enabled: bool = True,
) -> Tensor:  # fmt: skip
    del cudnn_enabled
    return _batch_norm(replay, input, mean, var, weight, bias, training, momentum, eps)


def _dropout(
    replay: Replay, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    out = F.dropout(input, p, training)
    return input.copy_(out) if inplace else out


def _dropout_(replay: Replay, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(replay, input, p, train, inplace=True)


def _structured_dropout(
    replay: Replay, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    if not training or p == 0:
        return input
    raise UserError(
        "forward drops whole features (dropout1d/2d/3d, alpha_dropout), which autopar cannot "
        "reproduce on several ranks yet",
        where=replay.where(),
        fix="use torch.nn.Dropout",
    )


def _instance_norm(
    replay: Replay, input: Tensor, running_mean: Any = None, running_var: Any = None,
    weight: Any = None, bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if running_mean is not None and use_input_stats:
        raise UserError(
            "forward uses instance normalisation with running statistics",
            where=replay.where(),
            fix="set track_running_stats=False",
        )
    return F.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _nothing(replay: Replay, *args: Any, **kwargs: Any) -> None:
    """For calls that only check, profile or choose kernels."""


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch._C._set_grad_enabled: _set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast: _enter_autocast,
    torch.amp.autocast_mode._exit_autocast: _exit_autocast,
    torch.autograd.grad_mode._enter_inference_mode: _enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode: _exit_inference_mode,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _aten_batch_norm,
    F.dropout: _dropout,
    torch.dropout_: _dropout_,
    F.dropout1d: _structured_dropout,
    F.dropout2d: _structured_dropout,
    F.dropout3d: _structured_dropout,
    F.alpha_dropout: _structured_dropout,
    F.feature_alpha_dropout: _structured_dropout,
    F.instance_norm: _instance_norm,
    torch._check: _nothing,
    torch._assert: _nothing,
    torch._assert_async: _nothing,
}
