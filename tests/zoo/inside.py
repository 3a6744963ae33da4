"""Models whose loss is computed outside of `forward`, with it inside: as pipelines need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .entry import Entry, Inputs, model_output_is_loss


class WithLoss(nn.Module):
    """A model and its loss: the last argument of `forward` is the target."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *args: Any) -> Tensor:
        *inputs, target = args
        return self.loss(self.model(*inputs), target)


def inside(entry: Entry) -> Entry:
    """The entry with its loss inside of the model; the entry itself where it is already."""
    target, loss = entry.target, entry.loss
    if target is None:
        return entry

    def batch(step: int, batch_size: int) -> Inputs:
        args, kwargs = entry.batch(step, batch_size)
        assert not kwargs
        return (*args, target(step, batch_size)), {}

    return replace(
        entry,
        name=f"{entry.name}_inside",
        build=lambda: WithLoss(entry.build(), loss),
        batch=batch,
        loss=model_output_is_loss,
        target=None,
    )
