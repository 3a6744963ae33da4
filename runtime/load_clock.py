"""How much of this host's processors other programs use while the ranks measure."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .hosts import host_identity


class LoadClock:
    """The share of the cores that others used between two ticks; every rank must tick.

    Counts the cores on which this rank may run. Where the system does not say (no `/proc/stat`),
    the share is 0.
    """

    def __init__(self) -> None:
        self._cores = tuple(sorted(os.sched_getaffinity(0)))
        self._last = _read(self._cores)

    def tick(self) -> float:
        """Foreign cores / all cores since the last tick; the same on every rank."""
        now = _read(self._cores)
        passed = tuple(b - a for a, b in zip(self._last, now, strict=True))
        self._last = now
        mine = ((host_identity(), self._cores), *passed)
        every: list[Any] = [mine]
        if dist.is_initialized():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
        foreign_s, all_s = 0.0, 0.0
        for place in {key for key, *_ in every}:
            there = [rest for key, *rest in every if key == place]
            foreign_s += there[0][1] - sum(own_s for _, _, own_s in there)
            all_s += there[0][0] * len(place[1])
        return max(0.0, foreign_s / all_s)


def _read(cores: Sequence[int]) -> tuple[float, float, float]:
    """Seconds: of the wall clock, of busy cores (stolen by a hypervisor too), of this process."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return time.perf_counter(), 0.0, 0.0
    busy = 0
    for line in lines:
        name, *words = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            # man 5 proc_stat: user nice system idle iowait irq softirq steal
            ticks = [int(word) for word in words[:8]]
            busy += sum(ticks) - ticks[3] - ticks[4]
    return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()
