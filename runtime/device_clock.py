"""How `autopar calibrate --device cuda` times a callable: on the device, cold, the host ahead.

Before every timed call a buffer larger than the last-level cache is written: that makes caches cold
and keeps the device busy while the host queues the call between two events, so that what is timed
is the device's work and not the host's. On CPU the same calls are timed by the host's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Above every last-level cache: 50 MB on H100 (NVIDIA H100 datasheet), 126 MB on B200.
FLUSH_BYTES = 256 << 20
HOST_S = 80e-6  # more than the host takes to queue an op, or a parameter's share of an update
FLUSHES = 3  # at least: a call that goes through autograd takes longer to queue


class DeviceClock:
    """Times callables on one device; `flush_bytes` are written before each timed call."""

    def __init__(
        self,
        device: torch.device,
        calls: int,
        report: Callable[[str], None] = lambda _: None,
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        self.device, self.calls, self.report = device, calls, report
        self._cuda = device.type == "cuda"
        self._flush = torch.zeros(flush_bytes // 4, device=device)
        self._flush_s = self._measure_flush() if self._cuda else 0.0

    def __call__(self, fn: Callable[[], Any], kernels: int = 1) -> float:
        """Median seconds of one call of `fn`, which queues about so many kernels."""
        fn()
        return statistics.median(self._once(fn, kernels) for _ in range(self.calls))

    def host(self, fn: Callable[[], Any]) -> float:
        """Median seconds that the host takes for a call, the device not waited for."""
        fn()
        found = []
        for _ in range(self.calls):
            self._synchronise()
            start = time.perf_counter()
            fn()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def _once(self, fn: Callable[[], Any], kernels: int) -> float:
        if not self._cuda:
            self._flush.zero_()
            start = time.perf_counter()
            fn()
            return time.perf_counter() - start
        self._synchronise()
        for _ in range(int(kernels * HOST_S / self._flush_s) + FLUSHES):
            self._flush.zero_()
        begin, end = _event(), _event()
        begin.record()
        fn()
        end.record()
        self._synchronise()
        return float(begin.elapsed_time(end)) / 1e3  # elapsed_time is in milliseconds

    def _measure_flush(self) -> float:
        self._flush.zero_()
        self._synchronise()
        start = time.perf_counter()
        for _ in range(20):
            self._flush.zero_()
        self._synchronise()
        return (time.perf_counter() - start) / 20

    def _synchronise(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)


def _event() -> Any:
    make: Any = torch.cuda.Event  # untyped
    return make(enable_timing=True)
