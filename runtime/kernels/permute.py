"""Rows gathered by an index, and added up by it: the way of tokens to experts and its backward.

`permute` is `y[i] = prologue(x[index[i]])`, rows copied 128 bits at a time; an index that is out of
range (-1 for a dropped token) gives zeros. Its backward, `sum_segments`, adds the rows that came
from one row in the order of their positions: deterministic, without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.ir.pointwise import IDENTITY, Pointwise, Step, parse_pointwise

from .ahead import Specialisation
from .emit import Kernel, compute_type, fill, triton_lines
from .launch import block_size, cdiv, launch
from .support import fall_back, usable

NAME = "permute"
TILE_BYTES = 8192  # what a program writes: four 128-bit stores for each of 128 threads
SUM_TILE_BYTES = 4096  # of a program of sums, which has several rows in flight for each
LARGEST = 1 << 62  # offsets of rows are 64-bit

# Every kernel of rows covers a tile of ROWS x BLOCK. WIDTH is a constant of the model, from which
# the compiler knows how far rows are aligned; numbers of rows differ from call to call.
TILE = """\
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (c < WIDTH)[None, :]
    target = i[:, None] * WIDTH + c[None, :]
    here = i < count"""

_PERMUTE = f"""
@triton.jit(do_not_specialize=["count", "rows"])
def permute(
    $pointers
    count, rows, WIDTH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
{TILE}
    index = tl.load(index_ptr + i, mask=here, other=-1).to(tl.int64)
    found = (index >= 0) & (index < rows * SLOTS)
    source = tl.where(found, index // SLOTS, 0)[:, None] * WIDTH + c[None, :]
    x = tl.load(x_ptr + source, mask=found[:, None] & inside, other=0.0)
    $work
    tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=here[:, None] & inside)
"""

_SUM = f"""
@triton.jit(do_not_specialize=["count"])
def sum_segments(
    $pointers
    count, WIDTH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
{TILE}
    start = tl.load(starts_ptr + i, mask=here, other=0)
    stop = tl.load(starts_ptr + i + 1, mask=here, other=0)
    total = tl.zeros([ROWS, BLOCK], $compute)
    for first in range(0, tl.max(stop - start, 0), 2):
        for step in tl.static_range(2):
            at = start + first + step
            live = at < stop
            slot = tl.load(order_ptr + at, mask=live, other=0)
            source = (slot // SLOTS)[:, None] * WIDTH + c[None, :]
            x = tl.load(x_ptr + source, mask=live[:, None] & inside, other=0.0).to($compute)
            $weigh
            total += x
    written = here[:, None] & inside
    $work
    tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=written)
"""


@dataclass(frozen=True)
class Segments:
    """The positions of an index by what they point to: those of row `r`, ascending, are
    `order[starts[r]:starts[r + 1]]`. Positions out of range are in no segment.
    """

    order: Tensor
    starts: Tensor

    @staticmethod
    def of(index: Tensor, count: int) -> Segments:
        """The segments of `count` rows for a one-dimensional integer index."""
        values, order = torch.sort(index, stable=True)
        bounds = torch.arange(count + 1, device=index.device, dtype=index.dtype)
        return Segments(order, torch.searchsorted(values, bounds))

    @property
    def count(self) -> int:
        return len(self.starts) - 1


@cache
def emit(
    prologue: Pointwise = IDENTITY,
    default: bool = False,
    weighted: bool = False,
    compute: str = "tl.float32",
) -> Kernel:
    """The gather of row `index // SLOTS`, `weighted` times the weight at `index`.

    With `default`, rows out of range are those of a further tensor `d`, else zeros.
    """
    work, value = [], "x"
    if prologue or weighted:
        work.append(f"x = x.to({compute})")
    if prologue:
        work += triton_lines(prologue, "x", (), "u", compute)
        value = "u"
    if weighted:
        work.append(f"w = tl.load(weight_ptr + index, mask=found, other=0.0).to({compute})")
        work.append(f"v = w[:, None] * {value}")
        value = "v"
    if default:
        work.append("missing = here & ~found")
        work.append("d = tl.load(d_ptr + target, mask=missing[:, None] & inside, other=0.0)")
        work.append(f"y = tl.where(found[:, None], {value}, d)")
    elif prologue:
        work.append(f"y = tl.where(found[:, None], {value}, 0.0)")
    else:
        work.append(f"y = {value}")
    pointers = ["x_ptr", "index_ptr", *(["weight_ptr"] if weighted else [])]
    pointers += [*(["d_ptr"] if default else []), "y_ptr"]
    source = fill(_PERMUTE, pointers=[" ".join(f"{p}," for p in pointers)], work=work)
    return Kernel("permute", source)


@cache
def emit_sum(
    epilogue: Pointwise = IDENTITY, weighted: bool = False, compute: str = "tl.float32"
) -> Kernel:
    """`y[r] = epilogue(sum of weight[slot] * x[slot // SLOTS])` over the slots of segment `r`."""
    extras = [f"a{i}" for i in range(epilogue.extras)]
    weigh = []
    if weighted:
        weigh.append(f"w = tl.load(weight_ptr + slot, mask=live, other=0.0).to({compute})")
        weigh.append("x = w[:, None] * x")
    work = [
        f"{a} = tl.load({a}_ptr + target, mask=written, other=0.0).to({compute})" for a in extras
    ]
    work += triton_lines(epilogue, "total", extras, "y", compute)
    pointers = ["x_ptr", *(["weight_ptr"] if weighted else []), "order_ptr", "starts_ptr"]
    pointers += [*(f"{a}_ptr" for a in extras), "y_ptr"]
    text = [" ".join(f"{p}," for p in pointers)]
    source = fill(_SUM, pointers=text, weigh=weigh, work=work, compute=compute)
    return Kernel("sum_segments", source)


def takes(kernel: str, *tensors: Tensor) -> bool:
    """Whether a kernel of rows runs on these floating point tensors; warns once if not."""
    for x in tensors:
        if not x.is_floating_point():
            fall_back(kernel, f"it has no form for {str(x.dtype).removeprefix('torch.')}")
            return False
    return usable(kernel, *tensors, largest=LARGEST)


def permute(
    x: Tensor, index: Tensor, prologue: Pointwise = IDENTITY, segments: Segments | None = None
) -> Tensor:
    """`prologue(x[index])` by the kernel, [positions, width]; zeros where out of range.

    `x` is [rows, width], `index` integers [positions]; the prologue reads no further tensors.
    `segments` are those of the index, made in the backward if not given. Differentiable in `x`.
    """
    y: Tensor = _Permute.apply(x, index, prologue, segments)  # type: ignore[no-untyped-call]
    return y


def reference(x: Tensor, index: Tensor, prologue: Pointwise = IDENTITY) -> Tensor:
    """The same in torch."""
    found = (index >= 0) & (index < x.shape[0])
    if not x.shape[0]:
        return x.new_zeros((len(index), *x.shape[1:]))
    rows = x.index_select(0, index.where(found, 0))
    if prologue:
        rows = prologue(rows).to(x.dtype)
    return rows.where(found[:, None], 0)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, prologue: Pointwise, segments: Segments | None
    ) -> Tensor:
        ctx.prologue, ctx.segments, ctx.count = prologue, segments, x.shape[0]
        ctx.save_for_backward(index, *([x] if prologue else []))
        return gather_rows(x, index, prologue)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, *x = ctx.saved_tensors
        segments = ctx.segments or Segments.of(index, ctx.count)
        epilogue = _times(ctx.prologue.derivative()) if ctx.prologue else IDENTITY
        return sum_segments(grad, segments, epilogue, x), None, None, None


def _times(slope: Pointwise) -> Pointwise:
    """`x * slope(a0)`."""
    steps = [Step(s.op, tuple("a0" if o == "x" else o for o in s.operands)) for s in slope.steps]
    return Pointwise((*steps, Step("mul", ("x", f"t{len(steps) - 1}"))))


def gather_rows(
    x: Tensor,
    index: Tensor,
    prologue: Pointwise = IDENTITY,
    default: Tensor | None = None,
    weight: Tensor | None = None,
    slots: int = 1,
) -> Tensor:
    """`permute` without a backward: `weight[index[i]] * prologue(x[index[i] // slots])`.

    Rows out of range are those of `default`, [positions, width], if it is given; `weight` has
    rows * slots elements.
    """
    if prologue.extras:
        raise ValueError(f"permute: the prologue {prologue} reads further tensors")
    count, width = len(index), x.shape[1]
    y = torch.empty((count, width), dtype=x.dtype, device=x.device)
    given = [t.contiguous() for t in (weight, default) if t is not None]
    kernel = emit(prologue, default is not None, weight is not None, compute_type(x.dtype))
    arguments = [x.contiguous(), index.contiguous(), *given, y]
    rows, block = tile(width, y.element_size(), TILE_BYTES)
    launch_rows(kernel, arguments, y, x.shape[0], SLOTS=slots, ROWS=rows, BLOCK=block)
    return y


def sum_segments(
    x: Tensor,
    segments: Segments,
    epilogue: Pointwise = IDENTITY,
    extras: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    slots: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`y[r] = epilogue(sum of weight[s] * x[s // slots])` over the slots `s` of segment `r`.

    `x` is [rows, width], `weight` [rows * slots] (ones if None), the extras [segments, width]. Sums
    are in float32 (float64 for float64), in the order of the slots; `y` has `dtype` (default x's).
    """
    y = torch.empty((segments.count, x.shape[1]), dtype=dtype or x.dtype, device=x.device)
    kernel = emit_sum(epilogue, weight is not None, compute_type(x.dtype))
    weights = [] if weight is None else [weight.contiguous()]
    tensors = [x.contiguous(), *weights, segments.order, segments.starts]
    tensors += [*(a.contiguous() for a in extras[: epilogue.extras]), y]
    rows, block = tile(x.shape[1], y.element_size(), SUM_TILE_BYTES)
    launch_rows(kernel, tensors, y, SLOTS=slots, ROWS=rows, BLOCK=block)
    return y


def sum_reference(
    x: Tensor,
    index: Tensor,
    count: int,
    epilogue: Pointwise = IDENTITY,
    extras: Sequence[Tensor] = (),
) -> Tensor:
    """`sum_segments` of the segments of `index`, without weights, in torch."""
    compute = torch.promote_types(x.dtype, torch.float32)
    found = (index >= 0) & (index < count)
    total = x.new_zeros((count, *x.shape[1:]), dtype=compute)
    total = total.index_add(0, index[found], x[found].to(compute))
    return epilogue(total, *extras).to(x.dtype)


def launch_rows(
    kernel: Kernel, tensors: Sequence[Tensor], y: Tensor, *rows: int, **constants: int
) -> None:
    """Launch over the tiles of `y`, [count, width]; further numbers of `rows` come after count."""
    count, width = y.shape
    if y.numel():
        grid = (cdiv(count, constants["ROWS"]), cdiv(width, constants["BLOCK"]))
        launch(kernel, grid, *tensors, count, *rows, WIDTH=width, **constants)


def tile(width: int, element_bytes: int, tile_bytes: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, powers of two."""
    elements = block_size(tile_bytes // element_bytes)
    block = min(elements, 1 << max(width - 1, 0).bit_length())
    return elements // block, block


def specialisations() -> list[Specialisation]:
    """Rows of a usual width, gathered and added up, plain and with a scale or a residual."""
    half = parse_pointwise("mul(x, 0.5)")
    residual = parse_pointwise("add(x, a0)")
    forms = []
    for dtype in ("fp32", "bf16", "fp16"):
        forms.append(form(emit(), dtype, TILE_BYTES, SLOTS=1))
        forms.append(form(emit_sum(), dtype, SUM_TILE_BYTES, SLOTS=1))
        forms.append(form(emit_sum(residual), dtype, SUM_TILE_BYTES, SLOTS=1))
    forms.append(form(emit(half), "bf16", TILE_BYTES, SLOTS=1))
    forms.append(form(emit(weighted=True), "bf16", TILE_BYTES, SLOTS=2))
    forms.append(form(emit_sum(weighted=True), "bf16", SUM_TILE_BYTES, SLOTS=2))
    return forms


def form(kernel: Kernel, dtype: str, tile_bytes: int, **constants: int) -> Specialisation:
    """A kernel of rows for a width of 1024, all tensors of one dtype but integers: int64."""
    head = kernel.source.split("(\n", 1)[1].split("):\n")[0]
    names = [p.strip() for p in head.split(",") if p.strip() and ":" not in p]
    whole = ("index_ptr", "order_ptr", "starts_ptr", "position_ptr")
    kinds = {n: "*i64" if n in whole else f"*{dtype}" for n in names if n.endswith("_ptr")}
    rows, block = tile(1024, 4 if dtype == "fp32" else 2, tile_bytes)
    return Specialisation(
        kernel,
        {n: kinds.get(n, "i32") for n in names},
        {"WIDTH": 1024, "ROWS": rows, "BLOCK": block, **constants},
        tuple(kinds),
    )
