"""What torch.distributed.checkpoint has to know of a DTensor's piece, exact for any layout.

DTensor itself describes a piece by one offset and size, which is wrong for pieces that are several
runs of a dim (a fused query-key-value weight split by heads), and pieces of other stages are none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

from autopar.compat import StridedShard, local_of

from .stage_placement import is_here

if TYPE_CHECKING:  # takes a while to import, and few programs write checkpoints of pieces
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


class ExactPieces:
    """For subclasses of DTensor: the protocol by which checkpoints ask a tensor for its pieces."""

    __slots__ = ()

    def __create_write_items__(self: Any, fqn: str, object: Any) -> list[WriteItem]:
        del object
        return write_items(fqn, self)

    def __create_chunk_list__(self: Any) -> list[ChunkStorageMetadata]:
        return chunks(self)

    def __get_tensor_shard__(self: Any, index: MetadataIndex) -> Tensor:
        return chunk_data(self, index)


def write_items(name: str, tensor: DTensor) -> list[WriteItem]:
    """What this rank writes of a tensor: one item for each box of elements that it holds."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    properties = TensorProperties.create_from_tensor(local_of(tensor))
    return [
        WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=tensor.size()),
        )
        for chunk in chunks(tensor)
    ]


def chunks(tensor: DTensor) -> list[ChunkStorageMetadata]:
    """The boxes of elements of the whole tensor that this rank holds."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return [
        ChunkStorageMetadata(
            torch.Size([run.start for run in box]), torch.Size([len(run) for run in box])
        )
        for box, _ in _boxes(tensor)
    ]


def chunk_data(tensor: DTensor, index: MetadataIndex) -> Tensor:
    """This rank's memory for a chunk; raises ValueError if it has no chunk at that offset."""
    for box, starts in _boxes(tensor):
        if index.offset is None or list(index.offset) == [run.start for run in box]:
            found = local_of(tensor).detach()
            for dim, (run, start) in enumerate(zip(box, starts, strict=True)):
                found = found.narrow(dim, start, len(run))
            return found
    raise ValueError(f"no piece of {index.fqn} at {index.offset} is on this rank")


def _boxes(tensor: DTensor) -> list[tuple[tuple[range, ...], tuple[int, ...]]]:
    """The boxes that this rank holds, each with where it begins in the local tensor."""
    if not is_here(tensor):
        return []
    here = tensor.device_mesh.get_coordinate()
    assert here is not None
    sizes = [tensor.device_mesh.size(axis) for axis in range(tensor.device_mesh.ndim)]
    dims = []
    for dim, size in enumerate(tensor.shape):
        runs = held_runs(dim, size, tensor.placements, sizes, here)
        starts = itertools.accumulate([len(run) for run in runs], initial=0)
        dims.append(list(zip(runs, starts, strict=False)))
    return [
        (tuple(run for run, _ in box), tuple(start for _, start in box))
        for box in itertools.product(*dims)
    ]


def held_runs(
    dim: int,
    size: int,
    placements: Sequence[Placement],
    sizes: Sequence[int],
    here: Sequence[int],
) -> list[range]:
    """The elements of a dim that this rank holds, in the order in which it holds them."""
    held = torch.arange(size)
    for placement, parts, coordinate in zip(placements, sizes, here, strict=True):
        if not isinstance(placement, (Shard, StridedShard)) or placement.dim != dim:
            continue
        groups = placement.split_factor if isinstance(placement, StridedShard) else 1
        rows = held.view(groups, -1)
        width = -(-rows.shape[1] // parts)
        held = rows[:, coordinate * width : (coordinate + 1) * width].reshape(-1)
    ends = (held.diff() != 1).nonzero().view(-1) + 1
    pieces: Any = held.tensor_split(ends.tolist())
    return [range(int(p[0]), int(p[-1]) + 1) for p in pieces if p.numel()]
