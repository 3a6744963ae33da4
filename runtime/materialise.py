"""Give a module's deferred parameters their values: this process's pieces, or all of them."""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from autopar.errors import ShardingWarning
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding
from autopar.plan import PIPELINE_AXIS

from .deferred import TRIMMED_BYTES, DeferredTensor, deferred_parameters, real_value
from .file_values import piece_of_file
from .on_stage import empty_piece
from .placements import local_shape, local_shard, shard, wrap
from .replay import as_recorded, memory_of, needed
from .scratch import Scratch, trim
from .state import become, give_to_optimizers
from .tape import Constant, Node, Ref, Slot, digest_of, ref_of


def agree_on_values(module: nn.Module) -> bool:
    """Let every rank compute rank 0's values; collective.

    Ranks may have seeded their generators differently: they take over the states of rank 0's.
    Returns False where ranks have not run the same ops, so that only rank 0 knows its values.
    """
    parameters = deferred_parameters(module)
    slots = {id(p._spec): p._spec for p in parameters.values()}
    nodes = needed([(slot, len(slot.nodes)) for slot in slots.values()])
    drawing = [node for node in nodes if node.generator is not None]
    states = [node.generator.numpy().tobytes() for node in drawing if node.generator is not None]
    mine = (_digest(parameters, nodes), hashlib.sha256(b"".join(states)).hexdigest())
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if any(ops != every[0][0] for ops, _ in every):
        return False
    if any(drawn != every[0][1] for _, drawn in every):
        box: list[Any] = [states]
        dist.broadcast_object_list(box, src=0)
        for node, state in zip(drawing, box[0], strict=True):
            node.generator = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    return True


def shard_deferred(
    module: nn.Module,
    storage: Mapping[str, Sharding],
    mesh: Mesh,
    live: DeviceMesh,
    stages: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Make every deferred parameter a DTensor that holds this rank's piece, in place; collective.

    Values are computed one parameter at a time, and only where a piece of it is kept. `storage`
    and `stages` are keyed by any of the parameter's names, as for `shard_parameters`.
    """
    found = deferred_parameters(module)
    if not found:
        return
    alike = agree_on_values(module)
    if not alike:
        warnings.warn(
            "the ranks did not build the same model in the same way: parameters are computed on "
            "rank 0 and sent to all others",
            ShardingWarning,
            stacklevel=2,
        )
    names = _all_names(module)
    cutter = _Cutter(mesh, live, dist.get_rank(), alike)
    for group in _by_slot(found.values()):
        for parameter in group:
            key = next((n for n in names[id(parameter)] if n in storage), names[id(parameter)][0])
            sharding = storage.get(key, Sharding.replicated(parameter.dim()))
            used_by = (stages or {}).get(key, ())
            new = cutter.cut(parameter, sharding, used_by[0] if used_by else None)
            held: Any = parameter
            become(key, held, new)
            del new
        cutter.next()
    found.clear()
    gc.collect()  # slots and nodes refer to each other, and may hold what parameters were made of
    trim()


class _Cutter:
    """Computes parameters and keeps this rank's pieces; those of one slot follow one another."""

    def __init__(self, mesh: Mesh, live: DeviceMesh, rank: int, alike: bool) -> None:
        self._mesh, self._live, self._rank, self._alike = mesh, live, rank, alike
        self._scratch = Scratch()
        self._slot: Slot | None = None  # whose contents `_memory` has
        self._memory: torch.UntypedStorage | None = None
        self._computed = 0  # bytes since the heap was trimmed

    def cut(self, parameter: DeferredTensor, sharding: Sharding, stage: int | None) -> nn.Parameter:
        """A DTensor that is placed as the plan says; `stage` is the pipeline stage that owns it."""
        piece = self._piece(parameter, sharding, stage)
        made = wrap(piece, parameter.shape, sharding, self._mesh, self._live, stage)
        new = nn.Parameter(made, requires_grad=parameter.requires_grad)
        if parameter.grad is not None:  # of a part of the model that was called by itself
            whole = real_value(parameter.grad)
            new.grad = shard(whole, sharding, self._mesh, self._live, self._rank, stage)
        return new

    def _piece(self, parameter: DeferredTensor, sharding: Sharding, stage: int | None) -> Tensor:
        mesh, rank, slot = self._mesh, self._rank, parameter._spec
        on_stage = stage is None or mesh.coordinates(rank)[PIPELINE_AXIS] == stage
        here = on_stage or not parameter.dim()
        if self._alike and here:
            piece = piece_of_file(parameter, sharding, mesh, rank)
            if piece is not None:
                return piece
        if (here or not self._alike) and self._slot is not slot:
            self._slot, self._memory = slot, _whole_memory(slot, self._alike, self._scratch)
        if not here:
            shape = local_shape(parameter.shape, sharding, mesh, rank)
            return empty_piece(shape, parameter.dtype, parameter.device)
        assert self._memory is not None
        whole = ref_of(parameter._local_tensor, slot).in_storage(self._memory)
        with as_recorded():
            return local_shard(whole, sharding, mesh, rank)

    def next(self) -> None:
        """Forget the slot: nobody uses its memory any more."""
        if self._slot is None or self._memory is None:
            return
        if self._slot.held is None:
            self._scratch.give_back(self._memory)
        self._computed += self._slot.nbytes
        self._slot = self._memory = None
        if self._computed > TRIMMED_BYTES:
            trim()
            self._computed = 0


def realise(module: nn.Module) -> None:
    """Give all deferred parameters and other tensors of a module their whole values here."""
    made: dict[int, nn.Parameter] = {}
    kept = list(deferred_parameters(module).values())
    for group in _by_slot(kept):
        memory = memory_of(group[0]._spec)
        for old in group:
            value = ref_of(old._local_tensor, old._spec).in_storage(memory)
            new = nn.Parameter(value, requires_grad=old.requires_grad)
            vars(new).update({k: v for k, v in vars(old).items() if k != "_is_param"})
            made[id(old)] = new
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if id(parameter) in made:
                owner._parameters[name] = made[id(parameter)]
        if isinstance(owner, nn.RNNBase) and made:
            owner._init_flat_weights()
    give_to_optimizers(made)
    realise_others(module)


def realise_others(module: nn.Module) -> None:
    """Give buffers and tensor attributes that were computed from deferred parameters values."""

    def real(tensor: DeferredTensor) -> Tensor:
        return tensor if isinstance(tensor, nn.Parameter) else real_value(tensor)

    for owner in module.modules():
        for values in (owner._buffers, vars(owner)):
            for name, value in list(values.items()):
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                if isinstance(value, (DeferredTensor, list, tuple, dict)) and _has_deferred(value):
                    values[name] = tree_map_only(DeferredTensor, real, value)


def _has_deferred(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_deferred, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_deferred, value))
    return isinstance(value, DeferredTensor) and not isinstance(value, nn.Parameter)


