"""Random arguments: integers are valid wherever the program indexes with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.ir.graph import Graph, Value
from autopar.passes.prepare import prepare
from autopar.passes.specialise import specialise
from autopar.planning import capture_training
from autopar.runtime.random_values import given_or_random, index_bounds, random_tensor


class Indexes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 4)
        self.small = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 11)

    def forward(
        self, ids: Tensor, both: Tensor, shifted: Tensor, rows: Tensor, mask: Tensor, target: Tensor
    ) -> Tensor:
        x = self.table(ids.clone().view(-1)) + self.table(both) + self.small(both)
        x = x + self.table(shifted + 3) + x[rows] * mask.unsqueeze(-1)
        return F.cross_entropy(self.head(x), target)


def graph() -> Graph:
    with torch.device("meta"):
        ids = [torch.zeros(8, dtype=torch.long) for _ in range(6)]
        captured = capture_training(Indexes(), ids, {})
    return specialise(prepare(captured.graph), captured.symbols)


def test_bounds_follow_integers_to_what_they_index() -> None:
    made = graph()
    bounds = index_bounds(made)
    found = {n.meta["fqns"][0]: bounds.get(n.name) for n in made.placeholders("input")}
    # `mask` indexes nothing; `rows` picks rows of a batch of 8.
    assert found == {
        "ids": 17, "both": 5, "shifted": 14, "rows": 8, "mask": None, "target": 11,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integers_are_below_the_bound(dtype: torch.dtype) -> None:
    x = random_tensor(Value((1000,), dtype), torch.Generator().manual_seed(0), below=3)
    assert x.dtype == dtype
    assert x.unique().tolist() == [0, 1, 2]


def test_what_exists_is_used() -> None:
    g, value = torch.Generator().manual_seed(0), Value((3,), torch.float32)
    here = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(given_or_random(here, value, g, {}, "x"), here)
    assert given_or_random(here.to("meta"), value, g, {}, "x").device.type == "cpu"
    assert given_or_random(torch.ones(4), value, g, {}, "x").shape == (3,)


def test_parameters() -> None:
    g = torch.Generator().manual_seed(0)
    scale = random_tensor(Value((1000,), torch.float32), g, name="norm.weight")
    matrix = random_tensor(Value((100, 100), torch.bfloat16), g, name="linear.weight")
    assert abs(scale.mean().item() - 1) < 0.01
    assert matrix.dtype == torch.bfloat16
    assert matrix.float().std().item() < 0.03
    eighth = random_tensor(Value((4,), torch.float8_e4m3fn), g, name="w")
    assert eighth.dtype == torch.float8_e4m3fn
