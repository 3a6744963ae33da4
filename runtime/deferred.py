"""Parameters that have no memory until a plan says which part of them this process keeps.

Inside `deferred()`, a module's `__init__` runs as always: its tensors are real, except that a
parameter gives its memory back as soon as it is made. What was computed to make it, and what is
done to it afterwards, is recorded (`tape`) and computed again when the values are wanted
(`replay`): the same ops in the same order with the state of the random generator from before each
random op, so that the values are those of one device to the last bit. Random ops are run at once as
well, on memory that is thrown away, so that the generator is where it would be on one device.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from autopar.compat import (
    DTENSOR_SLOTS,
    FakeTensor,
    TorchDispatchMode,
    active_dispatch_modes,
    no_dispatch_modes,
    swap_tensors,
    with_aliasing,
    wrapper_tensor,
)
from autopar.errors import ShardingWarning, UserError
from autopar.units import bytes_text

from .replay import memory_of, value_of
from .scratch import Scratch, trim
from .tape import (
    Constant,
    Node,
    Ref,
    Slot,
    append,
    constant_of,
    default_generator,
    draws_by_shape,
    is_random,
    overwrites,
    ref_of,
    slot_like,
)

HELD_BYTES = 1 << 20  # parameters up to this size are kept in memory without a word
TRIMMED_BYTES = 1 << 28  # of real tensors made, after which the heap is trimmed
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
        return _call_deferred(func, args, kwargs or {}, None)

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
        place: Any = new
        if not isinstance(new, DeferredTensor):
            modes = [m for m in active_dispatch_modes() if isinstance(m, _Recording)]
            place = (modes or [_Recording()])[-1].parameter(new, False)
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


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the ops on real tensors too, and makes parameters deferred ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots: dict[int, Slot] = {}  # of real memory, by its address in torch
        self._shared: set[int] = set()  # ids of the slots of parameters
        self.scratch = Scratch()
        self._made = 0  # bytes since the heap was trimmed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, DeferredTensor) for x in tree_leaves((args, kwargs))):
            return _call_deferred(func, args, kwargs, self)
        for tensor in tree_leaves((args, kwargs)):
            slot = self.slot_of(tensor)
            if slot is not None and slot.behind:
                _bring_up_to_date(slot, tensor.untyped_storage())
        return self.run(func, args, kwargs, args, kwargs)

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, real_args: Any, real_kwargs: Any
    ) -> Any:
        """Run an op on real tensors, and record it as an op on `args` and `kwargs`."""
        given = {_key(x) for x in tree_leaves((real_args, real_kwargs)) if _has_memory(x)}
        generator = _generator_state(func, real_args, real_kwargs)
        written = [x for x in _written(func, args, kwargs) if self.slot_of(x) is not None]
        kept = tree_map_only(Tensor, self.kept, (args, kwargs)) if written else None
        out = func(*real_args, **real_kwargs)
        fresh = [
            (i, x)
            for i, x in enumerate(tree_leaves(out))
            if _has_memory(x) and _key(x) not in given and self.slot_of(x) is None
        ]
        if fresh or written:
            if kept is None:
                kept = tree_map_only(Tensor, self.kept, (args, kwargs))
            self._made += sum(x.nbytes for _, x in fresh)
            if self._made > TRIMMED_BYTES:
                trim()
                self._made = 0
            outs = tuple((i, ref_of(x, self._new_slot(x))) for i, x in fresh)
            _record(func, kept, outs, [self.kept(x) for x in written], generator)
        return out

    def kept(self, tensor: Tensor) -> Ref | Constant:
        """A tensor as the argument of a node."""
        slot = self.slot_of(tensor)
        if slot is None and isinstance(tensor, DeferredTensor):
            return Constant(real_value(tensor).clone(), None)
        if slot is None:
            return constant_of(tensor)
        return ref_of(tensor._local_tensor if isinstance(tensor, DeferredTensor) else tensor, slot)

    def slot_of(self, tensor: Any) -> Slot | None:
        """The slot of a tensor if what is done to it is recorded."""
        slot = None
        if isinstance(tensor, DeferredTensor):
            slot = tensor._spec
        elif _has_memory(tensor):
            slot = self._slots.get(_key(tensor))
        return slot if slot is not None and slot.held is None else None

    def _new_slot(self, tensor: Tensor) -> Slot:
        storage = tensor.untyped_storage()
        key, slots = storage._cdata, self._slots
        slot = slots[key] = slot_like(storage, tensor.device)
        slot.memory = weakref.ref(storage, lambda _: slots.pop(key, None) and None)
        return slot

    def parameter(self, data: Tensor, requires_grad: bool) -> nn.Parameter:
        """A deferred parameter in the place of the real tensor that it is to be made of."""
        slot = self.slot_of(data)
        if slot is None:
            made = _in_place_of(data)
            _warn_held(made._spec, "it was made of a tensor that no torch op inside made")
        else:
            self._shared.add(id(slot))
            made = DeferredTensor(_layout_in(slot, data), slot)
        return nn.Parameter(made, requires_grad)

    def close(self) -> None:
        """Keep the memory that a parameter shares with a tensor which somebody still has."""
        for slot in list(self._slots.values()):
            if id(slot) in self._shared and slot.held is None:
                _hold(slot, "the tensor that it was made of is in use elsewhere", new=False)
        self._slots.clear()
        trim()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Build modules whose parameters take no memory until `autopar.parallelize` has a plan.

    Every process then computes, one parameter at a time, the values that one device would have, and
    keeps its own part. Buffers and all other tensors are real at once. Random numbers are drawn as
    on one device, so that what follows draws the same, too. Code that initialises, ties, casts or
    loads parameters works, inside and afterwards. Parameters that have to stay in memory (what they
    are made of is in use elsewhere, or something asked for their address) cause a `ShardingWarning`
    that says why.
    """
    if any(isinstance(mode, _Recording) for mode in active_dispatch_modes()):
        yield
        return
    mode = _Recording()
    original = nn.Parameter.__dict__["__new__"]

    def new(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        if cls is not nn.Parameter or not _has_memory(data):
            return original.__func__(cls, data, requires_grad)
        return mode.parameter(data, requires_grad)

    parameter: Any = nn.Parameter
    parameter.__new__ = staticmethod(new)
    try:
        with mode:
            yield
    finally:
        parameter.__new__ = original
        mode.close()


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
        _hold(tensor._spec, f"{who} asked for its memory")
    assert tensor._spec.held is not None
    return ref_of(tensor._local_tensor, tensor._spec).in_storage(tensor._spec.held)


def _hold(slot: Slot, why: str, new: bool = True) -> None:
    """Keep the memory of a slot: that of a tensor which somebody has, else (with `new`) new one."""
    storage = slot.memory() if slot.memory is not None else None
    if storage is None and not new:
        return
    if storage is None:
        storage = memory_of(slot)
    elif slot.behind:
        _bring_up_to_date(slot, storage)
    slot.held = storage
    _warn_held(slot, why)


def _warn_held(slot: Slot, why: str) -> None:
    if slot.nbytes > HELD_BYTES:
        warnings.warn(
            f"a parameter of {bytes_text(slot.nbytes)} is held whole in every process until the "
            f"model is planned: {why}",
            ShardingWarning,
            stacklevel=3,
        )


def _bring_up_to_date(slot: Slot, storage: torch.UntypedStorage) -> None:
    """Do to real memory what was done to the parameter that is made of it."""
    with no_dispatch_modes():
        there, here = (
            torch.empty(0, dtype=torch.uint8, device=slot.device).set_(x)
            for x in (storage, memory_of(slot))
        )
        there.copy_(here)
    slot.behind = False


def _call_deferred(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: _Recording | None
) -> Any:
    """Record an op with deferred arguments, or run it where that is not possible."""
    mode = mode or _Recording()
    written = _written(func, args, kwargs)
    if func.overloadpacket.__name__ in ("set_", "resize_"):
        raise UserError(
            f"{func.overloadpacket.__name__}() of a parameter that has no memory yet",
            fix="build the model outside of autopar.deferred(), or after its first call",
        )
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch_modes():
            return with_aliasing(func, args, kwargs, _on_layouts(func, args, kwargs))
    recordable = all(
        isinstance(x, DeferredTensor) and x._spec.held is None for x in written
    ) and all(str(r.type) in ("Tensor", "List[Tensor]") for r in func._schema.returns)
    if not recordable or (is_random(func) and not draws_by_shape(func)):
        return _on_values(func, args, kwargs, mode)
    try:
        with no_dispatch_modes():
            layouts = _on_layouts(func, args, kwargs)
    except Exception:  # it depends on values, or is as wrong as it would be on real tensors
        if func.is_view:
            raise
        return _on_values(func, args, kwargs, mode)
    slots = {
        _key(x._local_tensor): x._spec
        for x in tree_leaves((args, kwargs))
        if isinstance(x, DeferredTensor)
    }
    made = [(i, x) for i, x in enumerate(tree_leaves(layouts)) if isinstance(x, Tensor)]
    fresh = [(i, x) for i, x in made if _key(x) not in slots]
    if fresh or written:
        generator = _generator_state(func, args, kwargs)
        kept = tree_map_only(Tensor, mode.kept, (args, kwargs))
        if generator is not None:
            _draw(func, args, kwargs, mode.scratch)
        device = kwargs.get("device") or next(iter(slots.values())).device
        for _, layout in fresh:
            slots[_key(layout)] = slot_like(layout.untyped_storage(), torch.device(device))
        outs = tuple((i, ref_of(x, slots[_key(x)])) for i, x in fresh)
        _record(func, kept, outs, [mode.kept(x) for x in written], generator)
        for tensor in written:
            if isinstance(tensor, DeferredTensor):
                tensor._spec.behind = True
    out = tree_map_only(Tensor, lambda x: DeferredTensor(x, slots[_key(x)]), layouts)
    return with_aliasing(func, args, kwargs, out)


def _on_layouts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an op as tensors on `meta`."""

    def layout(x: Tensor) -> Tensor:
        if isinstance(x, DeferredTensor):
            return x._local_tensor
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")

    args, kwargs = tree_map_only(Tensor, layout, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("meta")
    for name in ("generator", "pin_memory"):
        if kwargs.get(name) is not None:
            kwargs[name] = None
    return func(*args, **kwargs)


def _draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scratch: Scratch) -> None:
    """Draw the random numbers of an op on some tensor, for the generator's sake; forget them."""
    with no_dispatch_modes(), torch.no_grad():
        args, kwargs = tree_map_only(DeferredTensor, scratch.like, (args, kwargs))
        func(*args, **kwargs)


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: _Recording) -> Any:
    """Run an op on the values of its arguments; record what it does to those without memory."""
    memory: dict[int, torch.UntypedStorage] = {}

    def real(x: DeferredTensor) -> Tensor:
        key = id(x._spec)
        if key not in memory:
            memory[key] = memory_of(x._spec)
        return ref_of(x._local_tensor, x._spec).in_storage(memory[key])

    with no_dispatch_modes(), torch.no_grad():
        real_args, real_kwargs = tree_map_only(DeferredTensor, real, (args, kwargs))
        out = mode.run(func, args, kwargs, real_args, real_kwargs)
    written = _written(func, args, kwargs)
    for tensor in written:
        if isinstance(tensor, DeferredTensor):
            tensor._spec.behind = True
    return with_aliasing(func, args, kwargs, out) if written else out


