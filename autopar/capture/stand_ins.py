"""Capture modules whose parameters are not plain tensors here: on `meta`, or sharded already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar import compat


class SupportsOf(Protocol):
    """Gives one stand-in per tensor."""

    def of(self, tensor: Tensor) -> Tensor: ...


class StandIns:
    """Fake tensors of the same (global) shape, dtype and `requires_grad`, one per tensor.

    They claim to be on `device`, so that what forward makes on the default device fits them, and
    take no memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mode = compat.FakeTensorMode(shape_env=compat.ShapeEnv(), allow_non_fake_inputs=True)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # the original is kept, for its id

    def mode(self) -> contextlib.AbstractContextManager[Any]:
        """The mode in which operations on these tensors, and on none, compute nothing."""
        return self._mode

    def of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = (tensor, self._make(tensor))
        return self._made[id(tensor)][1]

    def known(self, tensor: Tensor) -> Tensor:
        """The stand-in of a tensor that has one, else the tensor."""
        return self._made.get(id(tensor), (tensor, tensor))[1]

    def _make(self, tensor: Tensor) -> Tensor:
        contiguous = isinstance(tensor, DTensor)  # its strides are those of a shard
        with self._mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            if not contiguous:
                fake = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device
                )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)


def need_stand_ins(module: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether any tensor of the module or the call has no plain values in this process."""
    return any(
        tensor.is_meta or isinstance(tensor, DTensor)
        for tensor in (*module.parameters(), *module.buffers(), *tensors)
    )


def device_of(module: nn.Module, tensors: Sequence[Tensor]) -> torch.device:
    """Where the module runs; the CPU if all of it is on `meta`."""
    for tensor in (*tensors, *module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def replaced(module: nn.Module, stand_ins: SupportsOf) -> Iterator[None]:
    """Put stand-ins in the place of all of a module's tensors, for the duration."""
    before: list[tuple[Any, str, Tensor]] = []
    recurrent = [m for m in module.modules() if isinstance(m, nn.RNNBase)]
    lists = [(m, m._flat_weights, m._flat_weight_refs) for m in recurrent]
    for child in module.modules():
        plain = {k: v for k, v in vars(child).items() if isinstance(v, Tensor) and v.is_meta}
        tensors: Any
        owner: Any
        for owner, tensors in (
            (child._parameters, child._parameters),
            (child._buffers, child._buffers),
            (vars(child), plain),
        ):
            before += [(owner, name, t) for name, t in tensors.items() if isinstance(t, Tensor)]
    try:
        for owner, name, tensor in before:
            owner[name] = stand_ins.of(tensor)
        for child, weights, refs in lists:  # what they read is this list
            child._flat_weights = [None if w is None else stand_ins.of(w) for w in weights]
            child._flat_weight_refs = [None] * len(refs)
        yield
    finally:
        for child, weights, refs in lists:
            child._flat_weights, child._flat_weight_refs = weights, refs
        for owner, name, tensor in before:
            owner[name] = tensor
