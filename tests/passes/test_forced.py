"""Named strategies run what is asked for: micro-batches, and more of them where one does not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autopar.cost.cluster import parse_cluster
from autopar.plan import Plan
from autopar.planning import make_plan

BATCH = 16


class Layers(nn.Module):
    """Activations take most of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


def plan_of(strategy: str, **asked: Any) -> Plan:
    x = torch.zeros(BATCH, 512, 16)
    return make_plan(Layers(), (x,), {}, parse_cluster("cpu:4"), strategy=strategy, **asked)


def test_micro_batches_that_are_asked_for() -> None:
    assert plan_of("data", micro_batches=(2,)).micro_batches == 2
    assert plan_of("data", micro_batches=(1, 2, 4)).micro_batches == 1


def test_more_micro_batches_where_one_does_not_fit() -> None:
    whole = plan_of("data")
    limit = 0.8 * whole.predicted.memory_bytes
    less = plan_of("data", micro_batches=(1, 2, 4), memory_limit=limit)
    assert less.micro_batches > 1
    assert less.predicted.memory_bytes <= limit
