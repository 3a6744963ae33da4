"""Between autopar's `Sharding` of a parameter and DTensor's placements."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from autopar.compat import StridedShard
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding


def placements_of(sharding: Sharding, mesh: Mesh) -> tuple[Placement, ...]:
    """One placement per mesh axis; raises ValueError for what DTensor cannot say."""
    found: list[Placement] = []
    for axis in mesh.names:
        dim = sharding.dim_of(axis)
        if dim is None:
            found.append(Replicate())
            continue
        split = sharding.splits[dim]
        if split.block != 1:
            raise ValueError(f"no placement for {sharding}")
        if split.outer == 1:
            found.append(Shard(dim))
        else:
            found.append(StridedShard(dim, split_factor=split.outer))
    return tuple(found)


def local_shard(full: Tensor, sharding: Sharding, mesh: Mesh, rank: int) -> Tensor:
    """This rank's piece of a whole tensor, contiguous and independent of it."""
    here = mesh.coordinates(rank)
    local = full
    for dim, split in enumerate(sharding.splits):
        if split:
            runs = split.runs(full.shape[dim], mesh, here)
            pieces = [local.narrow(dim, r.start, len(r)) for r in runs]
            local = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return local.detach().clone(memory_format=torch.contiguous_format)


def shard(full: Tensor, sharding: Sharding, mesh: Mesh, live: DeviceMesh, rank: int) -> DTensor:
    """A DTensor of a whole tensor that every rank holds; no communication."""
    return wrap(local_shard(full, sharding, mesh, rank), full.shape, sharding, mesh, live)


def wrap(
    local: Tensor, shape: torch.Size, sharding: Sharding, mesh: Mesh, live: DeviceMesh
) -> DTensor:
    """A DTensor of `shape` from this rank's piece."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local,
        live,
        placements_of(sharding, mesh),
        run_check=False,
        shape=shape,
        stride=stride,
    )
