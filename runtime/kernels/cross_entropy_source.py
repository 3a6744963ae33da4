"""Source of the cross-entropy kernels: a pass over the logits each way, and a combination."""

from __future__ import annotations

from functools import cache

from autopar.ir.pointwise import IDENTITY, Pointwise

from .emit import Kernel, fill, triton_lines

# A row begins anywhere; its blocks begin at the multiple of 16 elements before it, so that their
# loads are wide whatever the number of classes. Between the first and the last block nothing is
# masked.
_ROWS = """
row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
there = row < rows
ids = tl.load(ids_ptr + row, mask=there, other=IGNORED).to(tl.int64)
kept = ids != IGNORED
local = ids - start
here = kept & (local >= 0) & (local < classes)
begin = row.to(tl.int64) * stride
shift = (begin % 16).to(tl.int32)
aligned = tl.multiple_of(begin - shift, 16)
whole_rows = tl.program_id(0) * ROWS + ROWS <= rows
""".strip().splitlines()

_COLUMNS = """
i = first + tl.arange(0, BLOCK)
column = i[None, :] - shift[:, None]
offset = aligned[:, None] + i[None, :]
inside = (column >= 0) & (column < classes) & there[:, None]
full = (first > 0) & (first + BLOCK <= classes) & whole_rows
if full:
    x = tl.load(x_ptr + offset).to($compute)
else:
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to($compute)
""".strip().splitlines()

_FORWARD = """
@triton.jit(do_not_specialize=["rows", "classes", "stride", "start"])
def cross_entropy(
    x_ptr, ids_ptr, weight_ptr, out_ptr, rows, classes, stride, start,
    IGNORED: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    $rows
    own = tl.load(x_ptr + begin + local, mask=here, other=0.0).to($compute)
    $own
    top = tl.full([ROWS], float("-inf"), $compute)
    total = tl.zeros([ROWS], $compute)
    rest = tl.zeros([ROWS], $compute)
    for first in range(0, tl.max(tl.where(kept, classes + shift, 0), 0), BLOCK):
        $columns
        $prologue
        if SMOOTH:
            part = tl.where(inside, u, 0.0)
            if WEIGHTED:
                part *= tl.load(weight_ptr + start + column, mask=inside, other=0.0).to($compute)
            rest += tl.sum(part, 1)
        if full == 0:
            u = tl.where(inside, u, float("-inf"))
        new = tl.maximum(top, tl.max(u, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(u - base[:, None]), 1)
        top = new
    tl.store(out_ptr + row, top, mask=there)
    tl.store(out_ptr + row + rows, total, mask=there)
    tl.store(out_ptr + row + 2 * rows, tl.where(here, chosen, 0.0), mask=there)
    if SMOOTH:
        tl.store(out_ptr + row + 3 * rows, rest, mask=there)
"""

# An id that is no class at all makes the loss nan.
_COMBINE = """
@triton.jit(do_not_specialize=["rows", "members", "classes"])
def cross_entropy_combine(
    message_ptr, ids_ptr, weight_ptr, whole_ptr, losses_ptr, log_sums_ptr, rows, members, classes,
    IGNORED: tl.constexpr, KEEP: tl.constexpr, SPREAD: tl.constexpr, CLASSES: tl.constexpr,
    SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    ids = tl.load(ids_ptr + row, mask=there, other=IGNORED).to(tl.int64)
    kept = ids != IGNORED
    known = kept & (ids >= 0) & (ids < classes)
    top = tl.full([BLOCK], float("-inf"), $compute)
    total = tl.zeros([BLOCK], $compute)
    chosen = tl.zeros([BLOCK], $compute)
    rest = tl.zeros([BLOCK], $compute)
    at = message_ptr + row
    for member in range(0, members):
        m = tl.load(at, mask=kept, other=0.0)
        new = tl.maximum(top, m)
        base = tl.where(new == float("-inf"), 0.0, new)
        s = tl.load(at + rows, mask=kept, other=1.0)
        total = total * tl.exp(top - base) + s * tl.exp(m - base)
        top = new
        chosen += tl.load(at + 2 * rows, mask=kept, other=0.0)
        if SMOOTH:
            rest += tl.load(at + 3 * rows, mask=kept, other=0.0)
        at += PARTS * rows
    log_sum = tl.where(known, top + tl.log(total), float("nan"))
    loss = (log_sum - chosen) * KEEP
    if WEIGHTED:
        loss *= tl.load(weight_ptr + ids, mask=known, other=0.0).to($compute)
    if SMOOTH:
        whole = CLASSES
        if WEIGHTED:
            whole = tl.load(whole_ptr)
        loss += (log_sum * whole - rest) * SPREAD
    tl.store(losses_ptr + row, tl.where(kept, loss, 0.0), mask=there)
    tl.store(log_sums_ptr + row, log_sum, mask=there)
"""

