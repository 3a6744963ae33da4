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

from .deferred import DeferredTensor, real_value
from .on_stage import empty_piece
from .placements import local_shape, local_shard, wrap
from .replay import as_recorded, memory_of, needed
from .state import become, give_to_optimizers
from .tape import Constant, Node, Ref, Slot, digest_of, ref_of


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
    for group in _by_slot(found.values()):
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
            if not alike or not elsewhere:
                memory = _whole_memory(parameter._spec, alike) if memory is None else memory
            if elsewhere:
                shape = local_shape(parameter.shape, sharding, mesh, rank)
                piece = empty_piece(shape, parameter.dtype, parameter.device)
            else:
                assert memory is not None
                whole = ref_of(parameter._local_tensor, parameter._spec).in_storage(memory)
                with as_recorded():
                    piece = local_shard(whole, sharding, mesh, rank)
                del whole
            new = nn.Parameter(
                wrap(piece, parameter.shape, sharding, mesh, live, stage),
                requires_grad=parameter.requires_grad,
            )
            held: Any = parameter
            become(key, held, new)
            del new
        del memory
    found.clear()
    gc.collect()  # slots and nodes refer to each other, and may hold what parameters were made of


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


def _whole_memory(slot: Slot, alike: bool) -> torch.UntypedStorage:
    """The slot's contents; rank 0's, collective, where ranks are not alike."""
    if alike:
        return memory_of(slot)
    if dist.get_rank() == 0:
        storage = memory_of(slot)
    else:
        storage = torch.empty(slot.nbytes, dtype=torch.uint8, device=slot.device).untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8, device=slot.device).set_(storage)
    dist.broadcast(whole, src=0)
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
