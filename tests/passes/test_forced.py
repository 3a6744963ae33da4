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


class Mixed(nn.Module):
    """No weight of the recurrent layer can be split, those around it can."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)
        self.layer = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 64)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.table(ids))[0])
        return logits.logsumexp(-1).mean()


def test_what_cannot_be_split_in_place_is_whole() -> None:
    ids = torch.zeros(BATCH, 8, dtype=torch.int64)
    plan = make_plan(Mixed(), (ids,), {}, parse_cluster("cpu:4"), strategy="tensor")
    stored = {name: param.sharding for name, param in plan.params.items()}
    assert stored["layer.weight_hh_l0"] == "[-, -]"
    assert "tp" in stored["table.weight"] and "tp" in stored["head.weight"]
