"""Pieces of tensors: how a dim is divided among the members of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.ir.lowered import ShardSpec

from .group import Group


def numel(shape: Sequence[int]) -> int:
    """Elements of a tensor of this shape."""
    n = 1
    for size in shape:
        n *= size
    return n


def chunk(full: Tensor, spec: ShardSpec, member: int) -> Tensor:
    """The piece of `full` that `member` holds, as a view; its dim is (outer, rest) if strided."""
    start, length = spec.offset(member) * spec.block, spec.lengths[member] * spec.block
    if spec.outer == 1:
        return full.narrow(spec.dim, start, length)
    dims = (spec.outer, sum(spec.lengths) * spec.block)
    strided = full.view(*full.shape[: spec.dim], *dims, *full.shape[spec.dim + 1 :])
    return strided.narrow(spec.dim + 1, start, length)


def chunk_shape(shape: Sequence[int], spec: ShardSpec, member: int) -> tuple[int, ...]:
    """Shape of `chunk` in a tensor whose other dims are those of `shape`."""
    dims = (spec.outer,) if spec.outer > 1 else ()
    middle = (*dims, spec.lengths[member] * spec.block)
    return (*shape[: spec.dim], *middle, *shape[spec.dim + 1 :])


def join(chunks: Sequence[Tensor], spec: ShardSpec) -> Tensor:
    """The full tensor of all members' chunks."""
    if spec.outer == 1:
        return torch.cat(list(chunks), spec.dim)
    return torch.cat(list(chunks), spec.dim + 1).flatten(spec.dim, spec.dim + 1)


def local(chunk: Tensor, spec: ShardSpec) -> Tensor:
    """A chunk with its dim as one, as the member holds it."""
    return chunk if spec.outer == 1 else chunk.flatten(spec.dim, spec.dim + 1)


def local_shape(shape: Sequence[int], spec: ShardSpec, member: int) -> tuple[int, ...]:
    """Shape that `member` holds of a tensor whose other dims are those of `shape`."""
    return (*shape[: spec.dim], spec.local_size(member), *shape[spec.dim + 1 :])


def member_sizes(
    shapes: Sequence[Sequence[int]], specs: Sequence[ShardSpec], members: int
) -> list[int]:
    """Elements that every member holds of all tensors whose other dims are those of `shapes`."""
    pairs = list(zip(shapes, specs, strict=True))
    return [sum(numel(local_shape(s, spec, m)) for s, spec in pairs) for m in range(members)]


def full_shape(shape: Sequence[int], spec: ShardSpec) -> tuple[int, ...]:
    """Shape of the full tensor, whose other dims are those of `shape`."""
    return (*shape[: spec.dim], spec.size, *shape[spec.dim + 1 :])


def is_prefix(shape: Sequence[int], spec: ShardSpec) -> bool:
    """Whether the members' chunks are consecutive in memory."""
    return spec.outer == 1 and numel(shape[: spec.dim]) == 1


def check_local(x: Tensor, spec: ShardSpec, group: Group, what: str) -> None:
    """Shapes are checked before sending: a mismatch would abort the process in gloo."""
    if len(spec.lengths) != group.size or x.shape[spec.dim] != spec.local_size(group.rank):
        raise ValueError(
            f"{what}: member {group.rank} of {group.size} has shape {tuple(x.shape)}, "
            f"which is no shard of {spec}"
        )


def check_full(x: Tensor, spec: ShardSpec, group: Group, what: str) -> None:
    """Likewise for the tensor that is to be divided."""
    if len(spec.lengths) != group.size or x.shape[spec.dim] != spec.size:
        raise ValueError(
            f"{what}: shape {tuple(x.shape)} cannot be divided as {spec} among {group.size}"
        )
