"""Ranks that share a GPU: their messages go through the host's memory.

NCCL refuses two ranks on one device. Such runs are for checking a plan on the GPU at hand, not for
speed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .group import Group, InFlight


def ranks_share_devices() -> bool:
    """Whether this host has more ranks than GPUs, by torchrun's environment; warns once if so."""
    if not torch.cuda.is_available():
        return False
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    found = torch.cuda.device_count()
    if local > found:
        _tell(local, found)
    return local > found


@cache
def _tell(ranks: int, devices: int) -> None:
    """Warn once: where each rank was shown a GPU of its own alone, sharing is not meant."""
    warnings.warn(
        f"{ranks} ranks of this host see {devices} GPU{'s' if devices > 1 else ''}: they share"
        " devices, and their messages go through the host's memory, which is slow; let every rank"
        " see all GPUs if each has its own",
        stacklevel=4,
    )


def local_gpu() -> torch.device:
    """This rank's GPU: that of its number on the host, shared where there are fewer."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local % torch.cuda.device_count())


class HostStagedGroup:
    """A group whose members' tensors are copied to the host, sent by `inner`, and copied back."""

    def __init__(self, inner: Group) -> None:
        self.inner = inner
        self.size = inner.size
        self.rank = inner.rank

    def wait(self, inflight: InFlight) -> Tensor:
        """What `inflight.wait()` gives."""
        return inflight.wait()

    def all_reduce(self, x: Tensor, op: str = "sum", in_place: bool = False) -> InFlight:
        """See `Group`; in place, the result is written to `x`."""
        copied = x.detach().to("cpu", copy=True)
        flight = self.inner.all_reduce(copied, op, in_place=True)
        if in_place:
            return InFlight(lambda: x.copy_(flight.wait()))
        return _back(flight, x)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        """See `Group`."""
        return _back(self.inner.all_gather(x.cpu(), sizes), x)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> InFlight:
        """See `Group`."""
        return _back(self.inner.reduce_scatter(x.cpu(), sizes), x)

    def all_to_all(
        self, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> InFlight:
        """See `Group`."""
        return _back(self.inner.all_to_all(x.cpu(), out_splits, in_splits), x)

    def broadcast(self, x: Tensor, source: int = 0) -> InFlight:
        """See `Group`."""
        return _back(self.inner.broadcast(x.cpu(), source), x)


def _back(flight: InFlight, like: Tensor) -> InFlight:
    return InFlight(lambda: flight.wait().to(like.device, copy=True))
