"""What `assemble` reads out of an assembler, and what it refuses."""

from __future__ import annotations

import pytest

from autopar.errors import UserError
from autopar.runtime.kernels.ahead import Specialisation, assemble
from autopar.runtime.kernels.emit import Kernel, fill

COPY = """
@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i$mask)$mask)
"""
# More values alive at once than a thread has registers: 512 in each of one warp's threads.
CROWDED = """
@triton.jit
def crowded(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x / tl.sum(x))
"""


def copy(mask: str = "", aligned: tuple[str, ...] = ("x_ptr", "y_ptr", "n")) -> Specialisation:
    kernel = Kernel("copy", fill(COPY, mask=mask))
    return Specialisation(
        kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}, {"BLOCK": 1024}, aligned
    )


@pytest.mark.parametrize(("architecture", "each"), [("sm_90", 2), ("gfx942", 1)])
def test_wide_accesses_are_counted(architecture: str, each: int) -> None:
    wide = assemble(copy(), architecture)
    assert (wide.architecture, wide.stack_bytes, wide.shared_bytes) == (architecture, 0, 0)
    assert wide.wide_loads == wide.wide_stores == each  # of 1024 floats by 128 or 256 threads
    narrow = assemble(copy(aligned=()), "sm_90")
    assert narrow.wide_loads == narrow.wide_stores == 0


def test_a_mask_that_may_end_anywhere_is_narrow() -> None:
    made = assemble(copy(mask=", mask=i < n", aligned=("x_ptr", "y_ptr")), "sm_90")
    assert made.wide_loads == made.wide_stores == 0


def test_spills_show() -> None:
    form = Specialisation(
        Kernel("crowded", fill(CROWDED)),
        {"x_ptr": "*fp32", "y_ptr": "*fp32"},
        {"BLOCK": 16384},
        ("x_ptr", "y_ptr"),
        num_warps=1,
    )
    assert assemble(form, "sm_90").stack_bytes > 0


@pytest.mark.parametrize("architecture", ["sm_9", "sm_90x", "gfx9", "h100", ""])
def test_an_unknown_architecture(architecture: str) -> None:
    with pytest.raises(UserError, match=f"unknown architecture '{architecture}'"):
        assemble(copy(), architecture)


def test_not_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="cannot be compiled under Triton's interpreter"):
        assemble(copy(), "sm_90")
