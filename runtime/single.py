"""One process: the module runs as it is, only dropout draws the masks that any plan would draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .eager_random import PartitionInvariantDropout
from .random import draw_seed
from .step_clock import StepClock


class SingleProcess:
    """Calls of a module in a run of one process.

    With a `torch.compile` backend, its forward is compiled unless it draws dropout masks: those
    are drawn op by op.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.clock = StepClock()
        self.backend = backend
        self._draws: bool | None = None
        self._compiled: Callable[..., Any] | None = None

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
        self.clock.tick(module)
        if not module.training or self._draws is False:
            return self._run(forward)(module, *args, **kwargs)
        before = torch.get_rng_state()
        seed = draw_seed()
        drawn = torch.get_rng_state()
        with PartitionInvariantDropout(seed) as mode:
            output = forward(module, *args, **kwargs)
        if mode.calls == 0 and torch.equal(drawn, torch.get_rng_state()):
            torch.set_rng_state(before)
        self._draws = self._draws or mode.calls > 0 or _has_dropout(module)
        return output

    def _run(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        if self.backend in (None, "eager"):
            return forward
        if self._compiled is None:
            self._compiled = torch.compile(forward, backend=str(self.backend))
        return self._compiled


def _has_dropout(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.dropout._DropoutNd) for m in module.modules())
