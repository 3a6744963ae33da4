"""Many tensors in one message: packed one after the other into a flat buffer, and views of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.ir.lowered import ShardSpec

from .chunks import chunk, chunk_shape, full_shape, join, local_shape, numel
from .kernels import pack as packing


def pack(pieces: Sequence[Tensor], kernel: bool | str | None = None) -> Tensor:
    """All elements of the pieces one after the other; a single contiguous piece is not copied.

    With `kernel=True` in one launch, where the kernel runs on them.
    """
    if len(pieces) == 1:
        return pieces[0].reshape(-1)
    if kernel is True and packing.packable(pieces):
        return packing.pack(pieces)
    flat = pieces[0].new_empty(sum(p.numel() for p in pieces))
    parts = flat.split_with_sizes([p.numel() for p in pieces])
    places = [part.view(p.shape) for part, p in zip(parts, pieces, strict=True)]
    torch._foreach_copy_(places, list(pieces))
    return flat


def unpack(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Views of consecutive pieces of `flat`."""
    sizes = [numel(shape) for shape in shapes]
    parts = flat.split_with_sizes(sizes)
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def joined(
    flat: Tensor,
    shapes: Sequence[Sequence[int]],
    specs: Sequence[ShardSpec],
    members: int,
    kernel: bool | str | None = None,
) -> list[Tensor]:
    """Full tensors from `flat`: the chunks of all of them from member 0, then from member 1, ...

    `shapes` are those of the tensors but for the dims that the specs divide. With `kernel=True`
    several tensors take one launch, where the kernel runs on them.
    """
    pairs = list(zip(shapes, specs, strict=True))
    sizes = [numel(local_shape(shape, spec, m)) for m in range(members) for shape, spec in pairs]
    rows = flat.split_with_sizes(sizes)
    if len(pairs) > 1 and kernel is True and packing.packable(rows):
        outputs = [flat.new_empty(full_shape(shape, spec)) for shape, spec in pairs]
        places = [
            chunk(y, s, m) for m in range(members) for y, s in zip(outputs, specs, strict=True)
        ]
        packing.unpack(flat, places)
        return outputs
    return [
        join(
            [rows[m * len(pairs) + i].view(chunk_shape(shape, spec, m)) for m in range(members)],
            spec,
        )
        for i, (shape, spec) in enumerate(pairs)
    ]
