"""Collectives between CPU ranks of one host, through shared memory.

Gloo sends over TCP loopback: an all-reduce of 1 KiB among 4 ranks takes about a millisecond, one of
100 MB several hundred, with long stalls. Ranks of one host can read each other's memory: the same
take tens of microseconds, and what copying the bytes takes.

Every rank owns a control block and data segments (anonymous memory files, which the kernel frees
with their processes) and is the only one to write to them. Operation `k` of a group is posted by
copying its input into a segment, writing where it lies into slot `k` of the control block and then
raising the slot's flag; whoever waits looks at the flags of its peers, first spinning, then
sleeping on a futex. A second flag value says that a rank's share of a reduction is ready, a second
array of flags that a rank has read all it needs, so that the memory may be used again. Nobody ever
waits for room: a rank that has none makes a larger segment.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from .arena import ALIGN, Arena, Memory
from .group import Group, InFlight, ProcessGroupGroup, done
from .hosts import even_hosts, host_identity
from .two_level import TwoLevelGroup

SLOTS = 1024  # operations of a group that may be under way at once
_FLAG, _READ, _WHERE = 0, 4 * SLOTS, 8 * SLOTS  # offsets in the control block
_NONCE = _WHERE + 16 * SLOTS
_CONTROL_BYTES = _NONCE + 16

# All-reduces up to this size are read whole by every member: one round of flags, not two.
ONE_ROUND_BYTES = 1 << 17

_SPIN_S = 2e-4  # longer than ranks that compute the same are usually apart
_GIVE_UP_S = 1800.0
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_SYS_FUTEX = 202  # x86-64


# One group for all users of a process group: segments, like sockets, are kept for its life.
_GROUPS: weakref.WeakKeyDictionary[dist.ProcessGroup, Group] = weakref.WeakKeyDictionary()


def make_group(process_group: dist.ProcessGroup | None = None) -> Group:
    """The fastest group for these ranks: shared memory on one host, and inside each of several.

    Collective. `AUTOPAR_SHARED_MEMORY=0` in the environment turns shared memory off.
    """
    live = process_group if process_group is not None else dist.group.WORLD
    assert live is not None
    if live not in _GROUPS:
        _GROUPS[live] = _make(live)
    return _GROUPS[live]


@dataclass(frozen=True)
class _Offer:
    """Where a member is, and its control blocks: two, for hosts take part in two phases.

    The blocks hold the `nonce`: another container may have a process of the same number.
    """

    host: str
    pid: int
    controls: tuple[int, int] | None
    nonce: bytes


def _make(process_group: dist.ProcessGroup) -> Group:
    flat = ProcessGroupGroup(process_group)
    if flat.size == 1:
        return flat
    controls = [Memory.create(_CONTROL_BYTES) for _ in range(2)] if _supported() else None
    fds = (controls[0].fd, controls[1].fd) if controls is not None else None
    nonce = os.urandom(16)
    for control in controls or ():
        control.map[_NONCE:_CONTROL_BYTES] = nonce
    offer = _Offer(host_identity(), os.getpid(), fds, nonce)
    everyone: list[Any] = [None] * flat.size
    dist.all_gather_object(everyone, offer, group=process_group)
    inside = even_hosts([other.host for other in everyone])
    if inside is None:  # every rank sees it
        return flat
    first = flat.rank // inside * inside
    local, me = everyone[first : first + inside], flat.rank - first
    peers = [_opened(local, me, controls, phase) for phase in range(2)]
    agreed: list[bool] = [False] * flat.size
    dist.all_gather_object(agreed, all(peers), group=process_group)
    groups = [SharedMemoryGroup(flat, p, me) for p in peers if p] if inside > 1 else []
    if inside < flat.size:
        if inside == 1:
            return TwoLevelGroup(flat, process_group, None, None)
        return TwoLevelGroup(flat, process_group, *groups) if all(agreed) else flat
    return groups[0] if all(agreed) else flat


def _supported() -> bool:
    """Linux on x86-64, whose stores become visible in order, which the flags rely on."""
    wanted = os.environ.get("AUTOPAR_SHARED_MEMORY", "1") != "0"
    return wanted and sys.platform == "linux" and platform.machine() == "x86_64"


def _opened(
    members: Sequence[_Offer], rank: int, controls: Sequence[Memory] | None, phase: int
) -> list[_Peer] | None:
    """The control blocks of all members of this host, or None if one is out of reach."""
    peers = []
    for member, other in enumerate(members):
        if controls is None or other.controls is None:
            return None
        try:
            memory = (
                controls[phase]
                if member == rank
                else Memory.open(other.pid, other.controls[phase], _CONTROL_BYTES)
            )
        except (OSError, ValueError):  # no such file, or one that is too small
            return None
        if memory.map[_NONCE:_CONTROL_BYTES] != other.nonce:
            return None
        peers.append(_Peer(other.pid, memory))
    return peers


class _Peer:
    """One member's control block and, as they become known, its data segments."""

    def __init__(self, pid: int, control: Memory) -> None:
        self.pid = pid
        self.control = control
        whole: NDArray[np.uint8] = control.bytes.numpy()
        self.flags = whole[_FLAG:_READ].view(np.int32)
        self.reads = whole[_READ:_WHERE].view(np.int32)
        self.address = control.bytes.data_ptr()
        self._segments: dict[int, Memory] = {}

    def locate(self, slot: int) -> tuple[int, int, int]:
        """(file descriptor, segment size, offset) of the data of a slot."""
        fd, offset, size = struct.unpack_from("<iIq", self.control.map, _WHERE + 16 * slot)
        return fd, size, offset * ALIGN

    def data(self, slot: int, count: int, dtype: torch.dtype, start: int = 0) -> Tensor:
        """`count` elements of the data of a slot, from byte `start` on."""
        fd, size, offset = self.locate(slot)
        if fd not in self._segments or self._segments[fd].size != size:
            self._segments[fd] = Memory.open(self.pid, fd, size)
        return self._segments[fd].view(offset + start, count, dtype)


