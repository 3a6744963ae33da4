"""Where a tensor of one pipeline stage is: the placement, and what follows from it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from autopar.compat import dtensor_of, local_of, local_shape_of


class OnStage(Placement):
    """All of a tensor on one coordinate of a mesh axis, and nothing of it on the others."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnStage) and other.stage == self.stage

    def __hash__(self) -> int:
        return hash(("OnStage", self.stage))

    def __repr__(self) -> str:
        return f"OnStage({self.stage})"

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        return OnStage, (self.stage,)


def axis_of(tensor: DTensor) -> int | None:
    """The mesh axis along which a tensor is on one stage, by its number."""
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, OnStage):
            return axis
    return None


def stage_of(tensor: DTensor) -> int | None:
    """The stage that a tensor is on."""
    for placement in tensor.placements:
        if isinstance(placement, OnStage):
            return placement.stage
    return None


def is_here(tensor: DTensor) -> bool:
    """Whether this rank holds (its piece of) the tensor: always, if it is not on one stage."""
    axis = axis_of(tensor)
    if axis is None:
        return True
    here = tensor.device_mesh.get_coordinate()
    return here is not None and here[axis] == stage_of(tensor)


def everywhere(placements: tuple[Placement, ...], axis: int) -> tuple[Placement, ...]:
    """The placements of the same tensor when all coordinates of an axis have it."""
    return (*placements[:axis], Replicate(), *placements[axis + 1 :])


def stage_mesh(mesh: DeviceMesh, axis: int) -> DeviceMesh | None:
    """The mesh of this rank's own stage; None if a stage is one device."""
    return _stage_mesh(mesh, axis, dist.group.WORLD)


@functools.cache
def _stage_mesh(mesh: DeviceMesh, axis: int, world: object) -> DeviceMesh | None:
    # Meshes of a world that has ended are equal to those of the next.
    names = mesh.mesh_dim_names
    if mesh.ndim == 1:
        return None
    assert names is not None
    return mesh[(*names[:axis], *names[axis + 1 :])]


def empty_piece(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What ranks of other stages hold in the place of a piece of this shape: no rows."""
    return torch.empty((0, *shape[1:]), dtype=dtype, device=device)


def piece_shape(tensor: DTensor) -> tuple[int, ...]:
    """The shape of the piece that this rank's peer on the tensor's stage holds."""
    axis = axis_of(tensor)
    if axis is None or is_here(tensor):
        return tuple(local_of(tensor).shape)
    placements = everywhere(tensor.placements, axis)
    return local_shape_of(tensor.shape, tensor.device_mesh, placements)


def kept_on_stage(tensor: DTensor, axis: int, stage: int, kind: Any) -> Any:
    """Of a tensor that all stages have, what ranks keep of it that is to be on one; no copy."""
    mesh, local = tensor.device_mesh, local_of(tensor)
    here = mesh.get_coordinate()
    assert here is not None
    if here[axis] != stage:
        local = empty_piece(tuple(local.shape), local.dtype, local.device)
    placements = (*tensor.placements[:axis], OnStage(stage), *tensor.placements[axis + 1 :])
    return dtensor_of(local, mesh, placements, tensor.shape, tensor.stride(), kind)