_BACKWARD = """
@triton.jit(do_not_specialize=["rows", "classes", "stride", "start", "grad_stride"])
def cross_entropy_backward(
    x_ptr, dx_ptr, ids_ptr, weight_ptr, whole_ptr, log_sums_ptr, grad_ptr,
    rows, classes, stride, start, grad_stride,
    IGNORED: tl.constexpr, KEEP: tl.constexpr, SPREAD: tl.constexpr, CLASSES: tl.constexpr,
    SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    $rows
    grad = tl.load(grad_ptr + row * grad_stride, mask=kept, other=0.0)
    log_sum = tl.load(log_sums_ptr + row, mask=kept, other=0.0)
    own = grad * KEEP
    if WEIGHTED:
        known = kept & (ids >= 0) & (ids < CLASSES)
        own *= tl.load(weight_ptr + ids, mask=known, other=0.0).to($compute)
    factor = own
    if SMOOTH:
        spread = grad * SPREAD
        if WEIGHTED:
            factor += spread * tl.load(whole_ptr)
        else:
            factor += spread * CLASSES
    target = tl.where(here, local + shift, -1).to(tl.int32)
    for first in range(0, tl.max(tl.where(there, classes + shift, 0), 0), BLOCK):
        $columns
        $prologue
        d = tl.exp(u - log_sum[:, None]) * factor[:, None]
        if SMOOTH:
            share = spread[:, None]
            if WEIGHTED:
                share *= tl.load(weight_ptr + start + column, mask=inside, other=0.0).to($compute)
            d -= share
        d = tl.where(i[None, :] == target[:, None], d - own[:, None], d)
        $slope
        d = tl.where(kept[:, None], d, 0.0).to(dx_ptr.dtype.element_ty)
        if full:
            tl.store(dx_ptr + offset, d)
        else:
            tl.store(dx_ptr + offset, d, mask=inside)
"""


@cache
def emit(program: Pointwise = IDENTITY, compute: str = "tl.float32") -> Kernel:
    """The forward: per row the maximum, sum of exponentials, target's logit and sum of logits."""
    source = fill(
        _FORWARD,
        rows=_ROWS,
        own=triton_lines(program, "own", [], "chosen", compute, "o"),
        columns=_columns(compute),
        prologue=triton_lines(program, "x", [], "u", compute, "p"),
        compute=compute,
    )
    return Kernel("cross_entropy", source)


@cache
def emit_combine(compute: str = "tl.float32") -> Kernel:
    """From the statistics of all ranks to losses and log-sum-exps."""
    return Kernel("cross_entropy_combine", fill(_COMBINE, compute=compute))


@cache
def emit_backward(program: Pointwise = IDENTITY, compute: str = "tl.float32") -> Kernel:
    """The gradient of the logits before `program`."""
    slope: list[str] = []
    if program:
        slope = triton_lines(program.derivative(), "x", [], "slope", compute, "s")
        slope.append("d *= slope")
    source = fill(
        _BACKWARD,
        rows=_ROWS,
        columns=_columns(compute),
        prologue=triton_lines(program, "x", [], "u", compute, "p"),
        slope=slope,
        compute=compute,
    )
    return Kernel("cross_entropy_backward", source)


def _columns(compute: str) -> list[str]:
    return [line.replace("$compute", compute) for line in _COLUMNS]
