"""Tensors of one stage, brought to the others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.compat import dtensor_of, local_of

from .shared_memory import make_group
from .stage_placement import axis_of, everywhere, is_here, piece_shape, stage_of

_TOGETHER_BYTES = 1 << 14  # larger tensors are sent one by one


def gathered(tensors: Sequence[DTensor]) -> list[DTensor]:
    """The tensors, each on one stage, on all stages; collective among the stages.

    Their sharding on the other axes stays. Small tensors travel in one message per stage.
    """
    pieces: list[Tensor | None] = [None] * len(tensors)
    together: dict[tuple[DeviceMesh, int, torch.dtype], list[int]] = defaultdict(list)
    shapes = [_shape(tensor) for tensor in tensors]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        axis, stage = axis_of(tensor), stage_of(tensor)
        assert axis is not None and stage is not None
        if math.prod(shape) * tensor.dtype.itemsize <= _TOGETHER_BYTES:
            together[tensor.device_mesh, axis, tensor.dtype].append(i)
            continue
        data = _data(tensor).clone() if is_here(tensor) else _room(tensor, shape)
        group = tensor.device_mesh.get_group(axis)
        dist.broadcast(data.view(-1).view(torch.uint8), group=group, group_src=stage)
        pieces[i] = data
    for (mesh, axis, _), members in together.items():
        found = _exchanged([tensors[i] for i in members], [shapes[i] for i in members], mesh, axis)
        for i, data in zip(members, found, strict=True):
            pieces[i] = data
    return [_everywhere(t, p) for t, p in zip(tensors, pieces, strict=True) if p is not None]


def _exchanged(
    tensors: Sequence[DTensor], shapes: Sequence[tuple[int, ...]], mesh: DeviceMesh, axis: int
) -> list[Tensor]:
    """Every stage's small tensors of a dtype on all stages: each sends those that it has."""
    group = make_group(mesh.get_group(axis))
    stages = [stage_of(tensor) for tensor in tensors]
    sizes = [math.prod(shape) for shape in shapes]
    order = sorted(range(len(tensors)), key=lambda i: stages[i] or 0)
    lengths = [0] * group.size
    for stage, size in zip(stages, sizes, strict=True):
        assert stage is not None
        lengths[stage] += size
    mine = [_data(tensors[i]).view(-1) for i in order if stages[i] == group.rank]
    if not mine:
        mine = [torch.empty(0, dtype=tensors[0].dtype, device=tensors[0].device)]
    every = group.all_gather(torch.cat(mine), lengths).wait()
    pieces: Sequence[Tensor] = every.split([sizes[i] for i in order])  # type: ignore[no-untyped-call]
    found = dict(zip(order, pieces, strict=True))
    return [found[i].view(shape) for i, shape in enumerate(shapes)]


def _order(tensor: DTensor) -> list[int]:
    """The dims from the slowest varying to the fastest."""
    strides = tensor.stride()
    if len(strides) < 2:
        return list(range(len(strides)))
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])


def _shape(tensor: DTensor) -> tuple[int, ...]:
    """The shape of the piece with its dims in the order of their strides."""
    shape = piece_shape(tensor)
    return tuple(shape[dim] for dim in _order(tensor))


def _data(tensor: DTensor) -> Tensor:
    local = local_of(tensor).detach()
    return local if local.dim() < 2 else local.permute(_order(tensor)).contiguous()


def _room(tensor: DTensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def _everywhere(tensor: DTensor, data: Tensor) -> DTensor:
    axis = axis_of(tensor)
    assert axis is not None
    order = _order(tensor)
    local = data
    if len(order) > 1:
        local = data.permute([order.index(dim) for dim in range(len(order))])
    placements = everywhere(tensor.placements, axis)
    made: DTensor = dtensor_of(local, tensor.device_mesh, placements, tensor.shape, tensor.stride())
    return made
