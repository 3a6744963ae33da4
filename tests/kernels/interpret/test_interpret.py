"""bfloat16 in the interpreter: what a GPU gives, not raw bits."""

from __future__ import annotations

import pytest
import torch

from autopar.runtime.kernels.emit import Kernel, fill
from autopar.runtime.kernels.launch import launch

ARITHMETIC = """
@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    y = tl.load(y_ptr + i, mask=i < n)
    tl.store(out_ptr + i, $work, mask=i < n)
"""


def run(work: str, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    kernel = Kernel("arithmetic", fill(ARITHMETIC, work=work))
    launch(kernel, (1,), x, y, out, x.numel(), BLOCK=1024)
    return out


def values(seed: int) -> torch.Tensor:
    return torch.randn(1000, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("work", ["x + y", "x * y", "x - y", "-x", "x / y"])
def test_arithmetic_is_that_of_torch(work: str) -> None:
    x, y = values(0), values(1)
    out = run(work, x, y, torch.bfloat16)
    wanted = eval(work, {"x": x, "y": y})
    assert torch.equal(out, wanted)


def test_float32_rounds_to_nearest_even() -> None:
    x = torch.tensor([1.00390625, 1.01171875, 1.005, -3.1415927, 1e-40, 3.4e38, float("inf")])
    y = torch.zeros_like(x)
    kernel = Kernel("arithmetic", fill(ARITHMETIC, work="x.to(tl.bfloat16)"))
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    launch(kernel, (1,), x, y, out, x.numel(), BLOCK=16)
    assert torch.equal(out, x.bfloat16())


LOOP = """
@triton.jit
def count(bounds_ptr, out_ptr):
    total = 0
    for k in range(tl.load(bounds_ptr), tl.load(bounds_ptr + 1)):
        total += k
    tl.store(out_ptr, total)
"""


def test_bounds_of_loops_are_read_from_memory() -> None:
    bounds, out = torch.tensor([3, 7]), torch.zeros(1, dtype=torch.int64)
    launch(Kernel("count", fill(LOOP)), (1,), bounds, out)
    assert out.item() == 3 + 4 + 5 + 6


def test_comparisons_see_values_not_bits() -> None:
    x, y = values(2), values(3)
    out = run("tl.where(x < y, x, y)", x, y, torch.bfloat16)
    assert torch.equal(out, torch.minimum(x, y))
