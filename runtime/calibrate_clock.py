"""How `autopar calibrate` times a callable: as it would run inside a training step.

There an op finds what the op before it made in the cache, and its weights or what the forward kept
are cold: before a timed call the rank walks through other memory, then through the tensors that are
hot. It walks through `SPOIL_TENSORS` times the size of the op's tensors (a step with small tensors
touches less before it comes back), at most `SPOIL_BYTES`. Samples in which the kernel gave the core
to someone else are dropped.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SPOIL_BYTES = 16 << 20  # per rank: more than its own cache and its part of a shared one
SPOIL_TENSORS = 32
CALLS = 60  # of a callable in a round, at most


class Clock:
    """Times callables for `seconds` each, all `ranks` at once."""

    def __init__(self, seconds: float, ranks: int, report: Callable[[str], None]) -> None:
        self.seconds, self.ranks, self.report = seconds, ranks, report
        self._spoiler = torch.zeros(SPOIL_BYTES // 4)
        self._factor = torch.full((384, 384), 1e-3)

    def __call__(
        self, fn: Callable[[], Any], hot: Sequence[Tensor] | None = (), nbytes: int = SPOIL_BYTES
    ) -> float:
        """Mean seconds of one call; `hot` was written just before, None leaves caches alone.

        `nbytes` is the size of one of its tensors.
        A step is the sum of many calls, and a busy host makes some of them much longer: the mean
        counts these as a step does.
        """
        spoiler = self._spoiler[: max(SPOIL_TENSORS * nbytes // 4, 1)]
        fn()
        if self.ranks > 1:
            dist.barrier()
        kept: list[float] = []
        every: list[float] = []
        stop = time.perf_counter() + self.seconds
        while len(every) < 3 or (len(every) < CALLS and time.perf_counter() < stop):
            if hot is not None:
                spoiler.add_(1.0)
                for tensor in hot:
                    tensor.mul_(1.0)
            before = switches()
            start = time.perf_counter()
            fn()
            every.append(time.perf_counter() - start)
            if switches() == before:
                kept.append(every[-1])
        return statistics.fmean(kept or every)

    def collective(
        self, fn: Callable[[], Any], calls: int, warm: bool = True
    ) -> list[tuple[float, float]]:
        """(start, end) of every call by the host's clock, after a few milliseconds of compute.

        Members arrive apart, as in training. Every rank makes the same number of calls.
        """
        if warm:
            fn()
        dist.barrier()
        spans = []
        for _ in range(calls):
            self._compute()
            start = time.perf_counter()
            fn()
            spans.append((start, time.perf_counter()))
        return spans

    def _compute(self) -> None:
        self._spoiler.add_(1.0)
        torch.mm(self._factor, self._factor)


def switches() -> int:
    """How often the kernel took the core from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
