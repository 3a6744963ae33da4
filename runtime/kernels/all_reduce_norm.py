"""One-shot all-reduce, residual and RMSNorm in one launch, for messages that latency rules.

Every rank puts its partial values into symmetric memory, tells all ranks, waits until all have told
it, and reads all of them: `sum = x_0 + x_1 + ... + residual`, `y = epilogue(rms_norm(sum) *
weight)`. Every rank adds in the order of the ranks, so that all have the same bits.

A program has its own rows, flags, counter of calls and two slots of memory, which it uses in turn:
what it waits for in one call says that every peer has finished the launch before, and with it has
read the slot that the next call writes. So two calls on one stream cannot race, and the counter,
being on the device, counts replays of a CUDA graph too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise

from .ahead import Specialisation
from .emit import Kernel, compute_type, fill, triton_lines
from .launch import cdiv, launch
from .support import fall_back, interpreted, usable

NAME = "all_reduce_norm"

# Few enough to run at once on any GPU that this is for, as programs that wait for each other must.
PROGRAMS = 64
INTERPRETED_PROGRAMS = 2
MAX_RANKS = 16
REGION_BYTES = 1 << 16  # of one program and slot
FLAG_BYTES = 4 * MAX_RANKS * PROGRAMS
WORKSPACE_BYTES = FLAG_BYTES + 2 * PROGRAMS * REGION_BYTES
WIDEST = 16384  # elements of a row, which stays in registers

_TEMPLATE = f"""
@triton.jit
def {NAME}(
    x_ptr, residual_ptr, $weight_ptr y_ptr, sum_ptr, scale_ptr, table_ptr, counts_ptr, rows,
    EPS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    count = (rows - program + programs - 1) // programs
    i = tl.arange(0, BLOCK)
    here = i < WIDTH
    call = tl.load(counts_ptr + program) + 1
    place = {FLAG_BYTES} + ((call & 1) * {PROGRAMS} + program) * {REGION_BYTES}
    own = tl.load(table_ptr + RANK)
    slot = tl.multiple_of((own + place).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    for k in tl.range(0, count, disable_licm=True):
        row = program + k * programs
        tl.store(slot + k * WIDTH + i, tl.load(x_ptr + row * WIDTH + i, mask=here), mask=here)
    tl.debug_barrier()
    member = tl.arange(0, {MAX_RANKS})
    others = tl.load(table_ptr + member, mask=member < RANKS, other=0)
    flags = others.to(tl.pointer_type(tl.int32)) + program * {MAX_RANKS} + RANK
    tl.atomic_xchg(flags, call, mask=member < RANKS, sem="release", scope="sys")
    told = tl.load(table_ptr + RANK).to(tl.pointer_type(tl.int32)) + program * {MAX_RANKS}
    for peer in tl.static_range(RANKS):
        while tl.atomic_add(told + peer, 0, sem="acquire", scope="sys") - call < 0:
            pass
    tl.debug_barrier()
    for k in tl.range(0, count, disable_licm=True):
        row = program + k * programs
        total = tl.zeros([BLOCK], dtype=$compute)
        for peer in tl.static_range(RANKS):
            base = tl.load(table_ptr + peer) + place
            part = tl.multiple_of(base.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
            x = tl.load(part + k * WIDTH + i, mask=here, other=0.0, cache_modifier=".cg")
            total += x.to($compute)
        total += tl.load(residual_ptr + row * WIDTH + i, mask=here, other=0.0).to($compute)
        s = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + i, s, mask=here)
        h = s.to($compute)
        scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / WIDTH + EPS)
        tl.store(scale_ptr + row, scale)
        v = h * scale
        $weigh
        $work
        tl.store(y_ptr + row * WIDTH + i, y.to(y_ptr.dtype.element_ty), mask=here)
    tl.store(counts_ptr + program, call)
"""


@dataclass(frozen=True)
class Workspace:
    """Symmetric memory as one rank sees it.

    `table` is int64 [ranks], the addresses of all ranks' memory (`WORKSPACE_BYTES`, zero at first)
    in this process; `counts` int32 [PROGRAMS], zero at first. `owners` keep the memory alive.
    """

    rank: int
    table: Tensor
    counts: Tensor
    owners: tuple[Any, ...] = ()

    @property
    def ranks(self) -> int:
        return self.table.numel()


@cache
def emit(
    epilogue: Pointwise = IDENTITY, weighted: bool = True, compute: str = "tl.float32"
) -> Kernel:
    """The kernel of one epilogue, which reads no further tensors (ValueError otherwise)."""
    if epilogue.extras:
        raise ValueError(f"{NAME}: an epilogue of further tensors, {epilogue}")
    weight = f"tl.load(weight_ptr + i, mask=here, other=0.0).to({compute})"
    source = fill(
        _TEMPLATE,
        weight_ptr="weight_ptr," if weighted else "",
        compute=compute,
        weigh=[f"v = v * {weight}"] if weighted else [],
        work=triton_lines(epilogue, "v", [], "y", compute),
    )
    return Kernel(NAME, source)


def takes(x: Tensor, residual: Tensor, weight: Tensor | None, ranks: int) -> bool:
    """Whether the kernel runs on a rank's partial values; warns once if not.

    The same on all ranks of a group, whose tensors are alike.
    """
    tensors = [x, residual, *([] if weight is None else [weight])]
    if not usable(NAME, *tensors):
        return False
    why = _no_form(tensors, ranks)
    if why is not None:
        fall_back(NAME, why)
    return why is None


def _no_form(tensors: Sequence[Tensor], ranks: int) -> str | None:
    x = tensors[0]
    width = x.shape[-1]
    if len({t.dtype is torch.float64 for t in tensors}) > 1:
        return "it has no form for float64 among other dtypes"
    if not 2 <= ranks <= MAX_RANKS:
        return f"a group of {ranks} is not one of 2 to {MAX_RANKS}"
    if width > WIDEST:
        return f"rows of {width} elements are longer than {WIDEST}"
    rows = x.numel() // width if width else 0
    if cdiv(rows, _programs()) * width * x.element_size() > REGION_BYTES:
        return f"a message of {x.nbytes} bytes does not fit its symmetric memory"
    if x.is_cuda and torch.version.hip is not None:
        return "its flags were never tried on AMD GPUs"
    return None


def _programs() -> int:
    return INTERPRETED_PROGRAMS if interpreted() else PROGRAMS


def all_reduce_norm(
    workspace: Workspace,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    epilogue: Pointwise = IDENTITY,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, sum, scale) of one rank's partial `x` [..., width], by the kernel; all ranks call it.

    `y` is of `dtype` (default that of the sum), `scale` [..., 1] is one over the root mean square
    of the rows of the sum, in float32 (or float64). Not differentiable. One stream per workspace.
    """
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    total = torch.empty(
        x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device
    )
    y = torch.empty(x.shape, dtype=dtype or total.dtype, device=x.device)
    compute = torch.promote_types(x.dtype, torch.float32)
    scale = torch.empty((*x.shape[:-1], 1), dtype=compute, device=x.device)
    block = max(16, 1 << (width - 1).bit_length()) if width else 0
    launch(
        emit(epilogue, weight is not None, compute_type(x.dtype)),
        (min(rows, _programs()),),
        x.contiguous(),
        residual.contiguous(),
        *([] if weight is None else [weight.contiguous()]),
        y,
        total,
        scale,
        workspace.table,
        workspace.counts,
        rows,
        EPS=eps,
        RANK=workspace.rank,
        RANKS=workspace.ranks,
        WIDTH=width,
        BLOCK=block,
        num_warps=_warps(block, x.element_size()),
        num_waves=_waves(block, x.element_size()),
    )
    return y, total, scale


def _warps(block: int, itemsize: int) -> int:
    """Two loads of 128 bits of a 16-bit dtype per thread and row, one of others; at most 16 warps.

    In float32 two would do, but ptxas then saves registers until it spills: 16 bytes per thread of
    2048 elements with Triton 3.9 for sm_90, 8 of 4096 with Triton 3.6 for sm_100.
    """
    return min(16, max(1, block // (512 if itemsize == 2 else 128)))


def _waves(block: int, itemsize: int) -> int:
    """AMD's waves of 64 threads, for loads of 128 bits."""
    return min(16, max(1, block // (512 if itemsize == 2 else 256)))


def normalised(
    total: Tensor,
    weight: Tensor | None,
    eps: float,
    epilogue: Pointwise = IDENTITY,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, scale) of the sum, in torch."""
    h = total.to(torch.promote_types(total.dtype, torch.float32))
    scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    v = h * scale if weight is None else h * scale * weight.to(h.dtype)
    return epilogue(v).to(dtype or total.dtype), scale


def reference(
    partials: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    epilogue: Pointwise = IDENTITY,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, sum, scale) of all ranks' partial values, in torch."""
    kept = torch.promote_types(partials[0].dtype, residual.dtype)
    compute = torch.promote_types(kept, torch.float32)
    total = torch.zeros_like(partials[0], dtype=compute)
    for x in (*partials, residual):
        total = total + x.to(compute)
    total = total.to(kept)
    y, scale = normalised(total, weight, eps, epilogue, dtype)
    return y, total, scale


def specialisations() -> list[Specialisation]:
    """Rows of usual models over two, four and eight ranks; a sum in float32 that is cast."""
    cast = parse_pointwise("cast_bf16(x)")
    return [
        form("bf16", 4096, 8),
        form("bf16", 8192, 4),
        form("fp16", 4096, 2),
        form("fp32", 2048, 8),
        form("bf16", 768, 4),  # not a power of two
        form("bf16", 16384, 8, weighted=False),
        form("fp32", 4096, 4, epilogue=cast, out="bf16"),
    ]


def form(
    dtype: str,
    width: int,
    ranks: int,
    epilogue: Pointwise = IDENTITY,
    weighted: bool = True,
    out: str | None = None,
) -> Specialisation:
    """The kernel of rows of a width over so many ranks; all tensors but `y` of one dtype."""
    names = ["x_ptr", "residual_ptr", *(["weight_ptr"] if weighted else [])]
    block, itemsize = 1 << (width - 1).bit_length(), 4 if dtype == "fp32" else 2
    return Specialisation(
        emit(epilogue, weighted),
        {
            **dict.fromkeys(names, f"*{dtype}"),
            "y_ptr": f"*{out or dtype}",
            "sum_ptr": f"*{dtype}",
            "scale_ptr": "*fp32",
            "table_ptr": "*i64",
            "counts_ptr": "*i32",
            "rows": "i32",
        },
        {"EPS": 1e-5, "RANK": 1, "RANKS": ranks, "WIDTH": width, "BLOCK": block},
        (*names, "y_ptr", "sum_ptr", "scale_ptr", "table_ptr", "counts_ptr"),
        num_warps=_warps(block, itemsize),
        num_waves=_waves(block, itemsize),
    )
