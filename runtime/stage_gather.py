"""Tensors of one stage, brought to the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.compat import dtensor_of, local_of

from .stage_placement import axis_of, everywhere, is_here, piece_shape, stage_of

_TOGETHER_BYTES = 1 << 18  # larger tensors are sent without being copied into a message
_ALIGN = 16  # bytes: no dtype needs more


def gathered(tensors: Sequence[DTensor]) -> list[DTensor]:
    """The tensors, each on one stage, on all stages; collective among the stages.

    Their sharding on the other axes stays. Small tensors of one stage travel in one message.
    """
    buffers: list[Tensor] = []
    together: dict[tuple[DeviceMesh, int, int], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        axis, stage = axis_of(tensor), stage_of(tensor)
        assert axis is not None and stage is not None
        buffers.append(_row_major(tensor))
        if buffers[i].nbytes <= _TOGETHER_BYTES:
            together[tensor.device_mesh, axis, stage].append(i)
        else:
            _broadcast(_as_bytes(buffers[i]), tensor.device_mesh, axis, stage)
    for (mesh, axis, stage), members in together.items():
        pieces = [_as_bytes(buffers[i]) for i in members]
        message = torch.cat([_padded(piece) for piece in pieces])
        _broadcast(message, mesh, axis, stage)
        start = 0
        for piece in pieces:
            piece.copy_(message[start : start + piece.numel()])
            start += len(_padded(piece))
    return [_everywhere(t, buffer) for t, buffer in zip(tensors, buffers, strict=True)]


def _broadcast(data: Tensor, mesh: DeviceMesh, axis: int, stage: int) -> None:
    if data.numel():
        dist.broadcast(data, group=mesh.get_group(axis), group_src=stage)


def _order(tensor: DTensor) -> list[int]:
    """The dims from the slowest varying to the fastest."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])


def _row_major(tensor: DTensor) -> Tensor:
    """The piece (room for it, on other stages) with its dims in the order of their strides."""
    order = _order(tensor)
    if is_here(tensor):
        return local_of(tensor).detach().permute(order).clone(memory_format=torch.contiguous_format)
    shape = piece_shape(tensor)
    return torch.empty([shape[d] for d in order], dtype=tensor.dtype, device=tensor.device)


def _as_bytes(buffer: Tensor) -> Tensor:
    return buffer.view(-1).view(torch.uint8)


def _padded(piece: Tensor) -> Tensor:
    return torch.nn.functional.pad(piece, (0, (-int(piece.numel())) % _ALIGN))


def _everywhere(tensor: DTensor, buffer: Tensor) -> DTensor:
    axis = axis_of(tensor)
    assert axis is not None
    order = _order(tensor)
    local = buffer.permute([order.index(dim) for dim in range(len(order))])
    placements = everywhere(tensor.placements, axis)
    made: DTensor = dtensor_of(local, tensor.device_mesh, placements, tensor.shape, tensor.stride())
    return made
