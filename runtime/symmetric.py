"""Memory of a group's ranks that all of them can read and write inside a kernel."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.compat import symmetric_memory

from .arena import Memory
from .group import Group, ProcessGroupGroup
from .hosts import host_identity
from .kernels.all_reduce_norm import PROGRAMS, WORKSPACE_BYTES, Workspace
from .kernels.support import runs_on
from .shared_memory import SharedMemoryGroup

# Like shared memory's groups: one workspace for the life of a group, and None where there is none.
_WORKSPACES: weakref.WeakKeyDictionary[Any, dict[torch.device, Workspace | None]] = (
    weakref.WeakKeyDictionary()
)


def workspace_of(group: Group, device: torch.device) -> Workspace | None:
    """The group's workspace on this rank's device, or None on all ranks if they cannot have one.

    Collective at the first call. Ranks of one host have it: on GPUs by PyTorch's symmetric memory
    where every rank has a GPU of its own, on CPUs by memory files. A group whose ranks are threads
    has none: a kernel that waits for another would wait for ever.
    """
    known = _WORKSPACES.setdefault(group, {})
    if device not in known:
        known[device] = _make(group, device)
    return known[device]


def _make(group: Group, device: torch.device) -> Workspace | None:
    flat = group.flat if isinstance(group, SharedMemoryGroup) else group
    in_files = device.type == "cpu" and isinstance(group, SharedMemoryGroup)
    on_gpus = device.type != "cpu" and isinstance(flat, ProcessGroupGroup)
    # One rank without Triton, or with an older GPU, is enough for all to do without.
    if not (in_files or on_gpus) or not _all_agree(group, runs_on(device), device):
        return None
    if device.type == "cpu":
        return _in_files(group) if isinstance(group, SharedMemoryGroup) else None
    return _on_gpus(flat, device) if isinstance(flat, ProcessGroupGroup) else None


def _in_files(group: SharedMemoryGroup) -> Workspace | None:
    """A memory file per rank; the group has found out that its ranks can open each other's."""
    try:
        mine: Memory | None = Memory.create(WORKSPACE_BYTES)
    except OSError:
        mine = None
    fd = mine.fd if mine is not None else -1
    offers = group.all_gather(torch.tensor([[os.getpid(), fd]])).wait().tolist()
    try:
        memories = [
            mine if mine and rank == group.rank else Memory.open(pid, fd, WORKSPACE_BYTES)
            for rank, (pid, fd) in enumerate(offers)
        ]
    except (OSError, ValueError):  # no such file, or one that is too small
        memories = []
    if not _all_agree(group, bool(memories), torch.device("cpu")):
        return None
    addresses = [memory.bytes.data_ptr() for memory in memories]
    return _workspace(group.rank, addresses, torch.device("cpu"), tuple(memories))


def _on_gpus(group: ProcessGroupGroup, device: torch.device) -> Workspace | None:
    """PyTorch's symmetric memory; only ranks that run at once may wait for each other."""
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    everyone: list[Any] = [None] * group.size
    dist.all_gather_object(everyone, (host_identity(), gpu), group=group.process_group)
    if len({host for host, _ in everyone}) > 1 or len(set(everyone)) < group.size:
        return None
    try:
        made = symmetric_memory(WORKSPACE_BYTES, device, group.process_group)
    except (RuntimeError, ImportError):  # no peer access, or a build without it
        made = None
    if not _all_agree(group, made is not None, device) or made is None:
        return None
    return _workspace(group.rank, made[1], device, (made[0],))


def _all_agree(group: Group, fine: bool, device: torch.device) -> bool:
    answer = torch.tensor([int(fine)], dtype=torch.int32, device=device)
    return bool(group.all_reduce(answer, "min").wait().item())


def _workspace(
    rank: int, addresses: list[int], device: torch.device, owners: tuple[Any, ...]
) -> Workspace:
    table: Tensor = torch.tensor(addresses, dtype=torch.int64, device=device)
    counts = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
    return Workspace(rank, table, counts, owners)
