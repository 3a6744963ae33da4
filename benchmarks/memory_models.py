"""The models whose peak memory is predicted and measured: hundreds of MiB per rank, fast enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .models import GPT, Batch, ResNet, WideMLP
from .validation_models import Llama


@dataclass(frozen=True)
class MemoryModel:
    """A module and its global batch; `batch_of` takes a seeded generator."""

    name: str
    build: Callable[[], nn.Module]
    batch_of: Callable[[torch.Generator], Batch]


def _text(batch: int, length: int, vocab: int) -> Callable[[torch.Generator], Batch]:
    def make(g: torch.Generator) -> Batch:
        ids = torch.randint(vocab, (batch, length + 1), generator=g)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return make


def _vectors(g: torch.Generator) -> Batch:
    return torch.randn(512, 2048, generator=g), torch.randn(512, 2048, generator=g)


def _images(g: torch.Generator) -> Batch:
    return torch.randn(128, 3, 32, 32, generator=g), torch.randint(10, (128,), generator=g)


MEMORY_MODELS = {
    model.name: model
    for model in (
        MemoryModel("gpt", lambda: GPT(context=256), _text(16, 256, 8192)),
        MemoryModel("llama", lambda: Llama(dim=512, layers=6), _text(16, 256, 4096)),
        MemoryModel("mlp", lambda: WideMLP(2048, 8192), _vectors),
        MemoryModel("resnet", lambda: ResNet(64), _images),
    )
}
