"""Give a module's deferred parameters their values: this process's pieces, or all of them."""

from __future__ import annotations

import gc
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from autopar.errors import ShardingWarning, UserError
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding
from autopar.plan import PIPELINE_AXIS

from .deferred import TRIMMED_BYTES, DeferredTensor, real_value
from .on_stage import empty_piece
from .placements import local_shape, local_shard, shard, wrap
from .replay import as_recorded, memory_of, needed
from .safetensors_files import Entry, named
from .scratch import Scratch, trim
from .state import become, give_to_optimizers
from .tape import Constant, Node, Ref, Slot, append, digest_of, ref_of, slot_like


def deferred_parameters(module: nn.Module) -> dict[str, DeferredTensor]:
    """The parameters that have no memory yet, each once, by their first names."""
    found: dict[str, Any] = dict(module.named_parameters())
    return {name: p for name, p in found.items() if isinstance(p, DeferredTensor)}


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


@dataclass(frozen=True)
class FileValues:
    """The op that reads a parameter's values from a checkpoint."""

    entry: Entry

    def __call__(self, target: Tensor) -> None:
        target.copy_(self.entry.read())

    def __str__(self) -> str:
        return f"load {self.entry.key} {self.entry.shape} {self.entry.dtype}"

    def write_to(self, tensor: DeferredTensor) -> None:
        """Record that the tensor's values are those in the file."""
        slot = tensor._spec
        target = ref_of(tensor._local_tensor, slot)
        if slot.held is not None:
            with torch.no_grad():
                self(target.in_storage(slot.held))
            return
        writes = ((slot, target.covers()),)
        append(Node(self, (target,), {}, (), writes, None, torch.get_default_dtype()))
        slot.behind = True


def deferred_from_meta(module: nn.Module) -> None:
    """Replace parameters on `meta` by deferred ones, in modules and optimizers; without values."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in owner._parameters.items():
            if old is None or isinstance(old, DeferredTensor) or not old.is_meta:
                continue
            if id(old) not in made:
                layout = torch.empty_strided(
                    old.size(), old.stride(), dtype=old.dtype, device="meta"
                )
                empty = DeferredTensor(layout, slot_like(layout.untyped_storage(), device))
                made[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
                vars(made[id(old)]).update(vars(old))
                made[id(old)].__dict__["_is_param"] = True
            owner._parameters[name] = made[id(old)]
    if made:
        give_to_optimizers(made)


def check_values(module: nn.Module) -> None:
    """Raise UserError if parameters or buffers of a module never got values."""
    without = [
        name
        for name, p in deferred_parameters(module).items()
        if p._spec.held is None and not p._spec.nodes and p.numel()
    ]
    without += [name for name, p in module.named_parameters() if p.is_meta]
    if without:
        raise UserError(
            f"{named(without)}: built on the meta device, and nothing gave them values",
            fix="pass checkpoint= to autopar.parallelize (or call autopar.load_checkpoint), or "
            "build the model under autopar.deferred() in place of the meta device",
        )
    buffers = [name for name, b in module.named_buffers() if b.is_meta]
    if buffers:
        raise UserError(
            f"the buffers {named(buffers)} were built on the meta device: their values are in no "
            "checkpoint",
            fix="build the model under autopar.deferred() in place of the meta device",
        )


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
    rank = dist.get_rank()
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
    scratch, computed = Scratch(), 0
    for group in _by_slot(found.values()):
        slot = group[0]._spec
        memory: torch.UntypedStorage | None = None
        for parameter in group:
            key = next((n for n in names[id(parameter)] if n in storage), names[id(parameter)][0])
            sharding = storage.get(key, Sharding.replicated(parameter.dim()))
            used_by = (stages or {}).get(key, ())
            stage = used_by[0] if used_by else None
            elsewhere = (
                stage is not None
                and parameter.dim()
                and mesh.coordinates(rank)[PIPELINE_AXIS] != stage
            )
            piece = None
            if alike and not elsewhere:
                piece = _piece_of_file(parameter, sharding, mesh, rank)
            if not alike or not (elsewhere or piece is not None):
                memory = _whole_memory(slot, alike, scratch) if memory is None else memory
            if elsewhere:
                shape = local_shape(parameter.shape, sharding, mesh, rank)
                piece = empty_piece(shape, parameter.dtype, parameter.device)
            elif piece is None:
                assert memory is not None
                whole = ref_of(parameter._local_tensor, parameter._spec).in_storage(memory)
                with as_recorded():
                    piece = local_shard(whole, sharding, mesh, rank)
                del whole
            new = nn.Parameter(
                wrap(piece, parameter.shape, sharding, mesh, live, stage),
                requires_grad=parameter.requires_grad,
            )
            if parameter.grad is not None:  # of a part of the model that was called by itself
                whole_grad = real_value(parameter.grad)
                new.grad = shard(whole_grad, sharding, mesh, live, rank, stage)
            held: Any = parameter
            become(key, held, new)
            del new
        if memory is not None and slot.held is None:
            scratch.give_back(memory)
            computed += slot.nbytes
        if computed > TRIMMED_BYTES:
            trim()
            computed = 0
    found.clear()
    gc.collect()  # slots and nodes refer to each other, and may hold what parameters were made of
    trim()


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


def piece_runs(
    shape: Sequence[int], sharding: Sharding, mesh: Mesh, rank: int
) -> list[list[range]]:
    """The elements of each dim that are in a rank's piece of a tensor."""
    here = mesh.coordinates(rank)
    return [
        split.runs(size, mesh, here) if split else [range(size)]
        for split, size in zip(sharding.splits, shape, strict=True)
    ]


def _piece_of_file(
    parameter: DeferredTensor, sharding: Sharding, mesh: Mesh, rank: int
) -> Tensor | None:
    """This rank's piece of a parameter that is as a file has it; None if anything else is."""
    slot, layout = parameter._spec, parameter._local_tensor
    if slot.held is not None or not slot.nodes or not isinstance(slot.nodes[-1].func, FileValues):
        return None
    target: Ref = slot.nodes[-1].args[0]
    here = ref_of(layout, slot)
    same = (target.size, target.stride, target.offset) == (here.size, here.stride, here.offset)
    if not same or not target.covers():
        return None
    with as_recorded():
        piece = slot.nodes[-1].func.entry.read(piece_runs(layout.shape, sharding, mesh, rank))
        return piece.to(device=slot.device, dtype=layout.dtype).contiguous()


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
