"""Parts of a batch, and what the results of all parts make together."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from autopar.ir.lowered import ShardSpec
from autopar.runtime.micro_batches import combined, micro_first, micro_slice


@settings(max_examples=40, deadline=None)
@given(
    dim=st.integers(0, 2),
    outer=st.integers(1, 3),
    count=st.integers(1, 4),
    length=st.integers(1, 3),
    block=st.integers(1, 2),
)
def test_slices_make_the_whole_again(
    dim: int, outer: int, count: int, length: int, block: int
) -> None:
    """Of strided layouts, too: every repeat of the dim has its part of every micro-batch."""
    shape = [2, 3, 2]
    shape[dim] = outer * count * length * block
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    spec = ShardSpec(dim, (length,) * count, outer, block)
    parts = [micro_slice(x, spec, k) for k in range(count)]
    assert all(p.shape[dim] == spec.local_size(0) for p in parts)
    assert torch.equal(combined("cat", dim, outer, parts), x)
    if outer == 1:
        assert parts[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_values_are_reduced() -> None:
    parts = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0])]
    wanted = {"sum": [4.0, 7.0], "max": [3.0, 5.0], "min": [1.0, 2.0], "last": [3.0, 2.0]}
    for kind, values in wanted.items():
        assert combined(kind, 0, 1, parts).tolist() == values


def test_half_precision_adds_up_wide() -> None:
    parts = [torch.tensor(256.0, dtype=torch.bfloat16)] + [
        torch.tensor(1.0, dtype=torch.bfloat16) for _ in range(8)
    ]
    total = combined("sum", 0, 1, parts)
    assert total.dtype == torch.bfloat16 and total.item() == 264.0


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_first_counts_once(micro_batch: int) -> None:
    x = torch.ones(3, requires_grad=True)
    assert micro_first(x, micro_batch).sum().item() == (3.0 if micro_batch == 0 else 0.0)
