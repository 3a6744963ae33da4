"""Memory that a rank shares with its peers: what it sends lies there until all have read it."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

FIRST_SEGMENT_BYTES = 1 << 22
ALIGN = 64

# All arenas of this process, for `held_bytes`.
_ARENAS: weakref.WeakSet[Arena] = weakref.WeakSet()


class Memory:
    """A shared mapping, as bytes of a tensor."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self.map = mmap.mmap(fd, size)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    @staticmethod
    def create(size: int) -> Memory:
        fd = os.memfd_create("autopar")
        os.ftruncate(fd, size)
        return Memory(fd, size)

    @staticmethod
    def open(pid: int, fd: int, size: int) -> Memory:
        """Another process's memory file; raises OSError if it may not be opened."""
        return Memory(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR), size)

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements at a byte offset."""
        return self.bytes[offset : offset + count * dtype.itemsize].view(dtype)

    def held_bytes(self) -> int:
        """Bytes of the pages that were written to; the others have no memory."""
        return os.fstat(self.fd).st_blocks * 512

    def give_back(self) -> None:
        """Give all pages back to the system, whoever else has them mapped."""
        self.map.madvise(mmap.MADV_REMOVE)


class Arena:
    """This rank's data segment, which is left for a larger one when it has no room.

    Pages that were written to once stay, so the lowest room that is free is taken. What is left
    behind gives its pages back when the peers have read all that lies there.
    """

    def __init__(self) -> None:
        self.segment = Memory.create(FIRST_SEGMENT_BYTES)
        self._used: list[tuple[int, int, int]] = []  # start, stop, operation
        self._left: list[tuple[Memory, list[int]]] = []
        _ARENAS.add(self)

    def take(self, nbytes: int, operation: int, is_read: Callable[[int], bool]) -> int:
        """Offset of `nbytes` for an operation; `is_read` tells of earlier ones."""
        nbytes = max(-(-nbytes // ALIGN) * ALIGN, ALIGN)
        self._used = [used for used in self._used if not is_read(used[2])]
        if self._left:
            self._tidy(is_read)
        start = 0
        for first, stop, _ in self._used:
            if first - start >= nbytes:
                break
            start = stop
        if start + nbytes > self.segment.size:
            self._left.append((self.segment, [operation for *_, operation in self._used]))
            self.segment = Memory.create(max(2 * self.segment.size, 2 * nbytes))
            self._used, start = [], 0
        self._used.append((start, start + nbytes, operation))
        self._used.sort(key=itemgetter(0))
        return start

    def _tidy(self, is_read: Callable[[int], bool]) -> None:
        kept = []
        for memory, operations in self._left:
            unread = [operation for operation in operations if not is_read(operation)]
            if unread:
                kept.append((memory, unread))
            else:  # the file stays open: its number tells peers which segment they have mapped
                memory.give_back()
        self._left = kept

    def held_bytes(self) -> int:
        """Bytes that the segments take of this machine's memory."""
        return sum(memory.held_bytes() for memory in (self.segment, *(m for m, _ in self._left)))


def held_bytes() -> int:
    """Bytes that this process holds for its peers to read."""
    return sum(arena.held_bytes() for arena in _ARENAS)