def _all_names(module: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _by_slot(parameters: Any) -> Iterator[list[DeferredTensor]]:
    groups: dict[int, list[DeferredTensor]] = {}
    for parameter in parameters:
        groups.setdefault(id(parameter._spec), []).append(parameter)
    yield from groups.values()


def _whole_memory(slot: Slot, alike: bool, scratch: Scratch) -> torch.UntypedStorage:
    """The slot's contents; rank 0's, collective, where ranks are not alike."""
    if alike:
        return memory_of(slot, scratch)
    storage = memory_of(slot, scratch) if dist.get_rank() == 0 else None
    if storage is None:
        storage = scratch.take(slot.nbytes, slot.device)
    whole = torch.empty(0, dtype=torch.uint8, device=slot.device)
    dist.broadcast(whole.set_(storage, 0, (slot.nbytes,), (1,)), src=0)
    return storage


def _digest(parameters: Mapping[str, DeferredTensor], nodes: Sequence[Node]) -> str:
    """A text that differs where parameters are made in another way, but for the generator."""
    numbers: dict[int, int] = {}

    def told(x: Any) -> str:
        if isinstance(x, Constant):
            return f"constant {tuple(x.tensor.shape)} {x.tensor.dtype} {digest_of(x.tensor)}"
        if isinstance(x, torch.Generator):
            return "generator"
        number = numbers.setdefault(id(x.slot), len(numbers))
        return f"%{number}.{x.version}+{x.offset} {x.size} {x.stride} {x.dtype}"

    lines = []
    for node in nodes:
        told_args = tree_map_only(
            (Constant, Ref, torch.Generator), told, (node.args, dict(node.kwargs))
        )
        lines.append(f"{[told(ref) for _, ref in node.outs]} = {node.func} {told_args}")
    for name, parameter in parameters.items():
        here = told(ref_of(parameter._local_tensor, parameter._spec))
        memory = parameter._spec.held
        if memory is not None:
            bytes_ = torch.empty(0, dtype=torch.uint8, device=parameter.device).set_(memory)
            here += f" held {digest_of(bytes_)}"
        lines.append(f"{name}: {here}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