def _record(
    func: Any, kept: Any, outs: Any, targets: Sequence[Ref | Constant], generator: Tensor | None
) -> None:
    """Append a node; `targets` are the written ones of the arguments `kept`."""
    args, kwargs = kept
    writes: dict[int, tuple[Slot, bool]] = {id(r.slot): (r.slot, True) for _, r in outs}
    for ref in targets:
        assert isinstance(ref, Ref)
        whole = len(targets) == 1 and overwrites(func, ref, args[1:])
        writes.setdefault(id(ref.slot), (ref.slot, whole))
    append(
        Node(
            func,
            args,
            kwargs,
            outs,
            tuple(writes.values()),
            generator,
            torch.get_default_dtype(),
        )
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an op's arguments that it writes to."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found


def _generator_state(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The state of the generator that a random op is going to draw from; None for others."""
    if not is_random(func):
        return None
    generator = kwargs.get("generator")
    if generator is None:
        devices = [x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device") or next(iter(devices), "cpu")
        generator = default_generator(torch.device(device))
    state: Tensor = generator.get_state()
    return state


def _in_place_of(tensor: Tensor) -> DeferredTensor:
    """A deferred tensor that is another name for a real one."""
    slot = slot_like(tensor.untyped_storage(), tensor.device)
    slot.held = tensor.untyped_storage()
    return DeferredTensor(_layout_in(slot, tensor), slot)


def _layout_in(slot: Slot, tensor: Tensor) -> Tensor:
    return ref_of(tensor, slot).in_storage(slot.meta)


def _has_memory(x: Any) -> bool:
    """Whether it is an ordinary tensor with memory of its own."""
    return (
        isinstance(x, Tensor)
        and not isinstance(x, (DeferredTensor, DTensor, FakeTensor))
        and x.layout is torch.strided
        and not x.is_meta
    )


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
