"""The measured step time: from one training call of a module to the next."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

WARM_UP = 3  # steps that capture, allocate and warm caches


class StepClock:
    """Notes when a module is called; what is not training interrupts the count."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._last_start: float | None = None

    def tick(self, module: nn.Module) -> None:
        """Note that a call of the module begins."""
        now = time.perf_counter()
        if module.training and torch.is_grad_enabled():
            if self._last_start is not None:
                self._times_s.append(now - self._last_start)
            self._last_start = now
        else:
            self._last_start = None

    def median_s(self) -> float | None:
        """Median time from one training call to the next, warm-up left out; None so early."""
        settled = self._times_s[WARM_UP:]
        return statistics.median(settled) if settled else None
