"""Parameters without memory whose values are in files, or nowhere yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopar.errors import UserError
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding

from .deferred import DeferredTensor, deferred_parameters
from .replay import as_recorded
from .safetensors_files import Entry, named
from .staged_group import local_gpu
from .state import give_to_optimizers
from .tape import Node, Ref, append, ref_of, slot_like


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
    device = local_gpu() if torch.cuda.is_available() else torch.device("cpu")
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


def piece_runs(
    shape: Sequence[int], sharding: Sharding, mesh: Mesh, rank: int
) -> list[list[range]]:
    """The elements of each dim that are in a rank's piece of a tensor."""
    here = mesh.coordinates(rank)
    return [
        split.runs(size, mesh, here) if split else [range(size)]
        for split, size in zip(sharding.splits, shape, strict=True)
    ]


def piece_of_file(
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
