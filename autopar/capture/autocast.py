"""Make the casts that `torch.autocast` does inside the dispatcher visible in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar import compat

# Which ops run in the lower precision is the same on every device; what else autocast knows runs
# in float32, or in the widest dtype of its inputs. Source: torch 2.13, ATen/autocast_mode.h
# fmt: off
_LOWER = (
    "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "convolution", "_convolution", "prelu", "addmm", "addmv", "addr", "matmul",
    "einsum", "mm", "mv", "linalg_vecdot", "linear", "bmm", "addbmm", "baddbmm", "chain_matmul",
    "linalg_multi_dot", "_addmm_activation", "scaled_dot_product_attention",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "mkldnn_rnn_layer", "_native_multi_head_attention",
)
_WIDEST_ON_GPU = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put",
    "scatter_add", "tensordot", "vdot", "stack", "cat", "index_copy",
)
_WIDEST_ON_CPU = ("stack", "cat", "index_copy")
# fmt: on


@dataclasses.dataclass(frozen=True)
class Autocast:
    """An autocast setting: `dtype` is None where it is switched off."""

    device_type: str
    dtype: torch.dtype | None

    def applies(self, op: Any) -> bool:
        return self.dtype is not None and compat.has_autocast_kernel(op, self.device_type)

    def cast(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of `op` as autocast would give them to it."""
        name = op._schema.name.split("::")[1]
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if self._eligible(x)]
        if name in _LOWER:
            target = self.dtype
        elif name in (_WIDEST_ON_CPU if self.device_type == "cpu" else _WIDEST_ON_GPU):
            wide = any(x.dtype == torch.float32 for x in tensors)
            target = torch.float32 if wide else self.dtype
        else:
            target = torch.float32

        def cast_one(x: Any) -> Any:
            if not self._eligible(x) or x.dtype == target:
                return x
            return torch.ops.aten._to_copy.default(x, dtype=target)

        mapped: tuple[Any, Any] = pytree.tree_map(cast_one, (args, kwargs))
        return mapped

    def _eligible(self, x: object) -> bool:
        return (
            isinstance(x, Tensor)
            and x.is_floating_point()
            and x.dtype != torch.float64
            and x.device.type in (self.device_type, "meta")
        )


def ambient_autocast(device_type: str) -> Autocast:
    """The autocast setting around the caller."""
    enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return Autocast(device_type, torch.get_autocast_dtype(device_type) if enabled else None)


def functional_mode(current: Callable[[], Autocast]) -> Any:
    """A mode that makes ops functional, after the casts of the autocast setting `current()`."""

    class Mode(compat.functional_mode()):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            autocast = current()
            if autocast.applies(func):
                with self:  # so that the casts are traced too
                    args, kwargs = autocast.cast(func, args, kwargs)
            return super().__torch_dispatch__(func, types, args, kwargs)

    return Mode(pre_dispatch=True, export=True)
