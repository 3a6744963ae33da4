"""Compute again what a tape says: the values of a slot, and nothing that they do not need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from autopar.compat import no_dispatch_modes
from autopar.errors import UserError

from .scratch import Scratch
from .tape import Constant, Node, Ref, Slot, default_generator, digest_of, makes_nothing

_Memory = dict[int, torch.UntypedStorage]  # by id of the slot


def needed(slots: Sequence[tuple[Slot, int]]) -> list[Node]:
    """The nodes on which the first `version` nodes of each (slot, version) depend, in order."""
    found: dict[int, Node] = {}
    seen: set[tuple[int, int]] = set()
    pending = list(slots)
    while pending:
        slot, version = pending.pop()
        for position in reversed(range(version)):
            if (id(slot), position) in seen:
                break
            seen.add((id(slot), position))
            node = slot.nodes[position]
            if id(node) not in found:
                found[id(node)] = node
                pending += [(ref.slot, ref.version) for ref in node.reads()]
                pending += [
                    (other, other.nodes.index(node))
                    for other, all_of_it in node.writes
                    if other is not slot and not all_of_it
                ]
            if any(other is slot and all_of_it for other, all_of_it in node.writes):
                break
    return sorted(found.values(), key=lambda node: node.time)


def memory_of(slot: Slot, scratch: Scratch | None = None) -> torch.UntypedStorage:
    """Memory with the slot's present contents: the held one, or new memory (from `scratch`)."""
    if slot.held is not None:
        return slot.held
    own = Scratch() if scratch is None else scratch
    if scratch is None:
        result = torch.empty(slot.nbytes, dtype=torch.uint8, device=slot.device).untyped_storage()
    else:
        result = scratch.take(slot.nbytes, slot.device)
    nodes = needed([(slot, len(slot.nodes))])
    memory: _Memory = {id(slot): result}
    last = {id(s): i for i, node in enumerate(nodes) for s in _touched(node)}
    with as_recorded():
        for i, node in enumerate(nodes):
            _run(node, memory, own)
            for other in _touched(node):
                if other is not slot and last[id(other)] == i and id(other) in memory:
                    own.give_back(memory.pop(id(other)))
    return result


def value_of(ref: Ref) -> Tensor:
    """The present value of what is in the place of a ref; shares memory only with held memory."""
    return ref.in_storage(memory_of(ref.slot))


@contextlib.contextmanager
def as_recorded() -> Iterator[None]:
    """Run ops as they were recorded: nothing is cast, differentiated, intercepted or recorded."""
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_dispatch_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def _touched(node: Node) -> list[Slot]:
    return [*(slot for slot, _ in node.writes), *(ref.slot for ref in node.reads())]


def _run(node: Node, memory: _Memory, scratch: Scratch) -> None:
    """Run one node in real memory, which is taken from `scratch` as it is needed."""

    def memory_for(slot: Slot) -> torch.UntypedStorage:
        if id(slot) not in memory:  # what `torch.empty` made, or is overwritten now
            memory[id(slot)] = scratch.take(slot.nbytes, slot.device)
        return memory[id(slot)]

    def real(x: Any) -> Tensor:
        if isinstance(x, Constant):
            return _unchanged(x)
        tensor: Tensor = x.in_storage(memory_for(x.slot))
        return tensor

    if makes_nothing(node.func):  # what is read of it is the same on all ranks
        for _, ref in node.outs:
            ref.in_storage(memory_for(ref.slot)).zero_()
        return
    args, kwargs = tree_map_only((Ref, Constant), real, (node.args, dict(node.kwargs)))
    torch.set_default_dtype(node.dtype)
    with _generator(node, kwargs):
        result = node.func(*args, **kwargs)
    leaves = tree_leaves(result)
    for position, ref in node.outs:
        ref.in_storage(memory_for(ref.slot)).copy_(leaves[position])


@contextlib.contextmanager
def _generator(node: Node, kwargs: dict[str, Any]) -> Iterator[None]:
    """Let a random op draw what it drew when it was recorded; nobody else's numbers change."""
    if node.generator is None:
        yield
        return
    devices = [x.device for x in tree_leaves((node.args, kwargs)) if isinstance(x, Tensor)]
    devices += [ref.slot.device for _, ref in node.outs] + [s.device for s, _ in node.writes]
    given = kwargs.get("generator")
    if given is not None:
        kwargs["generator"] = torch.Generator(given.device)
        kwargs["generator"].set_state(node.generator)
        yield
        return
    generator = default_generator(devices[-1])
    before = generator.get_state()
    generator.set_state(node.generator)
    try:
        yield
    finally:
        generator.set_state(before)


def _unchanged(constant: Constant) -> Tensor:
    tensor = constant.tensor
    if constant.digest is not None and digest_of(tensor) != constant.digest:
        raise UserError(
            f"a tensor of shape {list(tensor.shape)} was changed after a parameter that has no "
            "memory yet was made from it",
            fix="make it from a copy (tensor.clone()), or build the model outside of "
            "autopar.deferred()",
        )
    return tensor
