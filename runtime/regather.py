"""ZeRO-3: drop gathered parameters after the forward, gather them again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from autopar.ir.lowered import Collective

from .collectives import Spec, Use, close, open_
from .group import Group

Finish = Callable[[], tuple[Tensor, ...]]


@dataclass(eq=False)
class _Bucket:
    """Parameters that are gathered together; `copies` are there while the backward uses them.

    A source is a shard, or stands for what another bucket gathers on another mesh axis.
    """

    begin: Callable[[Sequence[Tensor]], Finish]
    sources: tuple[Tensor | _Handle, ...]
    before: _Bucket | None
    """What was gathered before it in the forward: what the backward wants after it."""
    saved: bool = False
    copies: tuple[Tensor, ...] = ()
    flight: Finish | None = None

    def chain(self) -> set[_Bucket]:
        """This bucket and those that it is made of."""
        found = {self}
        for source in self.sources:
            if isinstance(source, _Handle):
                found |= source.bucket.chain()
        return found

    def upcoming(self) -> _Bucket | None:
        """The next bucket that the backward will want, if it wants them in reverse order."""
        mine, found = self.chain(), self.before
        while found is not None and (not found.saved or found in mine):
            found = found.before
        return found

    def start(self) -> None:
        """Ask for it, or for what it is made of."""
        missing = [s.bucket for s in self.sources if isinstance(s, _Handle)]
        missing = [bucket for bucket in missing if not bucket.copies]
        for bucket in missing:
            bucket.start()
        if not missing and not self.copies and self.flight is None:
            self.flight = self._begin()

    def fill(self) -> None:
        """Gather what is not there."""
        if not self.copies:
            finish, self.flight = self.flight or self._begin(), None
            self.copies = finish()

    def _begin(self) -> Finish:
        return self.begin([s.tensor() if isinstance(s, _Handle) else s for s in self.sources])

    def drop(self) -> None:
        """Let go of the copies; what is on its way is received all the same."""
        if self.flight is not None:
            self.flight()
        self.copies, self.flight = (), None


@dataclass(frozen=True)
class _Handle:
    """Stands for a saved tensor that is a gathered parameter, or a view of one."""

    bucket: _Bucket
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The tensor, gathered again if it is not there."""
        self.bucket.fill()
        whole = self.bucket.copies[self.index]
        return whole.as_strided(self.size, self.stride, self.offset)


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_freed(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


class Regather:
    """Keeps track of gathered parameters in one forward, so that autograd saves handles to them."""

    def __init__(self, ahead: bool = False) -> None:
        """`ahead`: the backward asks for a bucket when it begins to use the one before."""
        self._ahead = ahead
        self._newest: _Bucket | None = None
        self._by_storage: dict[int, tuple[_Bucket, int, StorageWeakRef]] = {}
        # Weak, so that the last bucket goes with the graph that saved handles to it.
        self._there: WeakSet[_Bucket] = WeakSet()
        self._saving = False

    def register(
        self,
        op: Collective,
        specs: Sequence[Spec],
        group: Group,
        sources: Sequence[Tensor],
        gathered: Sequence[Tensor],
        kernel: Use = None,
    ) -> None:
        """Note that `gathered` came from `sources` by `op`; those may be gathered ones themselves.

        Nothing is noted where autograd saves no handles: in a region that the backward runs again.
        """
        if not self._saving:
            return

        def begin(tensors: Sequence[Tensor]) -> Finish:
            with torch.no_grad():
                *edges, pending = open_(op, specs, group, *tensors, kernel=kernel)

            def finish() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return tuple(close(op, specs, group, pending, *edges))

            return finish

        made_of = tuple(self._handle(s.detach()) for s in sources)
        bucket = self._newest = _Bucket(begin, made_of, self._newest)
        for i, tensor in enumerate(gathered):
            storage = tensor.untyped_storage()
            self._by_storage[storage.data_ptr()] = (bucket, i, _weak(storage))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Autograd saves handles in place of gathered parameters inside this context."""
        self._use(set())
        self._saving = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._saving, self._newest = False, None
            self._by_storage.clear()

    def _use(self, chain: set[_Bucket]) -> None:
        """Let go of the copies of all other buckets."""
        for bucket in set(self._there) - chain:
            bucket.drop()
        self._there = WeakSet(chain)

    def _pack(self, tensor: Tensor) -> Any:
        packed = self._handle(tensor)
        if isinstance(packed, _Handle):
            packed.bucket.saved = True
        return packed

    def _handle(self, tensor: Tensor) -> Tensor | _Handle:
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
        bucket = saved.bucket
        upcoming = bucket.upcoming() if self._ahead else None
        self._use(bucket.chain() | (upcoming.chain() if upcoming is not None else set()))
        found = saved.tensor()
        if upcoming is not None:
            upcoming.start()
        return found
