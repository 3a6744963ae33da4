"""Memory for large values that are needed for a moment, apart from memory that stays.

Were both on the C library's heap, what stays would settle in the gaps that large values leave, each
gap would then be a little too small for the next large value, and the process would grow by about
all that ever was computed (measured: 256 MiB of parameters, drawn one at a time and thrown away,
left a heap of 340 MiB).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

import torch
from torch import Tensor


class Scratch:
    """Memory that is given out, given back, and given out again; freed with this object."""

    def __init__(self) -> None:
        self._free: list[torch.UntypedStorage] = []

    def take(self, nbytes: int, device: torch.device) -> torch.UntypedStorage:
        """Memory of at least so many bytes, with anything in it."""
        if device.type != "cpu" or nbytes < mmap.PAGESIZE:
            return torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
        fitting = [storage for storage in self._free if storage.nbytes() >= nbytes]
        if fitting:
            found = min(fitting, key=lambda storage: storage.nbytes())
            self._free.remove(found)
            return found
        self._free.clear()  # too small, all of it
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).untyped_storage()

    def give_back(self, storage: torch.UntypedStorage) -> None:
        """Allow the memory to be given out again; nobody may use it any more."""
        if storage.device.type == "cpu" and storage.nbytes() >= mmap.PAGESIZE:
            self._free.append(storage)

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of the same layout with anything in it, until the next one is asked for."""
        steps = zip(tensor.size(), tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps) if tensor.numel() else -1
        storage = self.take((last + 1) * tensor.dtype.itemsize, tensor.device)
        self.give_back(storage)
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(storage, 0, tensor.size(), tensor.stride())  # type: ignore[call-overload, no-any-return, unused-ignore]


def trim() -> None:
    """Give what is free on the heap back to the operating system (glibc)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
