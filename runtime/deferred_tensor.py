"""The tensor without memory, and what is asked of it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from autopar.compat import (
    DTENSOR_SLOTS,
    FakeTensor,
    no_dispatch_modes,
    swap_tensors,
    wrapper_tensor,
)
from autopar.errors import ShardingWarning, UserError
from autopar.units import bytes_text

from .replay import memory_of, value_of
from .tape import Slot, ref_of, slot_like

HELD_BYTES = 1 << 20  # parameters up to this size are kept in memory without a word
_USE_IT = "call the model that autopar.parallelize returns"


class DeferredTensor(Tensor):
    """A tensor without memory: a place in a `Slot`.

    Ops on it are recorded; whatever reads its values (`item`, `print`, a comparison) computes them
    for the occasion.
    """

    # As DTensor, which it becomes: `_local_tensor` is a `meta` tensor of the layout in the slot's
    # `meta` storage, `_spec` the slot.
    __slots__ = DTENSOR_SLOTS
    _local_tensor: Tensor
    _spec: Slot
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layout: Tensor, slot: Slot) -> DeferredTensor:
        made: DeferredTensor = wrapper_tensor(cls, layout, slot.device)
        made._local_tensor = layout
        made._spec = slot
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        from .recording import call_deferred  # which makes such tensors

        leaves = tree_leaves((args, kwargs or {}))
        if any(isinstance(x, DTensor) and not isinstance(x, DeferredTensor) for x in leaves):
            raise UserError(
                f"{func} got a parameter under the plan and a tensor that was made of parameters "
                "before the model's first call, which has no memory",
                fix="make it after the first call, or after model.autopar.prepare(batch); or "
                "parallelize the model instead of its class",
            )
        return call_deferred(func, args, kwargs or {}, None)

    # Seen by `is_traceable_wrapper_subclass`, so that `module.to()` and its like swap tensors.
    def __tensor_flatten__(self) -> Any:
        raise UserError("a parameter without memory cannot be compiled", fix=_USE_IT)

    @staticmethod
    def __tensor_unflatten__(*args: Any) -> Any:
        raise UserError("a parameter without memory cannot be compiled", fix=_USE_IT)

    @property
    def data(self) -> Tensor:
        with torch.no_grad():
            return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        from .recording import recording

        place: Any = new
        if not isinstance(new, DeferredTensor):
            place = recording().parameter(new, False)
        become(self, DeferredTensor(place._local_tensor.detach(), place._spec))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            copy: Any = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=self.requires_grad)
            vars(copy).update(vars(self))
        else:
            copy = real_value(copy)
        memo[id(self)] = copy
        return copy  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        value: Any = real_value(self)
        if isinstance(self, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.requires_grad)
        return value.__reduce_ex__(protocol)

    def __repr__(  # type: ignore[override]
        self, *, tensor_contents: Any = None
    ) -> str:
        text = repr(real_value(self))
        return f"Parameter containing:\n{text}" if isinstance(self, nn.Parameter) else text

    def __format__(self, spec: str) -> str:
        return format(real_value(self), spec)

    def tolist(self) -> Any:
        return real_value(self).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return held(self, "numpy()").numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        return held(self, "numpy()").numpy().__array__(dtype)

    def data_ptr(self) -> int:
        return held(self, "data_ptr()").data_ptr()

    def share_memory_(self) -> Any:
        raise UserError("a parameter that has no memory yet cannot be shared", fix=_USE_IT)

    def is_shared(self) -> bool:
        return False

    def __dlpack_device__(self) -> Any:
        return held(self, "dlpack").__dlpack_device__()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return held(self, "dlpack").__dlpack__(*args, **kwargs)


def deferred_parameters(module: nn.Module) -> dict[str, DeferredTensor]:
    """The parameters that have no memory yet, each once, by their first names."""
    found: dict[str, Any] = dict(module.named_parameters())
    return {name: p for name, p in found.items() if isinstance(p, DeferredTensor)}


def real_value(tensor: Tensor) -> Tensor:
    """The values of a deferred tensor, computed now; other tensors as they are, without a graph."""
    if not isinstance(tensor, DeferredTensor):
        return tensor.detach()
    return value_of(ref_of(tensor._local_tensor, tensor._spec))


def become(tensor: DeferredTensor, new: DeferredTensor) -> None:
    """Make a deferred tensor another one, for everybody who holds it."""
    made: Any = new
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(new, requires_grad=tensor.requires_grad)
    vars(made).update(vars(tensor))
    swap_tensors(tensor, made)  # type: ignore[no-untyped-call]


def held(tensor: DeferredTensor, who: str) -> Tensor:
    """The tensor in memory that stays: what is written to it later is seen on both sides."""
    if tensor._spec.held is None:
        hold(tensor._spec, f"{who} asked for its memory")
    assert tensor._spec.held is not None
    return ref_of(tensor._local_tensor, tensor._spec).in_storage(tensor._spec.held)


def hold(slot: Slot, why: str, new: bool = True) -> None:
    """Keep the memory of a slot: that of a tensor which somebody has, else (with `new`) new one."""
    storage = slot.memory() if slot.memory is not None else None
    if storage is None and not new:
        return
    if storage is None:
        storage = memory_of(slot)
    elif slot.behind:
        bring_up_to_date(slot, storage)
    slot.held = storage
    warn_held(slot, why)


def warn_held(slot: Slot, why: str) -> None:
    """Say that the memory of a parameter stays, unless it is small."""
    if slot.nbytes > HELD_BYTES:
        warnings.warn(
            f"a parameter of {bytes_text(slot.nbytes)} is held whole in every process until the "
            f"model is planned: {why}",
            ShardingWarning,
            stacklevel=3,
        )


def bring_up_to_date(slot: Slot, storage: torch.UntypedStorage) -> None:
    """Do to real memory what was done to the parameter that is made of it."""
    with no_dispatch_modes():
        there, here = (
            torch.empty(0, dtype=torch.uint8, device=slot.device).set_(x)
            for x in (storage, memory_of(slot))
        )
        there.copy_(here)
    slot.behind = False


def in_place_of(tensor: Tensor) -> DeferredTensor:
    """A deferred tensor that is another name for a real one."""
    slot = slot_like(tensor.untyped_storage(), tensor.device)
    slot.held = tensor.untyped_storage()
    return DeferredTensor(layout_in(slot, tensor), slot)


def layout_in(slot: Slot, tensor: Tensor) -> Tensor:
    """The layout of a real tensor in the slot that stands for its memory."""
    return ref_of(tensor, slot).in_storage(slot.meta)


def has_memory(x: Any) -> bool:
    """Whether it is an ordinary tensor with memory of its own."""
    return (
        isinstance(x, Tensor)
        and not isinstance(x, (DeferredTensor, DTensor, FakeTensor))
        and x.layout is torch.strided
        and not x.is_meta
    )


def memory_key(tensor: Tensor) -> int:
    """What two tensors have in common while they share memory."""
    key: int = tensor.untyped_storage()._cdata
    return key
