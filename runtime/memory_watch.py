"""The measured peak memory of one training step of a user's own loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.compat import active_dispatch_modes

from .arena import held_bytes
from .live_memory import LiveBytes

FIRST = 3  # the training call with which the measured step begins: earlier ones plan and allocate


class MemoryWatch:
    """Beside the prediction: measures once, from the start of the third training call to the next.

    `peak_bytes` is that of the rank with the largest; None until it is measured. On CPU every op of
    the step is watched (`live_memory`), which makes it a little slower.
    """

    def __init__(self) -> None:
        self.peak_bytes: int | None = None
        self.predicted_bytes: int | None = None
        self._calls = 0
        self._began = False
        self._live: LiveBytes | None = None
        self._on_cuda = False

    def tick(self, module: nn.Module, inputs: Sequence[Tensor] = ()) -> None:
        """Note that a call of the module begins; collective where a measurement ends."""
        if self._began:
            self._began = False
            self._end()
        if module.training and torch.is_grad_enabled():
            self._calls += 1
            if self._calls == FIRST:
                self._began = True
                self._begin(module, inputs)

    def _begin(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._on_cuda = any(p.is_cuda for p in module.parameters())
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif not active_dispatch_modes():  # else it would not be clear who ends first
            self._live = LiveBytes([*inputs, *_known(module)])
            self._live.__enter__()  # type: ignore[no-untyped-call]

    def _end(self) -> None:
        peak = 0
        if self._on_cuda:
            peak = int(torch.cuda.max_memory_allocated())
        elif self._live is not None and active_dispatch_modes()[-1:] == [self._live]:
            self._live.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            peak = self._live.peak + held_bytes()
        if self._live is not None:
            self._live.close()
            self._live = None
        worst = torch.tensor([peak], device="cuda" if self._on_cuda else "cpu")
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        self.peak_bytes = int(worst) or None


def _known(module: nn.Module) -> Iterator[Tensor]:
    """What exists before a step: parameters, gradients, buffers, the state of their optimizers."""
    parameters = list(module.parameters())
    yield from parameters
    yield from module.buffers()
    yield from (p.grad for p in parameters if p.grad is not None)
    mine = set(map(id, parameters))
    for found in gc.get_objects():
        if not issubclass(type(found), torch.optim.Optimizer):
            continue
        for parameter, state in found.state.items():
            if id(parameter) in mine and isinstance(state, dict):
                yield from (x for x in state.values() if isinstance(x, Tensor))
