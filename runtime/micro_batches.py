"""What one micro-batch takes of the whole batch, and how the results of all are put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.ir.lowered import ShardSpec


def micro_slice(x: Tensor, spec: ShardSpec, micro_batch: int) -> Tensor:
    """The part of `x` that belongs to a micro-batch, without a copy where it is in one run."""
    length = spec.lengths[micro_batch] * spec.block
    start = spec.offset(micro_batch) * spec.block
    if spec.outer == 1:
        return x.narrow(spec.dim, start, length)
    apart = x.reshape(*x.shape[: spec.dim], spec.outer, -1, *x.shape[spec.dim + 1 :])
    return apart.narrow(spec.dim + 1, start, length).flatten(spec.dim, spec.dim + 1)


def micro_first(x: Tensor, micro_batch: int) -> Tensor:
    """`x` in micro-batch 0 and zeros in the others, so that the sum over them is `x`."""
    return x if micro_batch == 0 else torch.zeros_like(x)


def combined(kind: str, dim: int, outer: int, parts: Sequence[Tensor]) -> Tensor:
    """What the values of all micro-batches make together (`kind` as in the plan's programs).

    "cat" puts parts of the batch side by side along `dim`, which has `outer` repeats of them;
    "sum", "max" and "min" reduce, and "last" takes the last. Half-precision sums are in float32.
    """
    if kind == "cat":
        if outer == 1:
            return torch.cat(list(parts), dim)
        apart = [p.reshape(*p.shape[:dim], outer, -1, *p.shape[dim + 1 :]) for p in parts]
        return torch.cat(apart, dim + 1).flatten(dim, dim + 1)
    if kind == "last" or len(parts) == 1:
        return parts[-1]
    stacked = torch.stack(list(parts))
    if kind == "max":
        return stacked.amax(0)
    if kind == "min":
        return stacked.amin(0)
    half = stacked.dtype in (torch.float16, torch.bfloat16)
    return stacked.sum(0, dtype=torch.float32 if half else stacked.dtype).to(stacked.dtype)
