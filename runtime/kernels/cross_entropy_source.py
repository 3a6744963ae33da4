"""Source of the cross-entropy kernels: a pass over the logits each way, and a combination."""

from __future__ import annotations

from functools import cache

from autopar.ir.pointwise import IDENTITY, Pointwise

from .emit import Kernel, fill, triton_lines

# A row begins anywhere; its blocks begin at the multiple of 16 elements before it, so that their
# loads are wide whatever the number of classes. The blocks from BLOCK to BLOCK + gap are full; the
# others, a first and mostly one last, are masked.
_ROWS = """
row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
there = row < rows
ids = tl.load(ids_ptr + row, mask=there, other=0).to(tl.int64)
kept = there & (ids != IGNORED)
local = ids - start
here = kept & (local >= 0) & (local < classes)
begin = row.to(tl.int64) * stride
shift = (begin % 16).to(tl.int32)
x_ptr += tl.multiple_of(begin - shift, 16)[:, None]
lane = tl.arange(0, BLOCK)[None, :]
whole = (classes >= BLOCK) & (tl.program_id(0) * ROWS + ROWS <= rows)
gap = tl.where(whole, classes // BLOCK * BLOCK - BLOCK, 0)
""".strip().splitlines()

_EDGE = """
i = k + tl.where(k > 0, gap, 0) + lane
column = i - shift[:, None]
inside = (column >= 0) & (column < classes) & there[:, None]
x = tl.load(x_ptr + i, mask=inside, other=0.0).to($compute)
""".strip().splitlines()

# One block more of the online softmax; sums are kept by lane until the end.
_FOLD = """
new = tl.maximum(top, tl.max(u, 1))
base = tl.where(new == float("-inf"), 0.0, new)
total = total * tl.exp(top - base)[:, None] + tl.exp(u - base[:, None])
top = new
""".strip().splitlines()

_FORWARD = """
@triton.jit(do_not_specialize=["rows", "classes", "stride", "start"])
def cross_entropy(
    x_ptr, ids_ptr, weight_ptr, out_ptr, rows, classes, stride, start,
    IGNORED: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    own_ptr = x_ptr
    $rows
    own = tl.load(own_ptr + begin + local, mask=here, other=0.0).to($compute)
    $own
    end = tl.max(tl.where(kept, classes + shift, 0), 0)
    stop = tl.where(end > 0, BLOCK + gap, 0)
    step = tl.full([1, BLOCK], BLOCK, tl.int32)
    ahead = tl.load(x_ptr + (BLOCK + lane), mask=step < stop, other=0.0)
    top = tl.full([ROWS], float("-inf"), $compute)
    total = tl.zeros([ROWS, BLOCK], $compute)
    rest = tl.zeros([ROWS, BLOCK], $compute)
    for k in range(0, end - gap, BLOCK):
        $edge
        $prologue
        if SMOOTH:
            part = tl.where(inside, u, 0.0)
            if WEIGHTED:
                part *= tl.load(weight_ptr + start + column, mask=inside, other=0.0).to($compute)
            rest += part
        u = tl.where(inside, u, float("-inf"))
        $fold
    for first in range(BLOCK, stop, BLOCK):
        x = ahead.to($compute)
        i = first + lane
        ahead = tl.load(x_ptr + (i + BLOCK), mask=first + step < stop, other=0.0)
        $prologue
        if SMOOTH:
            if WEIGHTED:
                rest += u * tl.load(weight_ptr + start + i - shift[:, None]).to($compute)
            else:
                rest += u
        $fold
    tl.store(out_ptr + row, top, mask=there)
    tl.store(out_ptr + row + rows, tl.sum(total, 1), mask=there)
    tl.store(out_ptr + row + 2 * rows, tl.where(here, chosen, 0.0), mask=there)
    if SMOOTH:
        tl.store(out_ptr + row + 3 * rows, tl.sum(rest, 1), mask=there)
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
    ids = tl.load(ids_ptr + row, mask=there, other=0).to(tl.int64)
    kept = there & (ids != IGNORED)
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
    dx_ptr += tl.multiple_of(begin - shift, 16)[:, None]
    end = tl.max(tl.where(there, classes + shift, 0), 0)
    for k in range(0, end - gap, BLOCK):
        $edge
        $prologue
        if WEIGHTED and SMOOTH:
            share = tl.load(weight_ptr + start + column, mask=inside, other=0.0).to($compute)
        $work
        tl.store(dx_ptr + i, d, mask=inside)
    for first in range(BLOCK, BLOCK + gap, BLOCK):
        i = first + lane
        x = tl.load(x_ptr + i).to($compute)
        $prologue
        if WEIGHTED and SMOOTH:
            share = tl.load(weight_ptr + start + i - shift[:, None]).to($compute)
        $work
        tl.store(dx_ptr + i, d)
"""

# The gradient of `u`, then of `x`.
_WORK = """
d = tl.exp(u - log_sum[:, None]) * factor[:, None]
if WEIGHTED and SMOOTH:
    d -= spread[:, None] * share
elif SMOOTH:
    d -= spread[:, None]
d = tl.where(i == target[:, None], d - own[:, None], d)
""".strip().splitlines()
_STORED = "d = tl.where(kept[:, None], d, 0.0).to(dx_ptr.dtype.element_ty)"


@cache
def emit(program: Pointwise = IDENTITY, compute: str = "tl.float32") -> Kernel:
    """The forward: per row the maximum, sum of exponentials, target's logit and sum of logits."""
    source = fill(
        _FORWARD,
        rows=_ROWS,
        own=triton_lines(program, "own", [], "chosen", compute, "o"),
        edge=_edge(compute),
        prologue=triton_lines(program, "x", [], "u", compute, "p"),
        fold=_FOLD,
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
    work = list(_WORK)
    if program:
        work += triton_lines(program.derivative(), "x", [], "slope", compute, "s")
        work.append("d *= slope")
    source = fill(
        _BACKWARD,
        rows=_ROWS,
        edge=_edge(compute),
        prologue=triton_lines(program, "x", [], "u", compute, "p"),
        work=[*work, _STORED],
        compute=compute,
    )
    return Kernel("cross_entropy_backward", source)


def _edge(compute: str) -> list[str]:
    return [line.replace("$compute", compute) for line in _EDGE]
