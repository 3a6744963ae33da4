"""Which gradient the loss of a step is given inside, before the user's backward says it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FIRST = 65536.0  # what torch.amp.GradScaler begins with
BACKOFF = 0.5  # its factor after a step whose gradients overflowed


class LossScale:
    """The gradient that the backwards inside a step begin with.

    It is 1 unless half precision could lose small gradients. Then it is what the last backward of
    the user began with (a GradScaler's scale, times what the user does with the loss), or half of
    it after gradients that were not finite, as GradScaler halves its scale. `agree` tells whether
    gradients are finite on all ranks, given whether they are here: ranks must have one scale.
    """

    def __init__(self, half: bool, agree: Callable[[bool], bool] = bool) -> None:
        self.half, self.agree = half, agree
        self._scale: Tensor | float = FIRST if half else 1.0

    def seed(self) -> Tensor | float:
        """The scale for the backwards of the next step."""
        return self._scale

    def seen(self, given: Tensor, gradients: list[Tensor]) -> None:
        """Note the gradient that the user's backward began with, and what came of it."""
        if not self.half:
            return
        finite = self.agree(all(bool(torch.isfinite(g).all()) for g in gradients))
        scale = float(given) if finite else float(given) * BACKOFF
        self._scale = scale if 0.0 < abs(scale) < float("inf") else 1.0
