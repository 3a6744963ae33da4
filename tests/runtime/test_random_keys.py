"""Masks by tensor ops on a table of keys are those of NumPy, at any place and seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.ir.lowered import Region
from autopar.runtime.random import keep_mask, whole
from autopar.runtime.random_keys import key_table, masked, traced_mask
from autopar.runtime.sharded_ops import dropout

REGIONS = {
    "whole": whole((7, 33, 65)),
    "scalar": whole(()),
    "empty": whole((0, 3)),
    "pieces": Region((8, 12), (((2, 4), (6, 7)), ((0, 3), (9, 12)))),
    "beyond 31 bits": Region((2, 1 << 30), (((1, 2),), ((5, 40), (1 << 29, (1 << 29) + 3)))),
    "beyond 32 bits": Region((5, 1 << 31), (((0, 5),), ((0, 40), ((1 << 31) - 9, 1 << 31)))),
}


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_the_mask_is_that_of_numpy(name: str, p: float) -> None:
    region = REGIONS[name]
    key = key_table(123, 5, 4)[2]
    assert torch.equal(traced_mask(p, key, region), keep_mask(p, 123, 7, region))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, (1 << 62) - 1), st.integers(0, 1000), st.integers(1, 300))
def test_any_seed_and_call(seed: int, call: int, size: int) -> None:
    wanted = keep_mask(0.5, seed, call, whole((size,)))
    assert torch.equal(traced_mask(0.5, key_table(seed, call, 1)[0], whole((size,))), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_bitwise_those_op_by_op(dtype: torch.dtype) -> None:
    region = REGIONS["pieces"]
    x = torch.randn(3, 6).to(dtype).t().contiguous().t()  # not contiguous
    x[0, 0], x[1, 1] = torch.inf, -1.0
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = masked(one, 0.3, key_table(9, 0, 3), 2, region)
    wanted = dropout(two, 0.3, 9, 2, region)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    g = torch.randn(3, 6).to(dtype)
    y.backward(g)
    wanted.backward(g)
    assert one.grad is not None and two.grad is not None
    assert torch.equal(one.grad, two.grad)
