"""Weighted sums of the rows that experts sent back.

`combine` is `out[t] = epilogue(sum_k weight[t, k] * y[position[t, k]])`. A position out of range
(-1 for a dropped token) adds nothing. One launch of the backward gives the gradients of the rows
and of the weights, and of the epilogue's further tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise

from .ahead import Specialisation
from .emit import Kernel, compute_type, fill, triton_lines
from .launch import block_size, cdiv, launch
from .permute import (
    TILE,
    Segments,
    form,
    launch_rows,
    sum_segments,
    tile,
)

NAME = "combine"
TILE_BYTES = 4096  # what a program writes
ONE = "mul(1.0, 1.0)"  # how a derivative prints that is 1 everywhere
# A row's products with the gradient are added up by one program: this many of its columns at once.
LONGEST_BLOCK = 4096

_COMBINE = f"""
@triton.jit(do_not_specialize=["count", "rows"])
def combine(
    $pointers
    count, rows, WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
{TILE}
    written = here[:, None] & inside
    $add_up
    $work
    tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=written)
"""

_BACKWARD = """
@triton.jit(do_not_specialize=["count", "rows"])
def combine_backward(
    $pointers
    count, rows, WIDTH: tl.constexpr, K: tl.constexpr, WAYS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = i < count
    way = tl.arange(0, WAYS)
    dots = tl.zeros([ROWS, WAYS], $compute)
    for column in range(0, WIDTH, BLOCK):
        c = column + tl.arange(0, BLOCK)
        inside = (c < WIDTH)[None, :]
        target = i[:, None] * WIDTH + c[None, :]
        written = here[:, None] & inside
        g = tl.load(g_ptr + target, mask=written, other=0.0).to($compute)
        $slope
        $ways
    $finish
"""


def _loads(compute: str, weighted: bool, rows: bool = True) -> list[str]:
    """Position, and as wanted weight and row, of way `k` of every token."""
    lines = [
        "p = tl.load(position_ptr + i * K + k, mask=here, other=-1).to(tl.int64)",
        "found = (p >= 0) & (p < rows)",
        "source = tl.where(found, p, 0)[:, None] * WIDTH + c[None, :]",
        "present = found[:, None] & inside",
    ]
    if weighted:
        lines.append(f"w = tl.load(weight_ptr + i * K + k, mask=found, other=0.0).to({compute})")
    if rows:
        lines.append(f"y = tl.load(y_ptr + source, mask=present, other=0.0).to({compute})")
    return lines


def _add_up(compute: str, weighted: bool) -> list[str]:
    body = _loads(compute, weighted)
    body.append("total += w[:, None] * y" if weighted else "total += y")
    return [
        f"total = tl.zeros([ROWS, BLOCK], {compute})",
        "for k in tl.static_range(K):",
        *(f"    {line}" for line in body),
    ]


def _pointers(*names: str) -> list[str]:
    return [" ".join(f"{name}_ptr," for name in names)]


@cache
def emit(
    epilogue: Pointwise = IDENTITY, weighted: bool = True, compute: str = "tl.float32"
) -> Kernel:
    """The forward: `y`, positions and weights in, then the epilogue's further tensors; `out`."""
    extras = [f"a{i}" for i in range(epilogue.extras)]
    work = _loads_of_extras(epilogue, compute)
    work += triton_lines(epilogue, "total", extras, "out", compute)
    given = ["weight"] if weighted else []
    source = fill(
        _COMBINE,
        pointers=_pointers("y", "position", *given, *extras, "out"),
        add_up=_add_up(compute, weighted),
        work=work,
    )
    return Kernel("combine", source)


@cache
def emit_backward(
    epilogue: Pointwise, weighted: bool, wanted: tuple[str, ...], compute: str = "tl.float32"
) -> Kernel:
    """The backward, from the gradient `g` to those `wanted`, of `y`, `weight`, `sum`, `a0`, ...

    `sum` is the gradient of the weighted sum. If that of `y` is wanted, every row of `y` is at
    exactly one position.
    """
    ways, finish = [], []
    if {"y", "weight"} & set(wanted):
        ways += _loads(compute, weighted and "y" in wanted, "weight" in wanted)
    if "weight" in wanted:
        ways.append("dots += tl.where((way == k)[None, :], tl.sum(g * y, 1)[:, None], 0.0)")
        finish += [
            "known = here[:, None] & (way < K)[None, :]",
            "dweight = dots.to(dweight_ptr.dtype.element_ty)",
            "tl.store(dweight_ptr + i[:, None] * K + way[None, :], dweight, mask=known)",
        ]
    if "y" in wanted:
        ways.append("dy = w[:, None] * g" if weighted else "dy = g")
        ways.append("tl.store(dy_ptr + source, dy.to(dy_ptr.dtype.element_ty), mask=present)")
    if ways:
        ways = ["for k in tl.static_range(K):", *(f"    {line}" for line in ways)]
    source = fill(
        _BACKWARD,
        pointers=_pointers(*_backward_tensors(epilogue, weighted, wanted)),
        compute=compute,
        slope=_slopes(epilogue, weighted, wanted, compute),
        ways=ways,
        finish=finish,
    )
    return Kernel("combine_backward", source)


def _slopes(
    epilogue: Pointwise, weighted: bool, wanted: tuple[str, ...], compute: str
) -> list[str]:
    """The epilogue's derivatives times `g`: those of its further tensors stored, then its own."""
    extras = [f"a{i}" for i in range(epilogue.extras)]
    lines = []
    if reads_sum(epilogue):
        lines += _add_up(compute, weighted) + _loads_of_extras(epilogue, compute)

    def slope(name: str, out: str) -> list[str]:
        program = epilogue.derivative(name)
        return triton_lines(program, "total", extras, out, compute, f"{name}_")

    for name in (w for w in wanted if w in extras):
        lines += slope(name, f"s_{name}") + _stored(name, f"g * s_{name}")
    if set(wanted) - set(extras) and str(epilogue.derivative()) != ONE:
        lines += [*slope("x", "s_x"), "g = g * s_x"]
    return lines + (_stored("sum", "g") if "sum" in wanted else [])


def _stored(name: str, value: str) -> list[str]:
    return [
        f"d{name} = {value}",
        f"tl.store(d{name}_ptr + target, d{name}.to(d{name}_ptr.dtype.element_ty), mask=written)",
    ]


def _loads_of_extras(epilogue: Pointwise, compute: str) -> list[str]:
    names = [f"a{i}" for i in range(epilogue.extras)]
    return [
        f"{a} = tl.load({a}_ptr + target, mask=written, other=0.0).to({compute})" for a in names
    ]


def _backward_tensors(
    epilogue: Pointwise, weighted: bool, wanted: tuple[str, ...]
) -> tuple[str, ...]:
    """What the backward reads and writes, in order."""
    sums, rows = reads_sum(epilogue), bool({"y", "weight"} & set(wanted))
    read = {
        "g": True,
        "y": sums or "weight" in wanted,
        "position": sums or rows,
        "weight": weighted and (sums or "y" in wanted),
    }
    extras = tuple(f"a{i}" for i in range(epilogue.extras if sums else 0))
    return (*(n for n, needed in read.items() if needed), *extras, *(f"d{w}" for w in wanted))


def reads_sum(epilogue: Pointwise) -> bool:
    """Whether a derivative of the epilogue depends on its inputs."""
    names = ("x", *(f"a{i}" for i in range(epilogue.extras)))
    return any(
        isinstance(o, str) and o[0] in "xa"
        for name in names
        for step in epilogue.derivative(name).steps
        for o in step.operands
    )


def combine(
    y: Tensor,
    position: Tensor,
    weight: Tensor | None = None,
    epilogue: Pointwise = IDENTITY,
    extras: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
    once: bool = False,
) -> Tensor:
    """`epilogue(sum_k weight[t, k] * y[position[t, k]])` by the kernel, [tokens, width].

    `y` is [rows, width], `position` integers and `weight` floats (ones if None) [tokens, k], the
    extras [tokens, width]. The sum is in float32 (float64 for float64 `y`), k ascending; `dtype`
    is that of the result (default y's). `once` promises that every row is at exactly one
    position, so that the backward is one launch. Differentiable in `y`, `weight` and the extras.
    """
    if len(extras) != epilogue.extras:
        raise ValueError(f"combine: {epilogue} reads {epilogue.extras} tensors, not {len(extras)}")
    out: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
        y, position, weight, epilogue, dtype or y.dtype, once, *extras
    )
    return out


