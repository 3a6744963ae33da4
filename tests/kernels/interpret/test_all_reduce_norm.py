"""The kernel's source, and what it refuses; `tests/kernels/processes` runs it on several ranks."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from autopar.errors import KernelWarning
from autopar.ir.pointwise import parse_pointwise
from autopar.runtime.all_reduce_norm import all_reduce_norm
from autopar.runtime.kernels import all_reduce_norm as module
from autopar.runtime.kernels.all_reduce_norm import (
    PROGRAMS,
    REGION_BYTES,
    WORKSPACE_BYTES,
    Workspace,
    emit,
    reference,
    specialisations,
    takes,
)
from autopar.runtime.thread_world import ThreadWorld


def test_a_group_of_one_waits_for_itself() -> None:
    """Both slots in turn; every program has its own flags and rows."""
    memory = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)
    counts = torch.zeros(PROGRAMS, dtype=torch.int32)
    counts[1] = -1  # the sign of the count of calls does not matter
    memory[4 * module.MAX_RANKS : 4 * module.MAX_RANKS + 4] = 255
    workspace = Workspace(0, torch.tensor([memory.data_ptr()]), counts)
    for call in range(3):
        x, residual = torch.randn(2, 5, 24)
        got = module.all_reduce_norm(workspace, x, residual, None, 1e-5)
        for mine, wanted in zip(got, reference([x], residual, None, 1e-5), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)
        assert counts[:2].tolist() == [call + 1, call]


def refusal(*shape: int, dtype: torch.dtype = torch.float32, ranks: int = 2) -> str:
    module.fall_back.cache_clear()
    x = torch.empty(shape, dtype=dtype)
    with pytest.warns(KernelWarning) as caught:
        assert not takes(x, x, None, ranks)
    (warning,) = caught
    return str(warning.message).split(": ")[1].split(";")[0]


def test_refusals() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.empty(2, REGION_BYTES // 4 // 2)
        assert takes(x, x, x[0], 2)
    assert refusal(3, 16384) == "a message of 196608 bytes does not fit its symmetric memory"
    assert refusal(1, 16385) == "rows of 16385 elements are longer than 16384"
    assert refusal(1, 8, ranks=17) == "a group of 17 is not one of 2 to 16"
    assert refusal(1, 8, dtype=torch.float8_e5m2) == "it has no form for float8_e5m2"
    with pytest.raises(ValueError, match="an epilogue of further tensors, add"):
        emit(parse_pointwise("add(x, a0)"))


def test_threads_have_no_symmetric_memory() -> None:
    """A rank that waits for another in the interpreter would keep it from running."""
    module.fall_back.cache_clear()
    torch.manual_seed(0)
    partials, residual, weight = torch.randn(2, 3, 8), torch.randn(3, 8), torch.rand(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = ThreadWorld(2)

        def run(rank: int) -> tuple[Tensor, Tensor]:
            return all_reduce_norm(partials[rank], residual, weight, 1e-5, world.group(rank))

        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(run, range(2)))
    assert {str(w.message) for w in caught if w.category is KernelWarning} == {
        "kernel all_reduce_norm: the ranks of a group have no symmetric memory;"
        " its torch reference runs instead"
    }
    y, total, _ = reference(list(partials), residual, weight, 1e-5)
    for got, summed in made:
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(summed, total)


def test_one_row_without_further_dims() -> None:
    """The gradient of the weight is not summed over rows that there are not."""
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in "xrw")
    call = (residual, weight, 1e-5)
    y, total = all_reduce_norm(x, *call, None)
    wanted, summed, _ = reference([x], *call)
    leaves, grads = [x, residual, weight], torch.randn(2, 8, dtype=torch.float64).unbind()
    for got, want in zip(
        torch.autograd.grad((y, total), leaves, grads),
        torch.autograd.grad((wanted, summed), leaves, grads),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_forms() -> None:
    forms = specialisations()
    assert len(forms) <= 12
    assert {form.constants["RANKS"] for form in forms} == {2, 4, 8}


def test_source() -> None:
    assert_expected_inline(
        emit(parse_pointwise("cast_bf16(x)")).source,
        """\
import triton
import triton.language as tl


@triton.jit
def all_reduce_norm(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, scale_ptr, table_ptr, counts_ptr, rows,
    EPS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    count = (rows - program + programs - 1) // programs
    i = tl.arange(0, BLOCK)
    here = i < WIDTH
    call = tl.load(counts_ptr + program) + 1
    place = 4096 + ((call & 1) * 64 + program) * 65536
    own = tl.load(table_ptr + RANK)
    slot = tl.multiple_of((own + place).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    for k in tl.range(0, count, disable_licm=True):
        row = program + k * programs
        tl.store(slot + k * WIDTH + i, tl.load(x_ptr + row * WIDTH + i, mask=here), mask=here)
    tl.debug_barrier()
    member = tl.arange(0, 16)
    others = tl.load(table_ptr + member, mask=member < RANKS, other=0)
    flags = others.to(tl.pointer_type(tl.int32)) + program * 16 + RANK
    tl.atomic_xchg(flags, call, mask=member < RANKS, sem="release", scope="sys")
    told = tl.load(table_ptr + RANK).to(tl.pointer_type(tl.int32)) + program * 16
    for peer in tl.static_range(RANKS):
        while tl.atomic_add(told + peer, 0, sem="acquire", scope="sys") - call < 0:
            pass
    tl.debug_barrier()
    for k in tl.range(0, count, disable_licm=True):
        row = program + k * programs
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for peer in tl.static_range(RANKS):
            base = tl.load(table_ptr + peer) + place
            part = tl.multiple_of(base.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
            x = tl.load(part + k * WIDTH + i, mask=here, other=0.0, cache_modifier=".cg")
            total += x.to(tl.float32)
        total += tl.load(residual_ptr + row * WIDTH + i, mask=here, other=0.0).to(tl.float32)
        s = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + i, s, mask=here)
        h = s.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / WIDTH + EPS)
        tl.store(scale_ptr + row, scale)
        v = h * scale
        v = v * tl.load(weight_ptr + i, mask=here, other=0.0).to(tl.float32)
        y = v.to(tl.bfloat16).to(tl.float32)
        tl.store(y_ptr + row * WIDTH + i, y.to(y_ptr.dtype.element_ty), mask=here)
    tl.store(counts_ptr + program, call)
""",
    )
