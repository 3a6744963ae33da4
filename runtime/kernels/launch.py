"""Run an emitted kernel: compiled on a GPU, interpreted on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .emit import Kernel, load
from .interpret import rounding
from .support import interpreted

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]

# A block of this size in the interpreter: 3 to 5 ms a program whatever its size, so few programs.
INTERPRETED_BLOCK = 1 << 14

# The interpreter keeps where it is in globals, and simulated ranks are threads.
_INTERPRETER = threading.Lock()


def launch(
    kernel: Kernel,
    grid: Grid,
    *arguments: Any,
    num_warps: int = 4,
    num_waves: int | None = None,
    **constants: Any,
) -> None:
    """Launch `kernel` over `grid` with its run-time arguments in order and its constants by name.

    AMD's `num_waves` of 64 threads take the place of `num_warps` of 32; they are as many if None.
    It runs on the GPU of its tensors, whichever is current. An empty grid launches nothing.
    """
    if isinstance(grid, tuple) and 0 in grid:
        return
    if num_waves is not None and torch.version.hip is not None:
        num_warps = num_waves
    function = load(kernel)
    with _INTERPRETER if interpreted() else nullcontext(), _rounded(), _on_device(arguments):
        # Contracted multiply-adds would round otherwise than the references.
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        function[grid](*arguments, **constants, **options)


def _on_device(arguments: Sequence[Any]) -> AbstractContextManager[Any]:
    """The GPU of the first tensor among some arguments made the current one."""
    for x in arguments:
        if isinstance(x, torch.Tensor) and x.device.type == "cuda":
            return torch.cuda.device(x.device)
    return nullcontext()


def _rounded() -> AbstractContextManager[None]:
    return rounding() if interpreted() else nullcontext()


def block_size(compiled: int) -> int:
    """Elements per program: `compiled` on a GPU, more in the interpreter."""
    return max(compiled, INTERPRETED_BLOCK) if interpreted() else compiled


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)
