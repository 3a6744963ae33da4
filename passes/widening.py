"""How much wider than a gradient in 16 bits its sum over micro-batches is."""

from __future__ import annotations

import torch


def widening(dtype: torch.dtype) -> int:
    """How many bytes more than a gradient its sum takes, per byte of the gradient."""
    if not dtype.is_floating_point or dtype.itemsize >= torch.float32.itemsize:
        return 0
    return torch.float32.itemsize // dtype.itemsize - 1
