"""How much of this host's processors other programs use while the ranks measure."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist


class LoadClock:
    """The share of the cores that others used between two ticks; every rank must tick.

    Where the system does not say (no `/proc/stat`), it is 0.
    """

    def __init__(self) -> None:
        self._last = _read()

    def tick(self) -> float:
        """Foreign cores / all cores since the last tick; the same on every rank."""
        now = _read()
        wall_s, busy_s, own_s = (b - a for a, b in zip(self._last, now, strict=True))
        self._last = now
        sums = torch.tensor([wall_s, busy_s, own_s], dtype=torch.float64)
        ranks = 1
        if dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(sums)
        wall_s, busy_s, own_s = float(sums[0]) / ranks, float(sums[1]) / ranks, float(sums[2])
        return max(0.0, (busy_s - own_s) / wall_s / (os.cpu_count() or 1))


def _read() -> tuple[float, float, float]:
    """Seconds: of the wall clock, of all busy cores (stolen by a hypervisor too), of our own."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return time.perf_counter(), 0.0, 0.0
    # man 5 proc_stat: user nice system idle iowait irq softirq steal
    ticks = [int(word) for word in line.split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]
    return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()
