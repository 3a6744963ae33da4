"""What `benchmarks.gpu.kernels` times: every kernel on sizes of large models, and its baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ir.pointwise import Fusion, parse_pointwise
from autopar.runtime.kernels import dropout
from autopar.runtime.random import keep_mask, keep_mask_traced, whole

P, SEED, CALL = 0.1, 1234, 0


@dataclass(frozen=True)
class Case:
    """One kernel on one size.

    `nbytes` are those that must move at the least; `error` gives the largest difference from the
    reference, which may be up to `limit`. `launches` is how many kernels `ours` queues.
    """

    kernel: str
    name: str
    nbytes: int
    ours: Callable[[], Any]
    error: Callable[[], float]
    limit: float
    baselines: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    launches: int = 1


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape; infinite where only one is NaN."""
    difference = (a.double() - b.double()).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(difference.masked_fill(same, 0.0).nan_to_num(nan=float("inf")).max())


def inductor(fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function under Inductor; as it is on CPU, where only the script is tried."""
    return torch.compile(fn, dynamic=False) if device.type == "cuda" else fn


def dropout_residual(device: torch.device, tiny: bool) -> Case:
    """`dropout(x) + residual`, forward."""
    shape = (4, 64) if tiny else (8192, 8192)
    x, residual = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    fusion, region = Fusion(epilogue=parse_pointwise("add(x, a0)")), whole(shape)

    def ours() -> Tensor:
        return dropout.dropout(x, P, SEED, CALL, region, fusion, (residual,))

    def traced(x: Tensor, residual: Tensor) -> Tensor:
        mask = keep_mask_traced(P, SEED, CALL, region, device)
        return (torch.where(mask, x.float() / (1 - P), 0.0) + residual.float()).to(x.dtype)

    def error() -> float:
        mask = keep_mask(P, SEED, CALL, region, device)
        return largest_difference(ours(), dropout.reference(x, mask, P, fusion, (residual,)))

    compiled = inductor(traced, device)
    return Case(
        "dropout",
        f"residual added, {shape[0]} x {shape[1]} bf16",
        3 * x.nbytes,
        ours,
        error,
        2**-6,  # a rounding of values below 8
        {
            "inductor": lambda: compiled(x, residual),
            "torch": lambda: F.dropout(x, P) + residual,
        },
    )


CASES: dict[str, Callable[[torch.device, bool], Case]] = {
    "dropout:residual": dropout_residual,
}