class SharedMemoryGroup:
    """A group of ranks of one host. Tensors that are not on the CPU go through `fallback`.

    The results are the same on every rank: reductions add in the order of the members.
    """

    def __init__(self, fallback: Group, peers: list[_Peer], rank: int) -> None:
        self._fallback = fallback
        self._peers = peers
        self._me = peers[rank]
        self._arena = Arena()
        self._count = 0
        self._spins = len(os.sched_getaffinity(0)) >= len(peers)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.size = len(peers)
        self.rank = rank

    @property
    def flat(self) -> Group:
        """The same ranks for tensors that are not on the CPU."""
        return self._fallback

    def wait(self, inflight: InFlight) -> Tensor:
        return inflight.wait()

    # -- collectives ----------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: str = "sum", in_place: bool = False) -> InFlight:
        if x.device.type != "cpu" or x.is_complex():
            return self._fallback.all_reduce(x, op, in_place)
        if not x.numel():
            return done(x)
        x = x.contiguous()
        n, small = x.numel(), x.nbytes <= ONE_ROUND_BYTES
        share = -(-n // self.size)
        k = self._post(x, extra=0 if small else share * x.element_size())

        def finish() -> Tensor:
            out = x if in_place else torch.empty_like(x)
            flat = out.view(-1)
            if small:
                parts = [self._read(m, k, n, x.dtype) for m in range(self.size)]
                _reduce(parts, op, flat)
                self._finish(k)
                return out
            low, high = min(self.rank * share, n), min((self.rank + 1) * share, n)
            skip, width = self._start(x), x.element_size()
            mine = self._me.data(k % SLOTS, high - low, x.dtype, skip)
            parts = [self._read(m, k, high - low, x.dtype, low * width) for m in range(self.size)]
            if high > low:
                _reduce(parts, op, mine)
            self._raise(k, 1)
            for member in range(self.size):
                a, b = min(member * share, n), min((member + 1) * share, n)
                self._await(member, k, 1)
                if b > a:
                    flat[a:b].copy_(self._peers[member].data(k % SLOTS, b - a, x.dtype, skip))
            self._finish(k)
            return out

        return InFlight(finish)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        if x.device.type != "cpu":
            return self._fallback.all_gather(x, sizes)
        lengths = [x.shape[0]] * self.size if sizes is None else list(sizes)
        x = x.contiguous()
        k = self._post(x)

        def finish() -> Tensor:
            out = x.new_empty((sum(lengths), *x.shape[1:]))
            pieces = out.split(lengths)  # type: ignore[no-untyped-call]
            for member, piece in enumerate(pieces):
                if piece.numel():
                    source = self._read(member, k, piece.numel(), x.dtype)
                    piece.copy_(source.view(piece.shape))
                else:
                    self._await(member, k, 0)
            self._finish(k)
            return out

        return InFlight(finish)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        if x.device.type != "cpu" or x.is_complex():
            return self._fallback.reduce_scatter(x, sizes)
        lengths = [x.shape[0] // self.size] * self.size if sizes is None else list(sizes)
        x = x.contiguous()
        k = self._post(x)

        def finish() -> Tensor:
            out = x.new_empty((lengths[self.rank], *x.shape[1:]))
            row = x[:1].numel() * x.element_size() if x.shape[0] else 0
            start = sum(lengths[: self.rank]) * row
            parts = [self._read(m, k, out.numel(), x.dtype, start) for m in range(self.size)]
            if out.numel():
                _reduce(parts, "sum", out.view(-1))
            self._finish(k)
            return out

        return InFlight(finish)

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        if x.device.type != "cpu":
            return self._fallback.all_to_all(x, out_splits, in_splits)
        x = x.contiguous()
        ends = np.cumsum([0, *in_splits])
        # Where each member's piece begins, in rows, goes before the data.
        header = torch.tensor([int(e) for e in ends], dtype=torch.int64)
        k = self._post(x, header=header)

        def finish() -> Tensor:
            out = x.new_empty((sum(out_splits), *x.shape[1:]))
            row = 1
            for size in x.shape[1:]:
                row *= size
            skip = -(-header.nbytes // ALIGN) * ALIGN
            pieces = out.split(list(out_splits))  # type: ignore[no-untyped-call]
            for member, piece in enumerate(pieces):
                bounds = self._read(member, k, self.size + 1, torch.int64)
                first, last = int(bounds[self.rank]), int(bounds[self.rank + 1])
                if last - first != piece.shape[0]:
                    raise RuntimeError(
                        f"all_to_all expects {piece.shape[0]} rows of member {member}, "
                        f"which sends {last - first}"
                    )
                if piece.numel():
                    at = skip + first * row * x.element_size()
                    source = self._peers[member].data(k % SLOTS, piece.numel(), x.dtype, at)
                    piece.copy_(source.view(piece.shape))
            self._finish(k)
            return out

        return InFlight(finish)

    def broadcast(self, x: Tensor, source: int = 0) -> InFlight:
        if x.device.type != "cpu":
            return self._fallback.broadcast(x, source)
        x = x.contiguous()
        k = self._post(x if self.rank == source else x.new_empty(0))

        def finish() -> Tensor:
            out = self._read(source, k, x.numel(), x.dtype).clone().view(x.shape)
            self._finish(k)
            return out

        return InFlight(finish)

    # -- slots and flags --------------------------------------------------------------------------

    def _post(self, x: Tensor, extra: int = 0, header: Tensor | None = None) -> int:
        """Copy the input (after a header; room for `extra` bytes behind it) and raise the flag."""
        k = self._count
        self._count += 1
        if k >= SLOTS:  # the slot's last operation must have been read by all
            for member in range(self.size):
                self._sleep_until(
                    partial(self._has_read, member, k - SLOTS), self._peers[member], k, _READ
                )
        skip = 0 if header is None else -(-header.nbytes // ALIGN) * ALIGN
        offset = self._arena.take(skip + self._start(x) + extra, k, self._all_read)
        segment = self._arena.segment
        if header is not None:
            segment.view(offset, header.numel(), header.dtype).copy_(header)
        if x.numel():
            segment.view(offset + skip, x.numel(), x.dtype).copy_(x.detach().view(-1))
        where = _WHERE + 16 * (k % SLOTS)
        struct.pack_into(
            "<iIq", self._me.control.map, where, segment.fd, offset // ALIGN, segment.size
        )
        self._raise(k, 0)
        return k

    @staticmethod
    def _start(x: Tensor) -> int:
        """Bytes that the input takes, aligned: where a share of the result begins."""
        return -(-x.nbytes // ALIGN) * ALIGN

    def _read(self, member: int, k: int, count: int, dtype: torch.dtype, start: int = 0) -> Tensor:
        """A member's input, once it is there."""
        self._await(member, k, 0)
        return self._peers[member].data(k % SLOTS, count, dtype, start)

    def _raise(self, k: int, phase: int) -> None:
        self._me.flags[k % SLOTS] = _stamp(k, phase)
        self._wake(_FLAG + 4 * (k % SLOTS))

    def _finish(self, k: int) -> None:
        self._me.reads[k % SLOTS] = _stamp(k, 0)
        if self._count > SLOTS // 2:
            self._wake(_READ + 4 * (k % SLOTS))

    def _await(self, member: int, k: int, phase: int) -> None:
        """Wait until a member's flag of operation `k` has reached a phase."""
        flags, slot = self._peers[member].flags, k % SLOTS
        wanted = (_stamp(k, 1),) if phase else (_stamp(k, 0), _stamp(k, 1))
        if flags[slot] in wanted:
            return
        self._sleep_until(lambda: flags[slot] in wanted, self._peers[member], k, _FLAG)

    def _has_read(self, member: int, k: int) -> bool:
        # A peer may be a round of slots ahead: of a broadcast it only needs the source.
        seen = self._peers[member].reads[k % SLOTS]
        return bool(seen == _stamp(k, 0) or seen == _stamp(k + SLOTS, 0))

    def _all_read(self, k: int) -> bool:
        return all(self._has_read(member, k) for member in range(self.size))

    def _sleep_until(self, reached: Callable[[], bool], peer: _Peer, k: int, table: int) -> None:
        start = time.perf_counter()
        if self._spins:
            while time.perf_counter() - start < _SPIN_S:
                if reached():
                    return
        values = peer.flags if table == _FLAG else peer.reads
        address = peer.address + table + 4 * (k % SLOTS)
        while True:
            seen = int(values[k % SLOTS])
            if reached():
                return
            self._futex(address, _FUTEX_WAIT, seen, 0.5)
            if time.perf_counter() - start > 1.0 and not _alive(peer.pid) and not reached():
                raise RuntimeError(f"process {peer.pid} of the group has ended")
            if time.perf_counter() - start > _GIVE_UP_S:
                raise RuntimeError(f"no answer from process {peer.pid} in {_GIVE_UP_S} s")

    def _wake(self, offset: int) -> None:
        self._futex(self._me.address + offset, _FUTEX_WAKE, 1 << 30, None)

    def _futex(self, address: int, call: int, value: int, timeout_s: float | None) -> None:
        limit = None
        if timeout_s is not None:
            limit = ctypes.byref(_TimeSpec(int(timeout_s), int(timeout_s % 1 * 1e9)))
        self._libc.syscall(
            _SYS_FUTEX, ctypes.c_void_p(address), call, ctypes.c_int(value), limit, None, 0
        )


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _stamp(k: int, phase: int) -> int:
    """A flag value that is unlike those of other operations of the slot; 0 is for none."""
    return ((2 * k + phase) % 0x7FFFFFF0) + 1


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _reduce(parts: Sequence[Tensor], op: str, out: Tensor) -> None:
    """Combine equal pieces in order into `out`."""
    if op == "sum":
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out.add_(part)
        return
    combine = torch.maximum if op == "max" else torch.minimum
    combine(parts[0], parts[1], out=out)
    for part in parts[2:]:
        combine(out, part, out=out)
