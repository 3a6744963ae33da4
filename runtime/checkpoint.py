"""Load a safetensors checkpoint into a model, and save one, without whole models in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.compat import local_of
from autopar.errors import UserError
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_sharding
from autopar.ir.sharding import Sharding

from .deferred import DeferredTensor, real_value
from .file_values import FileValues, deferred_from_meta, piece_runs
from .on_stage import is_here
from .safetensors_files import INDEX, SINGLE, Entry, Writer, entries_of, named, write_index
from .state import like


@dataclass(frozen=True)
class Loaded:
    """Names that did not match: `missing` in the checkpoint, `unexpected` in the model."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True
) -> Loaded:
    """Load a safetensors checkpoint (a file, an index, or a folder with either) into a model.

    The model may be of any kind: built under `autopar.deferred()` or `torch.device("meta")`, in
    memory, parallel, planned or not. Parameters without memory note where their values are, and
    are read when the plan is known; no process then reads more than its own slices. Values are cast
    to the parameters' dtypes. Of tied parameters one name is enough. Every process has to call it.

    Raises UserError, and loads nothing, if a tensor has another shape, or (with `strict`) if the
    names are not exactly those of `model.state_dict()`.
    """
    entries = entries_of(path)
    targets = _targets(model)
    chosen: dict[int, Entry] = {}
    missing: list[str] = []
    misshaped: list[str] = []
    for names, tensor in targets:
        present = [name for name in names if name in entries]
        if not present:
            missing.append(names[0])
            continue
        entry = entries[present[-1]]  # the one that load_state_dict would copy last
        chosen[id(tensor)] = entry
        if entry.shape != tuple(tensor.shape):
            misshaped.append(f"{entry.key} is {list(entry.shape)}, not {list(tensor.shape)}")
    known = {name for names, _ in targets for name in names}
    unexpected = [key for key in entries if key not in known]
    told = [f"of another shape: {named(misshaped)}"] if misshaped else []
    if strict:
        told += [f"missing: {named(missing)}"] if missing else []
        told += [f"not in the model: {named(unexpected)}"] if unexpected else []
    if told:
        raise UserError(
            f"the checkpoint does not fit the model; {'; '.join(told)}",
            where=str(path),
            fix=None if misshaped else "rename the tensors, or pass strict=False to load the rest",
        )
    deferred_from_meta(model)
    for names, tensor in targets:
        if id(tensor) in chosen:
            _load(model, names, _get(model, names[0]), chosen[id(tensor)])
    return Loaded(tuple(missing), tuple(unexpected))


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model's `state_dict()` as safetensors, one tensor at a time.

    A `path` that ends in `.safetensors` is one file, written by rank 0; any other is a folder, in
    which every process writes about as many bytes, and rank 0 an index. Of tied parameters the
    first name is written. Every process has to call it. Raises UserError on all of them if one
    cannot write.
    """
    path = Path(path)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    alone = world == 1 or path.suffix == ".safetensors"
    named_tensors = [(names[0], tensor) for names, tensor in _targets(model)]
    owner = dict.fromkeys((name for name, _ in named_tensors), 0) if alone else {}
    if not alone:
        filled = [0] * world
        for name, tensor in sorted(named_tensors, key=lambda item: -_nbytes(item[1])):
            owner[name] = filled.index(min(filled))
            filled[owner[name]] += _nbytes(tensor)
    files = [f"model-{r + 1:05}-of-{world:05}.safetensors" for r in range(world)]
    file = path / files[rank]
    if alone:
        file = path if path.suffix == ".safetensors" else path / SINGLE
    mine = {name: tensor for name, tensor in named_tensors if owner[name] == rank}
    writer = Writer(file, mine) if mine else None
    for name, tensor in named_tensors:
        value = _whole(tensor)  # collective: in the same order on all
        if writer is not None and owner[name] == rank:
            writer.add(value)
        del value
    _finish(writer)
    if not alone and rank == 0:
        total = sum(_nbytes(tensor) for _, tensor in named_tensors)
        write_index(path, {name: files[r] for name, r in owner.items()}, total)
    elif rank == 0 and path.suffix != ".safetensors":
        (path / INDEX).unlink(missing_ok=True)  # of what was there before
    if world > 1:
        dist.barrier()


def _finish(writer: Writer | None) -> None:
    """Close all ranks' files; raise UserError on every rank if one could not be written."""
    errors: list[Any] = [writer.error if writer is not None else None]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, writer.error if writer is not None else None)
    if writer is not None:
        writer.close(complete=not any(errors))
        errors.append(writer.error)
    error = next((e for e in errors if e is not None), None)
    if error is not None:
        raise UserError(f"cannot write the checkpoint: {error}")


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        detached = tensor.detach()
        assert isinstance(detached, DTensor)
        return detached.full_tensor()
    return real_value(tensor)


def _targets(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """What `state_dict()` has: every parameter and persistent buffer once, with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kept = (
            *module._parameters.items(),
            *((n, b) for n, b in module._buffers.items() if n not in _passing(module)),
        )
        for name, tensor in kept:
            if tensor is not None:
                whole_name = f"{path}.{name}" if path else name
                found.setdefault(id(tensor), ([], tensor))[0].append(whole_name)
    return list(found.values())


def _passing(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


def _get(model: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


def _load(model: nn.Module, names: Sequence[str], tensor: Tensor, entry: Entry) -> None:
    """Copy one entry into a tensor of the model, or note where it is."""
    if isinstance(tensor, DeferredTensor):
        FileValues(entry).write_to(tensor)
        return
    with torch.no_grad():
        if tensor.is_meta:
            value = entry.read().to(tensor.dtype)
            for name in names:
                path, _, last = name.rpartition(".")
                model.get_submodule(path)._buffers[last] = value
            return
        if not isinstance(tensor, DTensor):
            tensor.copy_(entry.read())
            return
        place = _place(model, names, tensor)
        if place is None:
            tensor.copy_(like(entry.read().to(tensor.dtype), tensor))
        elif is_here(tensor):
            local_of(tensor).copy_(entry.read(piece_runs(tensor.shape, *place, dist.get_rank())))


def _place(model: nn.Module, names: Sequence[str], tensor: DTensor) -> tuple[Sharding, Mesh] | None:
    """How the plan stores a parameter of a parallel model; None where that is not known."""
    plan = getattr(model.__dict__.get("autopar"), "plan", None)
    if plan is None or tensor.device_mesh.mesh_dim_names != plan.mesh.names:
        return None
    stored = next((plan.params[name] for name in names if name in plan.params), None)
    if stored is None:
        return Sharding.replicated(tensor.dim()), plan.mesh
    return parse_sharding(stored.sharding), plan.mesh
