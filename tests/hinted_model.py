"""A small model with hints of every kind, and captures of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from tests.simulate import Subject, subject_of

LAYERS = 4


class Block(nn.Module):
    def __init__(self, dim: int, said: dict[str, Any] | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.said = said

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x if self.said is None else autopar.hint(x, **self.said)


class Model(nn.Module):
    """Token ids [batch, 8] and targets to a loss; `said` is hinted of every block's result."""

    def __init__(
        self, dim: int = 16, layers: int = LAYERS, said: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, dim)
        self.blocks = nn.ModuleList(Block(dim, said) for _ in range(layers))
        self.head = nn.Linear(dim, 32)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(rows)
    ids = torch.randint(32, (rows, 8), generator=made)
    return ids, ids.roll(-1, 1)


def captured(module: nn.Module) -> Subject:
    return subject_of(module.double(), batch(), {})


@cache
def plain() -> Subject:
    torch.manual_seed(0)
    return captured(Model())


@cache
def in_forward() -> Subject:
    torch.manual_seed(0)
    return captured(Model(said={"split": 1}))
