"""The line about memory with which `autopar run --memory` ends."""

from __future__ import annotations

import os
import sys
import weakref

from torch import nn

from .launch import MEMORY
from .runtime.memory_watch import MemoryWatch
from .units import bytes_text


def report_at_exit(module: nn.Module, watch: MemoryWatch, limit: float) -> None:
    """Print predicted and measured peak when the process ends; only in runs with `--memory`."""
    if MEMORY in os.environ:
        weakref.finalize(module, _report, watch, limit)


def _report(watch: MemoryWatch, limit: float) -> None:
    if watch.predicted_bytes is None:
        return
    peak = watch.peak_bytes
    measured = "not measured (too few training steps)" if peak is None else bytes_text(peak)
    print(
        f"autopar: memory per rank: {bytes_text(watch.predicted_bytes)} predicted, {measured}"
        f"{'' if peak is None else ' measured'}, the limit is {bytes_text(limit)}",
        file=sys.stderr,
    )
