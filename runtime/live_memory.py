"""Memory of a step: what a device has to give, and the most that is in use at once.

CUDA's allocator counts for itself. On CPU a dispatch mode adds up the bytes of every storage from
the op that makes it until it is freed; what a kernel uses inside itself is not seen. Memory that
ranks share is counted by its arena, at the rank that writes to it.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter

from autopar.compat import TorchDispatchMode, local_of

from .arena import held_bytes

_CGROUPS = (  # limit and use, of version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that exist: of `known` tensors, and of all that ops make."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._live: dict[int, weakref.finalize[Any, Any]] = {}
        for tensor in known:
            self._note(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._note(value)
        return out

    def _note(self, tensor: Tensor) -> None:
        # A DTensor's own storage has the size of the whole, and no memory.
        storage = (local_of(tensor) if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = storage._cdata
        if key in self._live or storage.device.type == "meta":
            return
        if not storage.resizable():  # not torch's: mapped
            return
        self._live[key] = weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, nbytes: int) -> None:
        del self._live[key]
        self.now -= nbytes

    def close(self) -> None:
        """Stop watching what still exists."""
        for finalizer in self._live.values():
            finalizer.detach()
        self._live.clear()


def peak_bytes(step: Callable[[], object], device: torch.device, known: Iterable[Tensor]) -> int:
    """The most bytes in use at once during `step()`, those of `known` tensors included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    live = LiveBytes(known)
    try:
        with live:
            step()
    finally:
        live.close()
    return live.peak + held_bytes()


def free_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated: of the GPU, or of the machine (or its container)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(n.split()[1]) * 1024 for n in lines if n.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    for limit, use in _CGROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(use).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return float(free)
