"""Recording what is done to tensors without memory, and to what they are made of."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from autopar.compat import (
    TorchDispatchMode,
    active_dispatch_modes,
    no_dispatch_modes,
    with_aliasing,
)
from autopar.errors import UserError

from .deferred_tensor import (
    DeferredTensor,
    bring_up_to_date,
    has_memory,
    hold,
    in_place_of,
    layout_in,
    memory_key,
    real_value,
    warn_held,
)
from .replay import memory_of
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

TRIMMED_BYTES = 1 << 28  # of real tensors made, after which the heap is trimmed


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
            return call_deferred(func, args, kwargs, self)
        for tensor in tree_leaves((args, kwargs)):
            slot = self.slot_of(tensor)
            if slot is not None and slot.behind:
                bring_up_to_date(slot, tensor.untyped_storage())
        return self.run(func, args, kwargs, args, kwargs)

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, real_args: Any, real_kwargs: Any
    ) -> Any:
        """Run an op on real tensors, and record it as an op on `args` and `kwargs`."""
        given = {memory_key(x) for x in tree_leaves((real_args, real_kwargs)) if has_memory(x)}
        generator = _generator_state(func, real_args, real_kwargs)
        written = [x for x in _written(func, args, kwargs) if self.slot_of(x) is not None]
        kept = tree_map_only(Tensor, self.kept, (args, kwargs)) if written else None
        out = func(*real_args, **real_kwargs)
        fresh = [
            (i, x)
            for i, x in enumerate(tree_leaves(out))
            if has_memory(x) and memory_key(x) not in given and self.slot_of(x) is None
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
        elif has_memory(tensor):
            slot = self._slots.get(memory_key(tensor))
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
            made = in_place_of(data)
            warn_held(made._spec, "it was made of a tensor that no torch op inside made")
        else:
            self._shared.add(id(slot))
            made = DeferredTensor(layout_in(slot, data), slot)
        return nn.Parameter(made, requires_grad)

    def close(self) -> None:
        """Keep the memory that a parameter shares with a tensor which somebody still has."""
        for slot in list(self._slots.values()):
            if id(slot) in self._shared and slot.held is None:
                hold(slot, "the tensor that it was made of is in use elsewhere", new=False)
        self._slots.clear()
        trim()


def call_deferred(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Recording | None
) -> Any:
    """Record an op with deferred arguments, or run it where that is not possible."""
    mode = mode or Recording()
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
        memory_key(x._local_tensor): x._spec
        for x in tree_leaves((args, kwargs))
        if isinstance(x, DeferredTensor)
    }
    made = [(i, x) for i, x in enumerate(tree_leaves(layouts)) if isinstance(x, Tensor)]
    fresh = [(i, x) for i, x in made if memory_key(x) not in slots]
    if fresh or written:
        generator = _generator_state(func, args, kwargs)
        kept = tree_map_only(Tensor, mode.kept, (args, kwargs))
        if generator is not None:
            _draw(func, args, kwargs, mode.scratch)
        device = kwargs.get("device") or next(iter(slots.values())).device
        for _, layout in fresh:
            slots[memory_key(layout)] = slot_like(layout.untyped_storage(), torch.device(device))
        outs = tuple((i, ref_of(x, slots[memory_key(x)])) for i, x in fresh)
        _record(func, kept, outs, [mode.kept(x) for x in written], generator)
        for tensor in written:
            if isinstance(tensor, DeferredTensor):
                tensor._spec.behind = True
    out = tree_map_only(Tensor, lambda x: DeferredTensor(x, slots[memory_key(x)]), layouts)
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


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Recording) -> Any:
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


def recording() -> Recording:
    """The recording in force, or one of its own for what happens outside of any."""
    modes = [mode for mode in active_dispatch_modes() if isinstance(mode, Recording)]
    return modes[-1] if modes else Recording()
