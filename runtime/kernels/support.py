"""Where a kernel can run, and the one warning where it cannot."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autopar.errors import KernelWarning

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
OLDEST_CAPABILITY = (8, 0)  # what the ahead-of-time job compiles for, from sm_80 on
_ON = frozenset({"1", "true", "on", "yes", "y"})  # what Triton reads as a yes
LARGEST = (1 << 31) - 1  # offsets inside a kernel are 32-bit unless it says otherwise


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels of this process."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _ON


def unsupported(
    *tensors: Tensor,
    dtypes: Collection[torch.dtype] = FLOATS,
    float64: bool = True,
    largest: int = LARGEST,
) -> str | None:
    """Why a kernel cannot take these tensors, as a clause, or None if it can.

    The first tensor decides where it would run; `dtypes` are those that the floating point ones may
    have, and float64 with them (it is computed in float64) unless `float64` is False.
    """
    taken = {*dtypes, torch.float64} if float64 else set(dtypes)
    for x in tensors:
        if x.is_floating_point() and x.dtype not in taken:
            return f"it has no form for {str(x.dtype).removeprefix('torch.')}"
        if x.numel() > largest:
            return f"{x.numel()} elements are more than the {largest} that its offsets reach"
        if x.is_neg() or x.is_conj():
            return "a tensor is a view that negates or conjugates what is in memory"
    return _no_place(tensors[0].device)


@cache
def _no_place(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return None if interpreted() else "it runs on GPUs (or under TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"it has no form for {device.type} devices"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def runs_on(device: torch.device) -> bool:
    """Whether this process runs kernels on the device at all, whatever the tensors."""
    return _no_place(device) is None


@cache
def fall_back(kernel: str, why: str) -> None:
    """Warn, once for every kernel and reason, that the torch reference runs in its place."""
    text = f"kernel {kernel}: {why}; its torch reference runs instead"
    warnings.warn(text, KernelWarning, stacklevel=3)


def usable(kernel: str, *tensors: Tensor, **limits: Any) -> bool:
    """Whether the kernel runs on these tensors; warns once if not. `limits` as `unsupported`'s."""
    why = unsupported(*tensors, **limits)
    if why is not None:
        fall_back(kernel, why)
    return why is None


def imported_to_compile() -> bool:
    """Whether triton was imported without its interpreter, which is then out of reach."""
    return "triton" in sys.modules and not interpreted()
