"""Ops on shards, in simulated ranks, against torch's own op on the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ir.lowered import ShardSpec
from autopar.runtime.collectives import apply
from autopar.runtime.sharded_ops import batch_norm, masked_embedding
from autopar.runtime.thread_world import ThreadWorld, run_threads


def close_to(got: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


# --- Embedding --------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [-1, 0, 4])
@pytest.mark.parametrize("lengths", [(4, 4, 2), (5, 5, 0), (10,)])
def test_masked_embedding(lengths: tuple[int, ...], padding_idx: int) -> None:
    torch.manual_seed(0)
    rows, n = sum(lengths), len(lengths)
    weight = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    for shape in ((4, 5), (), (0,)):
        ids = torch.randint(0, rows, shape)
        weight.grad = None
        expected = F.embedding(ids, weight, padding_idx if padding_idx >= 0 else None)
        cotangent = torch.randn_like(expected)
        expected.backward(cotangent)
        total = torch.zeros_like(expected)
        for rank in range(n):
            start = sum(lengths[:rank])
            local = weight[start : start + lengths[rank]].detach().clone().requires_grad_()
            y = masked_embedding(local, ids, start, padding_idx)
            y.backward(cotangent)
            total += y.detach()
            close_to(local.grad, weight.grad[start : start + lengths[rank]])
        close_to(total, expected.detach())


def test_masked_embedding_refuses_negative_ids() -> None:
    with pytest.raises(IndexError, match="out of range"):
        masked_embedding(torch.ones(3, 2), torch.tensor([1, -1]), 0)


# --- Batch normalisation ----------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(6,), (3, 3), (4, 1, 1), (3, 3, 0), (1, 1, 3, 1)])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 5)])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_norm(
    lengths: tuple[int, ...], shape: tuple[int, ...], affine: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    n = len(lengths)
    x = (3 * torch.randn(shape, dtype=dtype) + 20).requires_grad_()
    weight = torch.randn(4, dtype=dtype, requires_grad=True) if affine else None
    bias = torch.randn(4, dtype=dtype, requires_grad=True) if affine else None
    mean, var = torch.randn(4, dtype=dtype), torch.rand(4, dtype=dtype) + 0.5
    new_mean, new_var = mean.clone(), var.clone()
    expected = F.batch_norm(x, new_mean, new_var, weight, bias, True, 0.3, 1e-5)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    world = ThreadWorld(n)
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}

    def program(rank: int) -> None:
        group, spec = world.group(rank), ShardSpec(0, lengths)
        part = [apply("slice_vary", spec, group, t.detach()) for t in (x, expected, cotangent)]
        local = part[0].clone().requires_grad_()
        own = [t if t is None else t.detach().clone().requires_grad_() for t in (weight, bias)]
        given = [mean.clone(), var.clone()]
        y, m, v = batch_norm(local, *own, *given, True, 0.3, 1e-5, group if n > 1 else None)
        close_to(y.detach(), part[1], **tolerance)
        close_to(m, new_mean)
        close_to(v, new_var)
        assert not m.requires_grad and not v.requires_grad
        assert torch.equal(given[0], mean), "running statistics were overwritten"
        y.backward(part[2])
        close_to(local.grad, apply("slice_vary", spec, group, x.grad), **tolerance)
        for t, whole in zip(own, (weight, bias), strict=True):
            if t is not None:
                close_to(apply("psum", None, group, t.grad), whole.grad, **tolerance)
        # Evaluation is local, and batch statistics are used where there are no running ones.
        y, m, v = batch_norm(local, *own, *given, False, 0.3, 1e-5, group)
        whole = F.batch_norm(x, mean, var, weight, bias, False, 0.3, 1e-5).detach()
        close_to(y.detach(), apply("slice_vary", spec, group, whole), **tolerance)
        assert m is given[0] and v is given[1]
        y, m, v = batch_norm(local, *own, None, None, False, 0.3, 1e-5, group)
        close_to(y.detach(), part[1], **tolerance)
        assert m is None and v is None

    run_threads(world, program)


def test_batch_norm_is_stable() -> None:
    """A mean that is large against the deviation, in float32, with other means on each rank."""
    torch.manual_seed(0)
    x = torch.randn(8, 2, 50) + 1000 + torch.arange(8.0)[:, None, None]
    exact = F.batch_norm(x.double(), None, None, training=True)
    whole = F.batch_norm(x, None, None, training=True)
    world = ThreadWorld(4)

    def program(rank: int) -> Tensor:
        part = x[2 * rank : 2 * rank + 2]
        return batch_norm(part, None, None, None, None, True, 0.1, 1e-5, world.group(rank))[0]

    y = torch.cat(run_threads(world, program))
    error = (y - exact).abs().max()
    assert error <= 2 * (whole - exact).abs().max() + 1e-6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float32, 1e-5)])
def test_batch_norm_low_precision(
    channels_last: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 6, 6)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(4), torch.randn(4)
    whole = x.to(dtype).float().clone().requires_grad_()
    expected = F.batch_norm(whole, None, None, weight, bias, True)
    cotangent = torch.randn_like(expected).to(dtype)
    expected.backward(cotangent.float())
    world = ThreadWorld(2)

    def program(rank: int) -> None:
        here = slice(4 * rank, 4 * rank + 4)
        local = x.to(dtype)[here].requires_grad_()
        y, *_ = batch_norm(local, weight, bias, None, None, True, 0.1, 1e-5, world.group(rank))
        assert y.dtype == dtype
        close_to(y.detach().float(), expected[here].detach(), rtol=tolerance, atol=tolerance)
        y.backward(cotangent[here])
        close_to(local.grad.float(), whole.grad[here], rtol=tolerance, atol=tolerance)

    run_threads(world, program)
