"""One process: the module runs as it is, only dropout draws the masks that any plan would draw."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .eager_random import PartitionInvariantDropout
from .random import draw_seed


class SingleProcess:
    """Calls of a module in a run of one process."""

    def __init__(self) -> None:
        self.step_times_s: list[float] = []
        self._last_start: float | None = None
        self._draws: bool | None = None

    def call(
        self,
        forward: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run the forward; where it draws dropout masks, by the global position of each element.

        Whether it draws any is found out in its first call in training: from then on a module
        without dropout runs with nothing in between.
        """
        self._clock(module)
        if not module.training or self._draws is False:
            return forward(module, *args, **kwargs)
        before = torch.get_rng_state()
        seed = draw_seed()
        drawn = torch.get_rng_state()
        with PartitionInvariantDropout(seed) as mode:
            output = forward(module, *args, **kwargs)
        if mode.calls == 0 and torch.equal(drawn, torch.get_rng_state()):
            torch.set_rng_state(before)
        self._draws = self._draws or mode.calls > 0 or _has_dropout(module)
        return output

    def _clock(self, module: nn.Module) -> None:
        now = time.perf_counter()
        if module.training and torch.is_grad_enabled():
            if self._last_start is not None:
                self.step_times_s.append(now - self._last_start)
            self._last_start = now
        else:
            self._last_start = None

    def measured_step_s(self) -> float | None:
        """Median seconds from one training call to the next, without the first three, or None."""
        settled = self.step_times_s[3:]
        return statistics.median(settled) if settled else None


def _has_dropout(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.dropout._DropoutNd) for m in module.modules())
