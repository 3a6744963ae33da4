"""A multi-layer perceptron and a recommendation model."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, Inputs, random

FEATURES, CLASSES = 20, 10
CATEGORIES = (7, 13, 50)
DENSE_FEATURES = 6


class MLP(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def mlp_batch(step: int, batch_size: int) -> Inputs:
    return (torch.randn(batch_size, FEATURES, generator=random(step)),), {}


def mlp_target(step: int, batch_size: int) -> Tensor:
    return torch.randint(CLASSES, (batch_size,), generator=random(step, 1))


class Recommender(nn.Module):
    """A large item table, small categorical tables, dense features, one click probability."""

    def __init__(self, rows: int, dim: int, hidden: int = 32) -> None:
        super().__init__()
        self.items = nn.Embedding(rows, dim)
        self.categories = nn.ModuleList(nn.Embedding(size, 8) for size in CATEGORIES)
        self.dense = nn.Linear(DENSE_FEATURES, 16)
        width = 2 * dim + 8 * len(CATEGORIES) + 16
        self.top = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, 1)

    def forward(
        self, item: Tensor, history: Tensor, category: Tensor, dense: Tensor, click: Tensor
    ) -> dict[str, Tensor]:
        seen = self.items(history).mean(dim=1)
        small = [table(category[:, i]) for i, table in enumerate(self.categories)]
        features = [self.items(item), seen, *small, F.relu(self.dense(dense))]
        logits = self.head(self.top(torch.cat(features, dim=-1))).squeeze(-1)
        return {"loss": F.binary_cross_entropy_with_logits(logits, click), "logits": logits}


def rec_batch(rows: int, step: int, batch_size: int) -> Inputs:
    g = random(step)
    return (), {
        "item": torch.randint(rows, (batch_size,), generator=g),
        "history": torch.randint(rows, (batch_size, 4), generator=g),
        "category": torch.stack(
            [torch.randint(size, (batch_size,), generator=g) for size in CATEGORIES], dim=1
        ),
        "dense": torch.randn(batch_size, DENSE_FEATURES, generator=g),
        "click": (torch.rand(batch_size, generator=g) < 0.3).float(),
    }


def rec(name: str, rows: int, dim: int) -> Entry:
    return Entry(name, partial(Recommender, rows, dim), partial(rec_batch, rows), loss_of_dict)


def loss_of_dict(output: dict[str, Tensor]) -> Tensor:
    return output["loss"]


ENTRIES = (
    Entry("mlp", MLP, mlp_batch, F.cross_entropy, mlp_target),
    rec("rec", 1000, 16),
)
LARGE_REC = rec("rec_1m", 1_000_000, 64)