def reference(
    y: Tensor,
    position: Tensor,
    weight: Tensor | None = None,
    epilogue: Pointwise = IDENTITY,
    extras: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same in torch."""
    compute = torch.promote_types(y.dtype, torch.float32)
    tokens, ways = position.shape
    total = y.new_zeros((tokens, y.shape[1]), dtype=compute)
    for k in range(ways if y.shape[0] else 0):
        p = position[:, k]
        found = (p >= 0) & (p < y.shape[0])
        row = y.index_select(0, p.where(found, 0)).to(compute)
        if weight is not None:
            row = weight[:, k, None].to(compute) * row
        total = total + row.where(found[:, None], 0)
    return epilogue(total, *extras).to(dtype or y.dtype)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        position: Tensor,
        weight: Tensor | None,
        epilogue: Pointwise,
        dtype: torch.dtype,
        once: bool,
        *extras: Tensor,
    ) -> Tensor:
        (tokens, ways), (rows, width) = position.shape, y.shape
        out = torch.empty((tokens, width), dtype=dtype, device=y.device)
        given = [] if weight is None else [weight.contiguous()]
        inputs = [y.contiguous(), position.contiguous(), *given]
        others = [a.contiguous() for a in extras]
        kernel = emit(epilogue, weight is not None, compute_type(y.dtype))
        r, block = tile(width, out.element_size(), TILE_BYTES)
        tensors = [*inputs, *others, out]
        launch_rows(kernel, tensors, out, rows, K=ways, ROWS=r, BLOCK=block)
        ctx.call = epilogue, once, weight is not None
        ctx.dtypes = [a.dtype for a in extras]
        ctx.save_for_backward(*inputs, *(others if reads_sum(epilogue) else []))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        epilogue, once, weighted = ctx.call
        y, position, *others = ctx.saved_tensors
        weight = others.pop(0) if weighted else None
        of_y, _, of_weight, _, _, _, *of_extras = ctx.needs_input_grad
        g = grad.contiguous()
        made: dict[str, Tensor] = {}
        for i, (dtype, needed) in enumerate(zip(ctx.dtypes, of_extras, strict=True)):
            if needed and str(epilogue.derivative(f"a{i}")) != ONE:
                made[f"a{i}"] = g.new_empty(g.shape, dtype=dtype)
        if of_weight:
            assert weight is not None
            made["weight"] = torch.empty_like(weight) if g.numel() else torch.zeros_like(weight)
        if of_y and once:
            made["y"] = torch.empty_like(y)
        straight = not epilogue or str(epilogue.derivative()) == ONE
        if of_y and not once and not straight:
            made["sum"] = torch.empty_like(g, dtype=torch.promote_types(g.dtype, torch.float32))
        _run_backward(epilogue, made, g, y, position, weight, others)
        if of_y and not once:
            segments = Segments.of(position.reshape(-1), y.shape[0])
            flat = None if weight is None else weight.reshape(-1)
            total = made.get("sum", g)
            made["y"] = sum_segments(
                total, segments, IDENTITY, (), flat, position.shape[1], y.dtype
            )
        gradients = [
            made.get(f"a{i}", g.to(dtype)) if needed else None
            for i, (dtype, needed) in enumerate(zip(ctx.dtypes, of_extras, strict=True))
        ]
        return made.get("y"), None, made.get("weight"), None, None, None, *gradients


def _run_backward(
    epilogue: Pointwise,
    made: dict[str, Tensor],
    g: Tensor,
    y: Tensor,
    position: Tensor,
    weight: Tensor | None,
    extras: Sequence[Tensor],
) -> None:
    if not made or not g.numel():
        return
    wanted, weighted = tuple(made), weight is not None
    kernel = emit_backward(epilogue, weighted, wanted, compute_type(y.dtype))
    known = {"g": g, "y": y, "position": position, "weight": weight}
    known.update({f"a{i}": a for i, a in enumerate(extras)})
    known.update({f"d{name}": tensor for name, tensor in made.items()})
    tensors = [known[name] for name in _backward_tensors(epilogue, weighted, wanted)]
    count, width = g.shape
    constants = whole_rows(width, g.element_size(), position.shape[1])
    grid = (cdiv(count, constants["ROWS"]),)
    launch(kernel, grid, *tensors, count, y.shape[0], WIDTH=width, **constants)


def weight_gradient(g: Tensor, y: Tensor, position: Tensor, weight: Tensor) -> Tensor:
    """`g[t] . y[position[t, k]]` in the shape and dtype of `weight`; `g` is [tokens, width]."""
    made = torch.empty_like(weight) if g.numel() else torch.zeros_like(weight)
    tensors = (g.contiguous(), y.contiguous(), position.contiguous(), weight)
    _run_backward(IDENTITY, {"weight": made}, *tensors, ())
    return made


def whole_rows(width: int, element_bytes: int, ways: int) -> dict[str, int]:
    """The backward's constants: a program has all columns of its rows."""
    block = min(block_size(LONGEST_BLOCK), 1 << max(width - 1, 0).bit_length())
    rows = max(1, block_size(TILE_BYTES // element_bytes) // block)
    return {"K": ways, "WAYS": 1 << max(ways - 1, 0).bit_length(), "ROWS": rows, "BLOCK": block}


def specialisations() -> list[Specialisation]:
    """Two experts per token, plain and with the residual added, forward and backward."""
    residual = parse_pointwise("add(x, a0)")
    forms = []
    for dtype in ("fp32", "bf16", "fp16"):
        forms.append(form(emit(), dtype, TILE_BYTES, K=2))
        forms.append(form(emit(residual), dtype, TILE_BYTES, K=2))
        constants = whole_rows(1024, 4 if dtype == "fp32" else 2, 2)
        forms.append(
            form(emit_backward(residual, True, ("weight", "y")), dtype, TILE_BYTES, **constants)
        )
    forms.append(form(emit(), "bf16", TILE_BYTES, K=8))
    constants = whole_rows(1024, 2, 8)
    forms.append(
        form(emit_backward(IDENTITY, True, ("weight", "y")), "bf16", TILE_BYTES, **constants)
    )
    forms.append(form(emit(weighted=False), "bf16", TILE_BYTES, K=2))
    return forms
