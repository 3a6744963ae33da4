"""Times of the phases of a step: host clock on CPU, events of the stream on CUDA."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

STAND_INS = "stand-ins"


class PhaseClock:
    """Adds up seconds by phase; what stands in for collectives is counted by the phase it is in.

    Nothing waits for the device until `take` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._phase = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as the phase `name`; phases may be repeated, not nested."""
        self._phase = name
        begin = self._now()
        try:
            yield
        finally:
            self._spans.append((name, begin, self._now()))
            self._phase = ""

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Count the block as a stand-in's, inside the present phase; free outside phases."""
        if not self._phase:
            yield
            return
        begin = self._now()
        yield
        self._spans.append((f"{self._phase} {STAND_INS}", begin, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds by phase, without its stand-ins, and by `"<phase> stand-ins"`; then forget them.

        On CUDA this waits for the device.
        """
        if self._cuda:
            torch.cuda.synchronize(self._device)
        found: dict[str, float] = {}
        for name, begin, end in self._spans:
            # elapsed_time is in milliseconds.
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            found[name] = found.get(name, 0.0) + seconds
        self._spans.clear()
        for name in list(found):
            if name.endswith(STAND_INS):
                found[name.removesuffix(f" {STAND_INS}")] -= found[name]
        return found

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        make: Any = torch.cuda.Event  # untyped
        event = make(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
