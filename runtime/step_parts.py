"""What a training step is made of on one rank: pieces of the model, and what runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Crossing:
    """A local tensor that goes from one piece to the next, and whether a gradient comes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class BodyPart:
    """One piece of the model on this rank, number `index` of the chain.

    `leaves` are the prepared parameters: their `.grad` accumulates over micro-batches. `run(k,
    received)` is the forward of micro-batch `k`: it returns what is sent on, of the last piece one
    scalar, whose backward has the right seeds. What is a result of the step it keeps itself.
    """

    index: int
    leaves: tuple[Tensor, ...]
    run: Callable[[int, Sequence[Tensor]], tuple[Tensor, ...]]
    receives: tuple[Crossing, ...] = ()
    sends: tuple[Crossing, ...] = ()


class Engine(Protocol):
    """Runs all pieces of this rank over the micro-batches of a step."""

    def train(self, parts: Sequence[BodyPart], micro_batches: int) -> None:
        """Forward and backward of all micro-batches."""

    def evaluate(self, parts: Sequence[BodyPart], micro_batches: int) -> None:
        """Forward of all micro-batches, without gradients."""
