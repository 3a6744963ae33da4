"""The models whose peak memory is predicted and measured: hundreds of MiB per rank, fast enough."""

from __future__ import annotations

import torch

from .models import GPT, Batch, ResNet, WideMLP
from .validation_models import Llama, ValidationModel, text_batch


def _vectors(g: torch.Generator) -> Batch:
    return torch.randn(512, 2048, generator=g), torch.randn(512, 2048, generator=g)


def _images(g: torch.Generator) -> Batch:
    return torch.randn(128, 3, 32, 32, generator=g), torch.randint(10, (128,), generator=g)


MEMORY_MODELS = {
    model.name: model
    for model in (
        ValidationModel("gpt", lambda: GPT(context=256), text_batch(16, 256, 8192)),
        ValidationModel("llama", lambda: Llama(dim=512, layers=6), text_batch(16, 256, 4096)),
        ValidationModel("mlp", lambda: WideMLP(2048, 8192), _vectors),
        ValidationModel("resnet", lambda: ResNet(64), _images),
    )
}
