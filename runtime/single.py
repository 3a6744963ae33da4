"""One process: the module runs as it is, only dropout draws the masks that any plan would draw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autopar.compat import dynamo_config, why_not_compiled

from .compiled_dropout import CompiledDropout
from .eager_random import PartitionInvariantDropout
from .random import draw_seed
from .step_clock import StepClock


class NotCompiledWarning(UserWarning):
    """A module that was to be compiled runs op by op."""


class SingleProcess:
    """Calls of a module in a run of one process.

    With a `torch.compile` backend, its forward is compiled. One that draws dropout masks has to be
    one graph for that, else it runs op by op, with a warning that says why.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.clock = StepClock()
        self.backend = backend
        self._draws: bool | None = None
        self._compiled: Callable[..., Any] | None = None
        self._random: CompiledDropout | None = None
        self._drawing: Callable[..., Any] | None = None  # compiled, as one graph
        self._whole = backend not in (None, "eager")  # whether drawing forwards are compiled

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
        calls, output = self._draw(seed, forward, module, args, kwargs)
        if calls == 0 and torch.equal(drawn, torch.get_rng_state()):
            torch.set_rng_state(before)
        self._draws = self._draws or calls > 0 or _has_dropout(module)
        return output

    def _draw(
        self,
        seed: int,
        forward: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[int, Any]:
        """How many random calls the forward made, and what it gave."""
        if self._draws and self._whole:
            run, random = self._drawing_whole(forward)
            random.seed, random.calls = seed, 0
            try:
                with dynamo_config(specialize_float=True):  # a probability is a constant
                    output = run(module, *args, **kwargs)
                return random.calls, output
            except Exception as error:
                reason = why_not_compiled(error)
                if reason is None:
                    raise
            self._whole = False
            warnings.warn(
                f"{type(module).__name__} draws dropout masks and is not compiled ({self.backend}),"
                f" it runs op by op: {reason}",
                NotCompiledWarning,
                stacklevel=4,
            )
        with PartitionInvariantDropout(seed) as mode:
            output = forward(module, *args, **kwargs)
        return mode.calls, output

    def _drawing_whole(
        self, forward: Callable[..., Any]
    ) -> tuple[Callable[..., Any], CompiledDropout]:
        if self._drawing is None or self._random is None:
            self._random = CompiledDropout(str(self.backend))
            self._drawing = torch.compile(forward, backend=self._random, fullgraph=True)
        return self._drawing, self._random

    def _run(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        if self.backend in (None, "eager"):
            return forward
        if self._compiled is None:
            self._compiled = torch.compile(forward, backend=str(self.backend))
        return self._compiled


def _has_dropout(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.dropout._DropoutNd) for m in module.modules())
