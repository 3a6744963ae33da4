"""Between autopar's `Sharding` of a parameter and DTensor's placements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from autopar.compat import StridedShard, dtensor_of
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding
from autopar.plan import PIPELINE_AXIS

from .on_stage import OnStage, StagedTensor, empty_piece
from .plan_tensor import as_plan_tensor


def placements_of(
    sharding: Sharding, mesh: Mesh, stage: int | None = None
) -> tuple[Placement, ...]:
    """One placement per mesh axis; `stage` is the pipeline stage that owns the tensor.

    Raises ValueError for what DTensor cannot say.
    """
    found: list[Placement] = []
    for axis in mesh.names:
        if axis == PIPELINE_AXIS and stage is not None:
            found.append(OnStage(stage))
            continue
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


def shard(
    full: Tensor,
    sharding: Sharding,
    mesh: Mesh,
    live: DeviceMesh,
    rank: int,
    stage: int | None = None,
) -> DTensor:
    """A DTensor of a whole tensor that every rank holds; no communication.

    With a pipeline, only the ranks of `stage` keep a piece (of a tensor without dims: all do).
    """
    if stage is not None and full.dim() and mesh.coordinates(rank)[PIPELINE_AXIS] != stage:
        local = empty_piece(local_shape(full.shape, sharding, mesh, rank), full.dtype, full.device)
    else:
        local = local_shard(full, sharding, mesh, rank)
    return wrap(local, full.shape, sharding, mesh, live, stage)


def local_shape(shape: Sequence[int], sharding: Sharding, mesh: Mesh, rank: int) -> tuple[int, ...]:
    """The shape of a rank's piece of a whole tensor."""
    here = mesh.coordinates(rank)
    found = list(shape)
    for dim, split in enumerate(sharding.splits):
        if split:
            found[dim] = split.local_size(shape[dim], mesh, here)
    return tuple(found)


def wrap(
    local: Tensor,
    shape: torch.Size,
    sharding: Sharding,
    mesh: Mesh,
    live: DeviceMesh,
    stage: int | None = None,
) -> DTensor:
    """A DTensor of `shape` from this rank's piece: without rows on ranks of other stages.

    A tensor without dims is on all stages.
    """
    stride = torch.empty(shape, device="meta").stride()
    if stage is not None and len(shape):
        placements = placements_of(sharding, mesh, stage)
        made: DTensor = dtensor_of(local, live, placements, shape, stride, StagedTensor)
        return made
    plain = DTensor.from_local(
        local,
        live,
        placements_of(sharding, mesh),
        run_check=False,
        shape=shape,
        stride=stride,
    )
    return as_plan_tensor(plain)
