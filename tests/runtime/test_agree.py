"""What tells batches from others: their elements, and the order of these."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autopar.runtime.agree import batch_digest

ROWS = torch.arange(24.0).view(6, 4)
LARGE = torch.zeros(64, 4096)

OTHERS: dict[str, tuple[Tensor, Tensor]] = {
    "element": (ROWS, ROWS.clone().index_fill_(0, torch.tensor(3), 1.5)),
    "order of rows": (ROWS, ROWS[[0, 2, 1, 3, 5, 4]]),
    "order of labels": (torch.tensor([3, 1, 2, 0]), torch.tensor([3, 2, 1, 0])),
    "beside not a number": (torch.tensor([1.0, math.nan]), torch.tensor([2.0, math.nan])),
    "one column": (LARGE, LARGE.clone().index_fill_(1, torch.tensor(7), 1.0)),
    "flags": (torch.tensor([True, False, True]), torch.tensor([False, True, True])),
    "complex": (torch.tensor([1 + 2j]), torch.tensor([2 + 1j])),
}


@pytest.mark.parametrize(("one", "other"), OTHERS.values(), ids=OTHERS)
def test_other_batches_have_other_digests(one: Tensor, other: Tensor) -> None:
    assert batch_digest([one]) == batch_digest([one.clone()])
    assert batch_digest([one]) != batch_digest([other])
    assert batch_digest([one, other]) != batch_digest([other, one])
    assert 0 <= batch_digest([one, other]) < 1 << 63


def test_layouts_in_memory_do_not_count() -> None:
    assert batch_digest([ROWS.t()]) == batch_digest([ROWS.t().contiguous()])
    assert batch_digest([ROWS, torch.empty(0)]) == batch_digest([ROWS.clone(), torch.empty(0)])
