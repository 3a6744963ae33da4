"""Causal attention on any run of query rows is those rows of torch's causal attention."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.runtime.attention import causal_attention


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def rows_of(q: Tensor, k: Tensor, v: Tensor, cuts: list[int], gqa: bool) -> Tensor:
    pairs = itertools.pairwise((0, *cuts, q.shape[-2]))
    return torch.cat(
        [causal_attention(q[..., a:b, :], k, v, a, None, gqa) for a, b in pairs], dim=-2
    )


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("rows", "keys", "width"),
    [(7, 7, 6), (7, 9, 6), (9, 7, 6), (7, 7, 5)],
    ids=["square", "more keys", "more rows", "no fused kernel"],
)
def test_rows(rows: int, keys: int, width: int, grouped: bool) -> None:
    torch.manual_seed(0)
    heads = 2 if grouped else 4
    q, k, v = random(2, 4, rows, 6), random(2, heads, keys, 6), random(2, heads, keys, width)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    got = rows_of(q, k, v, [3, 6], grouped)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), seed)
    found = torch.autograd.grad(got, (q, k, v), seed)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (random(1, 2, 16, 8, dtype=dtype).detach() for _ in range(3))
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    ).to(dtype)
    got = rows_of(q, k, v, [5, 12], False)
    assert (got - expected).abs().max() <= 4 * torch.finfo(dtype).eps


def test_no_scores_are_kept() -> None:
    """Autograd keeps the operands, the output and a number per row, and no mask."""
    q, k, v = random(1, 2, 8, 4), random(1, 2, 32, 4), random(1, 2, 32, 4)
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        causal_attention(q, k, v, 16)
    assert sorted(kept) == sorted([q.numel(), k.numel(), v.numel(), q.numel(), 2 * 8])
