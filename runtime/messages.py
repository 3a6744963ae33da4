"""Several tensors in one flat message per dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .step_parts import Crossing


def pack(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One flat message per dtype, in the order in which dtypes come first."""
    flat: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        flat.setdefault(tensor.dtype, []).append(tensor.detach().reshape(-1))
    return [same[0] if len(same) == 1 else torch.cat(same) for same in flat.values()]


def unpack(messages: Sequence[Tensor], types: Sequence[Crossing]) -> list[Tensor]:
    """The tensors of the messages that `pack` made of tensors of these types."""
    parts = {
        dtype: iter(torch.split(message, sizes))
        for (dtype, sizes), message in zip(_by_dtype(types).items(), messages, strict=True)
    }
    return [next(parts[t.dtype]).view(t.shape) for t in types]


def empty_messages(types: Sequence[Crossing], device: torch.device) -> list[Tensor]:
    """Memory for the messages of tensors of these types."""
    return [
        torch.empty(sum(sizes), dtype=dtype, device=device)
        for dtype, sizes in _by_dtype(types).items()
    ]


def _by_dtype(types: Sequence[Crossing]) -> dict[torch.dtype, list[int]]:
    sizes: dict[torch.dtype, list[int]] = {}
    for type_ in types:
        sizes.setdefault(type_.dtype, []).append(torch.Size(type_.shape).numel())
    return sizes
