"""Gradients as blocks of int8 for slow links: quantise; sum n members' blocks; dequantise.

A block of 256 elements travels as 256 codes and one float32 scale, a 127th of its largest
magnitude: `x ~ code * scale`, codes rounded to nearest even, so that an element is off by at most
half a scale (and float32's rounding). What holds an infinity or a NaN comes out as a block of NaN,
so that a gradient scaler still sees the overflow; blocks below 127 * 2^-126 come out as zeros.

The wire format is a row of bytes per piece of the tensor: the codes of its blocks, then their
scales. Rows are whole units of `UNIT` elements, the last ones padded with zeros, so that every
member can take its piece, sum it over the members and pass it on without unpacking it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise

from .ahead import Specialisation
from .emit import Kernel, fill, triton_lines
from .launch import cdiv, launch
from .support import interpreted

NAME = "int8"
BLOCK = 256  # elements that share a scale
ROWS = 8  # blocks per program
WARPS = 2  # so that a thread has 16 codes, on AMD too: what one wide access takes
UNIT = ROWS * BLOCK  # pieces are multiples of this
UNIT_BYTES = ROWS * (BLOCK + 4)

SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number, which no device flushes
LARGEST = torch.finfo(torch.float32).max
PART = 0.007874015718698502  # 1 / 127 in float32
MAGIC = 1.5 * 2.0**23  # added and taken away, rounds a small float32 to nearest even

# From `x` [ROWS, BLOCK] to its codes and scales.
_TO_CODES = f"""
a = tl.abs(x)
a = tl.where(a <= {LARGEST!r}, a, float("inf"))
top = tl.max(a, axis=1)
scale = top * {PART!r}
used = (scale >= {SMALLEST_SCALE!r}) & (top <= {LARGEST!r})
inverse = tl.where(used, tl.div_rn(1.0, tl.where(used, scale, 1.0)), 0.0)
scale = tl.where(used, scale, tl.where(top <= {LARGEST!r}, 0.0, float("nan")))
y = tl.where(a <= {LARGEST!r}, x, 0.0) * inverse[:, None]
codes = ((y + {MAGIC!r}) - {MAGIC!r}).to(tl.int8)
""".strip().splitlines()

# A program's blocks lie in one piece: `piece` is its number, `unit` the first unit in it. Offsets
# of pieces are written as multiples of a unit, so that the compiler knows their alignment.
_QUANTISE = """
@triton.jit(do_not_specialize=["n", "units"])
def int8_quantise(
    x_ptr, codes_ptr, scales_ptr, n, units, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64)
    piece = tile // units
    unit = tile % units
    row = tl.arange(0, ROWS)
    within = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = tile * (ROWS * BLOCK)
    if first + ROWS * BLOCK <= n:
        x = tl.load(x_ptr + (first + within)).to(tl.float32)
    else:
        x = tl.load(x_ptr + (first + within), mask=first + within < n, other=0.0).to(tl.float32)
    $to_codes
    at = piece * units * (ROWS * (BLOCK + 4)) + unit * (ROWS * BLOCK)
    tl.store(codes_ptr + (at + within), codes)
    at = (piece * (BLOCK + 4) + BLOCK) * units * (ROWS // 4) + unit * ROWS
    tl.store(scales_ptr + (at + row), scale)
"""

# The members' rows of one piece, summed in the order of the members.
_REDUCE = """
@triton.jit(do_not_specialize=["units", "members"])
def int8_reduce(
    codes_ptr, scales_ptr, out_codes_ptr, out_scales_ptr, units, members,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    units = units.to(tl.int64)
    row = tl.arange(0, ROWS)
    within = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.zeros((ROWS, BLOCK), tl.float32)
    for member in range(0, members):
        $load
        x = x + v
    $to_codes
    tl.store(out_codes_ptr + (unit * (ROWS * BLOCK) + within), codes)
    tl.store(out_scales_ptr + (units * (ROWS * BLOCK // 4) + unit * ROWS + row), scale)
"""

# Pieces one after the other (`members` is 1), or the sum of the members' rows of one piece.
_DEQUANTISE = """
@triton.jit(do_not_specialize=["n", "units", "members"])
def int8_dequantise(
    codes_ptr, scales_ptr, y_ptr, n, units, members, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64)
    unit = tile % units
    row = tl.arange(0, ROWS)
    within = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.zeros((ROWS, BLOCK), tl.float32)
    for member in range(tile // units, tile // units + members):
        $load
        x = x + v
    $work
    first = tile * (ROWS * BLOCK)
    if first + ROWS * BLOCK <= n:
        tl.store(y_ptr + (first + within), y.to(y_ptr.dtype.element_ty))
    else:
        tl.store(
            y_ptr + (first + within), y.to(y_ptr.dtype.element_ty), mask=first + within < n
        )
"""

_LOAD = """
at = member * units * (ROWS * (BLOCK + 4)) + unit * (ROWS * BLOCK)
c = tl.load(codes_ptr + (at + within)).to(tl.float32)
at = (member * (BLOCK + 4) + BLOCK) * units * (ROWS // 4) + unit * ROWS
v = c * tl.load(scales_ptr + (at + row))[:, None]
""".strip().splitlines()


@cache
def emit() -> Kernel:
    """Quantise: reads a flat tensor, writes the rows of its pieces."""
    return Kernel("int8_quantise", fill(_QUANTISE, to_codes=_TO_CODES))


@cache
def emit_reduce() -> Kernel:
    """Dequantise the members' rows of one piece, add them up, quantise the sum."""
    return Kernel("int8_reduce", fill(_REDUCE, load=_LOAD, to_codes=_TO_CODES))


@cache
def emit_dequantise(epilogue: Pointwise = IDENTITY) -> Kernel:
    """Dequantise (and add up) rows and apply the epilogue, which reads no further tensors.

    Raises ValueError for one that does.
    """
    if epilogue.extras:
        raise ValueError(f"int8: the epilogue {epilogue} reads further tensors")
    work = triton_lines(epilogue, "x", [], "y")
    return Kernel("int8_dequantise", fill(_DEQUANTISE, load=_LOAD, work=work))


def units_of(elements: int, pieces: int = 1) -> int:
    """Units of each of `pieces` equal pieces that together hold so many elements; at least 1."""
    return max(1, cdiv(elements, pieces * UNIT))


def quantise(x: Tensor, pieces: int = 1) -> Tensor:
    """The rows of a flat float tensor cut into equal pieces: int8 [pieces, units * UNIT_BYTES]."""
    units = units_of(x.numel(), pieces)
    wire = torch.empty(pieces, units * UNIT_BYTES, dtype=torch.int8, device=x.device)
    rows, units_ = _tiles(units)
    arguments = (x, wire, wire.view(torch.float32), x.numel(), units_)
    launch(emit(), (pieces * units_,), *arguments, num_warps=WARPS, ROWS=rows, BLOCK=BLOCK)
    return wire


def reduce(wire: Tensor) -> Tensor:
    """The row of the sum of [members, row] rows, which hold one piece each: int8 [row]."""
    members, row = wire.shape
    out = torch.empty(row, dtype=torch.int8, device=wire.device)
    rows, units = _tiles(row // UNIT_BYTES)
    views = (wire, wire.view(torch.float32), out, out.view(torch.float32))
    launch(emit_reduce(), (units,), *views, units, members, num_warps=WARPS, ROWS=rows, BLOCK=BLOCK)
    return out


def dequantise(
    wire: Tensor,
    elements: int,
    dtype: torch.dtype,
    summed: bool = False,
    epilogue: Pointwise = IDENTITY,
) -> Tensor:
    """A flat tensor of `elements` from int8 [pieces, row] rows.

    They are pieces of it, or, if `summed`, what members have of it, to be added up. The epilogue is
    applied in float32.
    """
    y = torch.empty(elements, dtype=dtype, device=wire.device)
    rows, units = _tiles(wire.shape[1] // UNIT_BYTES)
    members = wire.shape[0] if summed else 1
    arguments = (wire, wire.view(torch.float32), y, elements, units, members)
    grid = (cdiv(elements, rows * BLOCK),)
    launch(emit_dequantise(epilogue), grid, *arguments, num_warps=WARPS, ROWS=rows, BLOCK=BLOCK)
    return y


def _tiles(units: int) -> tuple[int, int]:
    """Blocks per program, and how many programs a piece of so many units has."""
    rows = ROWS
    while interpreted() and units % 2 == 0 and rows < 64 * ROWS:
        rows, units = 2 * rows, units // 2
    return rows, units


# --- The same in torch -------------------------------------------------------------------------


def reference(x: Tensor, pieces: int = 1) -> Tensor:
    """`quantise` in torch."""
    units = units_of(x.numel(), pieces)
    padded = x.new_zeros(pieces * units * UNIT, dtype=torch.float32)
    padded[: x.numel()].copy_(x)
    return _rows(padded.view(pieces, -1, BLOCK))


def reference_reduce(wire: Tensor) -> Tensor:
    """`reduce` in torch."""
    return _rows(_sum(_values(wire))[None])[0]


def reference_dequantise(
    wire: Tensor,
    elements: int,
    dtype: torch.dtype,
    summed: bool = False,
    epilogue: Pointwise = IDENTITY,
) -> Tensor:
    """`dequantise` in torch."""
    values = _values(wire)
    flat = (_sum(values) if summed else values).reshape(-1)[:elements]
    return epilogue(flat).to(dtype)


def _rows(x: Tensor) -> Tensor:
    """Rows of bytes of float32 [pieces, blocks, BLOCK]."""
    finite = x.abs() <= LARGEST
    top = x.abs().amax(-1)  # of NaN it is NaN, which the comparison below leaves out, too
    scale = top * PART
    used = (scale >= SMALLEST_SCALE) & (top <= LARGEST)
    inverse = torch.where(used, 1.0 / torch.where(used, scale, 1.0), 0.0)
    codes = torch.round(torch.where(finite, x, 0.0) * inverse[..., None]).to(torch.int8)
    scale = torch.where(used, scale, torch.where(top <= LARGEST, 0.0, float("nan")))
    return torch.cat([codes.flatten(1), scale.view(torch.int8)], 1)


def _values(wire: Tensor) -> Tensor:
    """float32 [rows, blocks, BLOCK] of rows of bytes."""
    codes, scales = wire.split_with_sizes(_parts(wire.shape[1]), 1)
    scale = scales.contiguous().view(torch.float32)
    return codes.view(len(wire), -1, BLOCK).float() * scale[..., None]


def _parts(row: int) -> list[int]:
    """Bytes of a row's codes and of its scales."""
    units = row // UNIT_BYTES
    return [units * UNIT, units * 4 * ROWS]


def _sum(values: Tensor) -> Tensor:
    total = torch.zeros_like(values[0])
    for value in values:
        total = total + value
    return total


def specialisations() -> list[Specialisation]:
    """Quantising from and dequantising to every dtype, with and without a scale, and the sum."""
    wire = {"codes_ptr": "*i8", "scales_ptr": "*fp32"}
    out = {"out_codes_ptr": "*i8", "out_scales_ptr": "*fp32"}
    forms = [_form(emit_reduce(), {**wire, **out, "units": "i32", "members": "i32"})]
    halved = parse_pointwise("mul(x, 0.5)")
    for dtype in ("fp32", "bf16", "fp16"):
        forms.append(_form(emit(), {"x_ptr": f"*{dtype}", **wire, "n": "i32", "units": "i32"}))
        back = {**wire, "y_ptr": f"*{dtype}", "n": "i32", "units": "i32", "members": "i32"}
        forms += [_form(emit_dequantise(epilogue), back) for epilogue in (IDENTITY, halved)]
    return forms


def _form(kernel: Kernel, signature: dict[str, str]) -> Specialisation:
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Specialisation(kernel, signature, {"ROWS": ROWS, "BLOCK": BLOCK}, aligned, WARPS)
