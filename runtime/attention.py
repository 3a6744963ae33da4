"""Causal attention of a run of query rows that need not begin at the first one.

What splits the sequence among ranks (context parallelism, Llama 3, arXiv:2407.21783 section 3.3.2):
a rank has some rows of the queries, all keys and values, and must know where its rows lie.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

_make_library: Any = torch.library.Library  # untyped
_library = _make_library("autopar", "FRAGMENT")  # owns the registrations; must stay alive
_library.define(
    "causal_rows(Tensor query, Tensor key, Tensor value, int start, float? scale) "
    "-> (Tensor, Tensor)"
)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Rows `[start, start + s)` of `F.scaled_dot_product_attention(..., is_causal=True)`.

    `query` is (..., s, e), `key` (..., t, e) and `value` (..., t, f), all keys. Row i sees the keys
    `[0, start + i]`. No mask is made as long as there are as many keys as rows up to the last one
    here; keys beyond that row are not read.
    """
    rows, keys = query.shape[-2], key.shape[-2]
    if start + rows > keys:
        mask = query.new_ones((rows, keys), dtype=torch.bool).tril_(start)
        return _sdpa(query, key, value, mask, scale, enable_gqa)
    if _takes_flash(query, key, value, enable_gqa):
        y: Tensor = _CausalRows.apply(  # type: ignore[no-untyped-call]
            query, key, value, start, scale
        )
        return y
    seen_keys, seen_values = key[..., : start + rows, :], value[..., : start + rows, :]
    bias = causal_lower_right(rows, start + rows)
    return _sdpa(query, seen_keys, seen_values, bias, scale, enable_gqa)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, enable_gqa: bool
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    )


def _takes_flash(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether torch's fused CPU kernel takes these shapes, as in ATen's `sdp_utils_cpp.cpp`."""
    if query.device.type != "cpu" or {query.dim(), key.dim()} != {4} or not query.numel():
        return False
    heads = query.shape[1]
    return (
        key.shape == value.shape
        and key.shape[0] == query.shape[0]
        and key.shape[3] == query.shape[3]
        and (key.shape[1] == heads or (enable_gqa and heads % key.shape[1] == 0))
        and all(x.stride(-1) == 1 for x in (query, key, value))
    )


def _causal_rows(
    query: Tensor, key: Tensor, value: Tensor, start: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp. One op, so that selective recomputation keeps them and no parts."""
    before, triangle = _parts(query, key, value, start)
    out, log_sum = _flash(query, *triangle, 0.0, True, scale=scale)
    if not start:
        return out, log_sum
    other, other_log = _flash(query, *before, 0.0, False, scale=scale)
    total = torch.logaddexp(log_sum, other_log)
    share = (other_log - total).exp_().unsqueeze(-1)
    merged = torch.lerp(out.to(total.dtype), other.to(total.dtype), share)
    return merged.to(out.dtype), total


_library.impl("causal_rows", _causal_rows, "CPU")


class _CausalRows(torch.autograd.Function):
    """The keys before the rows in one fused call, the triangle in another, put together.

    With the log-sum-exp L of both, the softmax of either part is `exp(scores - L)`: the fused
    backward makes each part's gradients when it is given L and the whole output, as in ring
    attention (arXiv:2310.01889). CPU only: torch's kernel for CUDA has a causal mask that is
    aligned to the last key.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, start: int, scale: float | None
    ) -> Tensor:
        ctx.start, ctx.scale = start, scale
        out: Tensor
        out, log_sum = torch.ops.autopar.causal_rows(query, key, value, start, scale)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum = ctx.saved_tensors
        start, rows = ctx.start, query.shape[-2]
        before, triangle = _parts(query, key, value, start)

        def gradients(part: tuple[Tensor, Tensor], is_causal: bool) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = _flash_backward(
                grad, query, *part, out, log_sum, 0.0, is_causal, scale=ctx.scale
            )
            return found

        dq, dk, dv = gradients(triangle, True)
        dkey, dvalue = key.new_zeros(key.shape), value.new_zeros(value.shape)
        dkey[..., start : start + rows, :] = dk
        dvalue[..., start : start + rows, :] = dv
        if start:
            dq2, dk, dv = gradients(before, False)
            dq = dq.add_(dq2)
            dkey[..., :start, :] = dk
            dvalue[..., :start, :] = dv
        return dq, dkey, dvalue, None, None


def _parts(
    query: Tensor, key: Tensor, value: Tensor, start: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keys and values before the rows, and those at the rows."""
    end = start + query.shape[-2]
    before = (key[..., :start, :], value[..., :start, :])
    return before, (key[..., start:end, :], value[..., start:end, :])
