"""What a step is made of: pieces of the model on this rank, and the engine that runs them.

A step on `m` micro-batches is a prologue (what depends on parameters alone, once), bodies (one run
per piece and micro-batch, forward and backward) and a tail (what needs all micro-batches, once).
Prologue and tail are `runtime.step`'s; an engine only sees bodies: `runtime.step.LocalEngine` runs
those of one device, a pipeline's engine those of one stage, in the order of its schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .deferred_weights import Add, add_to_leaf


@dataclass(frozen=True)
class Crossing:
    """Type of a value of one micro-batch that goes from a piece to the next: a rank's local one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class BodyPart:
    """One piece of the model on this rank, for one step.

    `index` is its number in the chain of all pieces. `leaves` are what the prologue prepared of the
    parameters (whole, gathered or still sharded); their gradients add up over the micro-batches, in
    any order; `add(leaf, gradient)` adds what autograd does not. `run(k, received)` is the forward
    of micro-batch `k` and returns what the next piece receives; that of the last piece returns
    `(objective,)` where gradients are wanted: a scalar whose backward has the right seeds as it is
    (gradient 1), else `()`. Everything else that the model returns `run` keeps for itself.
    Gradients are wanted where `torch.is_grad_enabled()`.
    """

    index: int
    leaves: tuple[nn.Parameter, ...]
    run: Callable[[int, Sequence[Tensor]], tuple[Tensor, ...]]
    receives: tuple[Crossing, ...] = ()
    sends: tuple[Crossing, ...] = ()
    add: Add = add_to_leaf


class Engine(Protocol):
    """Runs all pieces of this rank on all micro-batches of one step."""

    def train(self, parts: Sequence[BodyPart], micro_batches: int) -> None:
        """Forward and backward; afterwards the leaves of `parts` have their gradients."""

    def evaluate(self, parts: Sequence[BodyPart], micro_batches: int) -> None:
        """Forward only; gradients are off."""
