"""ZeRO-3: drop gathered parameters after the forward, gather them again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from autopar.ir.lowered import Collective

from .collectives import Spec, close, open_
from .group import Group


@dataclass
class _Bucket:
    """Parameters that are gathered together; `copies` are there while the backward uses them."""

    gather: Callable[[], tuple[Tensor, ...]]
    copies: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Handle:
    """Stands for a saved tensor that is a gathered parameter, or a view of one."""

    bucket: _Bucket
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_freed(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


class Regather:
    """Keeps track of gathered parameters in one forward, so that autograd saves handles to them."""

    def __init__(self) -> None:
        self._by_storage: dict[int, tuple[_Bucket, int, StorageWeakRef]] = {}
        self._last: _Bucket | None = None

    def register(
        self,
        op: Collective,
        specs: Sequence[Spec],
        group: Group,
        shards: Sequence[Tensor],
        gathered: Sequence[Tensor],
    ) -> None:
        """Note that `gathered` came from `shards` by `op`."""
        kept = tuple(s.detach() for s in shards)

        def gather() -> tuple[Tensor, ...]:
            with torch.no_grad():
                *edges, pending = open_(op, specs, group, *kept)
                return tuple(close(op, specs, group, pending, *edges))

        bucket = _Bucket(gather)
        for i, tensor in enumerate(gathered):
            storage = tensor.untyped_storage()
            self._by_storage[storage.data_ptr()] = (bucket, i, _weak(storage))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Autograd saves handles in place of gathered parameters inside this context."""
        self._use(None)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._by_storage.clear()

    def _use(self, bucket: _Bucket | None) -> None:
        """Let go of the copies of the last bucket when another one is wanted."""
        if self._last is not None and self._last is not bucket:
            self._last.copies = ()
        self._last = bucket

    def _pack(self, tensor: Tensor) -> Any:
        if not tensor.numel():
            return tensor
        found = self._by_storage.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        bucket, index, storage = found
        if _is_freed(storage):  # freed, and its memory is another tensor's now
            return tensor
        return _Handle(bucket, index, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Handle):
            assert isinstance(saved, Tensor)
            return saved
        self._use(saved.bucket)
        if not saved.bucket.copies:
            saved.bucket.copies = saved.bucket.gather()
        whole = saved.bucket.copies[saved.index]
        return whole.as_strided(saved.size, saved.stride, saved.offset)
