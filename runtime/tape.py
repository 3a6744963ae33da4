"""What was computed to make tensors whose memory was given back, so that it can be computed again.

Memory is named by a `Slot`. A `Node` is one op that wrote to slots; a `Ref` is a tensor in a slot
as it was when an op read it. Nodes of a slot are in order; `time` is a logical clock, later than
that of all nodes that touched the same slots before, so that replaying any set of nodes by their
times never reads what a later one wrote.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Tensors from elsewhere that ops read are copied up to this size: they may change before the op is
# replayed. Larger ones are kept as they are, and looked at again.
COPIED_BYTES = 1 << 20

# In-place ops whose result does not depend on what was there before.
_OVERWRITES = frozenset(
    {"zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "exponential_", "cauchy_",
     "log_normal_", "geometric_"}
)  # fmt: skip
_EMPTY = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"})
# Random ops that draw as many numbers whatever the values of their arguments: how many depends on
# shapes and strides only.
_DRAWS_BY_SHAPE = frozenset(
    {"normal_", "uniform_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_",
     "rand_like", "randn_like", "randint_like"}
)  # fmt: skip


@dataclass(eq=False)
class Slot:
    """Memory of `nbytes` on `device`, and the ops that wrote to it, in order.

    `meta` is a storage without memory in which layouts are worked out. `memory` is the real memory
    of a tensor that somebody may still have, `behind` that deferred tensors were written to since
    it was. `held` is memory that has to stay: then ops on it run at once and are not recorded.
    `read` says that another slot's node reads it.
    """

    nbytes: int
    device: torch.device
    meta: torch.UntypedStorage
    nodes: list[Node] = field(default_factory=list)
    time: int = 0
    memory: weakref.ref[torch.UntypedStorage] | None = None
    behind: bool = False
    held: torch.UntypedStorage | None = None
    read: bool = False


@dataclass(frozen=True, eq=False)
class Ref:
    """A tensor in a slot after the slot's first `version` nodes; sizes and strides in elements."""

    slot: Slot
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    version: int

    def in_storage(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor in real memory (or any other) in place of the slot."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)  # type: ignore[call-overload, no-any-return, unused-ignore]

    def covers(self) -> bool:
        """Whether every byte of the slot is an element of the tensor, once and in order."""
        numel = functools.reduce(lambda a, b: a * b, self.size, 1)
        if self.offset or numel * self.dtype.itemsize != self.slot.nbytes:
            return False
        dims = sorted((st, n) for st, n in zip(self.stride, self.size, strict=True) if n != 1)
        expected = 1
        for stride, size in dims:
            if stride != expected:
                return False
            expected *= size
        return True


@dataclass(eq=False)
class Constant:
    """A tensor that no recorded op made; `digest` tells whether it has changed (None: a copy)."""

    tensor: Tensor
    digest: int | None


@dataclass(eq=False)
class Node:
    """One op. In `args` and `kwargs` tensors are `Ref`s and `Constant`s.

    `outs` are the new tensors by their position among the op's results. `writes` are the slots
    written to, and whether nothing of what they held before is left. `generator` is the state of
    the random generator just before; `dtype` the default dtype.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outs: tuple[tuple[int, Ref], ...]
    writes: tuple[tuple[Slot, bool], ...]
    generator: Tensor | None
    dtype: torch.dtype
    time: int = 0

    def reads(self) -> list[Ref]:
        """Tensors whose values before the op matter."""
        overwritten = {id(slot) for slot, all_of_it in self.writes if all_of_it}
        refs = [x for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Ref)]
        return [ref for ref in refs if id(ref.slot) not in overwritten]


def slot_like(storage: torch.UntypedStorage, device: torch.device) -> Slot:
    """A slot for as much memory as a storage (which may be on `meta`) has."""
    meta = storage
    if storage.device.type != "meta":
        meta = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
    return Slot(meta.nbytes(), device, meta)


def ref_of(tensor: Tensor, slot: Slot) -> Ref:
    """The ref of a tensor (real or on `meta`) whose memory is the slot's, as it is now."""
    return Ref(
        slot,
        tuple(tensor.size()),
        tuple(tensor.stride()),
        int(tensor.storage_offset()),
        tensor.dtype,
        len(slot.nodes),
    )


def constant_of(tensor: Tensor) -> Constant:
    """A constant with the tensor's present values."""
    tensor = tensor.detach()
    if tensor.nbytes <= COPIED_BYTES:
        return Constant(tensor.clone(), None)
    return Constant(tensor, digest_of(tensor))


def digest_of(tensor: Tensor) -> int:
    """A number that differs, very likely, where the bits of two tensors of one shape differ."""
    if not tensor.numel():
        return 0
    words = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    wide = words[: words.numel() // 4 * 4].view(torch.int32)
    tail = int(words[words.numel() // 4 * 4 :].long().sum())
    if not wide.numel():
        return tail
    # Two sums: of the words, and of every third of them, so that most moves show too.
    return int(wide.sum(dtype=torch.int64)) * 31 + int(wide[::3].sum(dtype=torch.int64)) + tail


def append(node: Node) -> None:
    """Put a node at the end of all that it touches; drop what it makes irrelevant."""
    reads = node.reads()
    touched = {id(s): s for s in (*(r.slot for r in reads), *(s for s, _ in node.writes))}
    node.time = 1 + max((slot.time for slot in touched.values()), default=0)
    for slot in touched.values():
        slot.time = node.time
    written = {id(slot) for slot, _ in node.writes}
    for ref in reads:
        ref.slot.read |= id(ref.slot) not in written
    for slot, all_of_it in node.writes:
        if all_of_it and not slot.read and all(len(n.writes) == 1 for n in slot.nodes):
            slot.nodes.clear()
        slot.nodes.append(node)


def overwrites(func: Any, target: Ref, others: Sequence[Any]) -> bool:
    """Whether an in-place op leaves nothing of what was in the slot of its first argument."""
    if func.overloadpacket.__name__ not in _OVERWRITES or not target.covers():
        return False
    return all(not isinstance(x, Ref) or x.slot is not target.slot for x in others)


def draws_by_shape(func: Any) -> bool:
    """Whether a random op uses up as many numbers whatever the values of its arguments."""
    name = func.overloadpacket.__name__
    return name in _DRAWS_BY_SHAPE or (name == "bernoulli_" and func._overloadname == "float")


def makes_nothing(func: Any) -> bool:
    """Whether an op only gets memory: what is in it is left open."""
    packet = getattr(func, "overloadpacket", None)
    return packet is not None and packet.__name__ in _EMPTY


def is_random(func: Any) -> bool:
    """Whether an op draws from a generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random ops on a device draw from where none is given."""
    if device.type == "cuda":
        index: int | None = device.index
        return torch.cuda.default_generators[
            torch.cuda.current_device() if index is None else index
        ]
    return torch.default_generator
