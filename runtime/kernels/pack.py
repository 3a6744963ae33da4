"""Many tensors into one flat buffer, and back, in one launch.

`pack` copies pieces one after the other into a buffer, maybe of another dtype, through an
element-wise program (a scale, a cast); `unpack` does the reverse. Either can also give the norm of
what it moved: a sum of squares per program, added in a fixed order. A piece lies in memory as equal
rows, as a chunk of a contiguous tensor does. A copy that changes nothing moves bits, whatever they
mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise

from .ahead import Specialisation
from .emit import Kernel, fill, triton_lines
from .launch import block_size, launch
from .support import fall_back, usable
from .table import ALIGNMENT, Table, make_table

NAME = "pack"
BLOCK_VECTORS = 512  # wide accesses per program, four for each thread
ENDLESS = (1 << 31) - 16  # the row length of a contiguous piece, which has fewer elements
LARGEST = (1 << 31) - (1 << 15)  # a program's elements may end after the piece's

# What Triton calls the element types of pieces, and the integers in which a copy moves elements.
_TRITON = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int8: "tl.int8",
    torch.int16: "tl.int16",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# A row of the table: elements, address of the piece, its place in the buffer, length and stride of
# its rows, and whether all of its vectors are aligned: no vector then crosses the end of a row.
# A hint stays with the operation that made its value, so that those of the first branch are made in
# that branch: hints on what both branches read would hold in the other, too.
_TEMPLATE = """
@triton.jit
def $name(
    flat_ptr, rows_ptr, blocks_ptr, $parameters
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):
    block = blocks_ptr + 2 * tl.program_id(0)
    entry = rows_ptr + 6 * tl.load(block)
    first = tl.load(block + 1) * BLOCK
    n = tl.load(entry).to(tl.int32)
    piece = tl.load(entry + 1)
    offset = tl.load(entry + 2)
    length = tl.load(entry + 3).to(tl.int32)
    stride = tl.load(entry + 4)
    $first
    if (tl.load(entry + 5) != 0) & (first + BLOCK <= n):
        piece_ptr = tl.multiple_of(piece.to(tl.pointer_type($piece)), 16)
        place_ptr = tl.multiple_of(flat_ptr + offset, 16)
        vector = first // VECTOR + tl.arange(0, BLOCK // VECTOR)[:, None]
        row = (vector // (length // VECTOR)).to(tl.int64) * (stride // VECTOR)
        lane = tl.arange(0, VECTOR)[None, :]
        i = vector * VECTOR + lane
        j = (row + vector % (length // VECTOR)) * VECTOR + lane
        $block
    else:
        piece_ptr = piece.to(tl.pointer_type($piece))
        place_ptr = flat_ptr + offset
        for begin in tl.range(first, tl.minimum(first + BLOCK, n), BLOCK // 4):
            i = begin + tl.arange(0, BLOCK // 4)
            j = (i // length).to(tl.int64) * stride + i % length
            $tail
    $last
"""


@cache
def emit(
    name: str, piece: str, program: Pointwise = IDENTITY, compute: str = "", norm: bool = False
) -> Kernel:
    """`name` is "pack" or "unpack", `piece` Triton's name of the pieces' element type.

    Without a `compute` dtype elements are moved as they are. With `norm` a program also stores the
    sum of the squares of its values, before they are rounded to what they are stored as.
    """

    def lines(mask: str) -> list[str]:
        target, source = ("place", "piece") if name == "pack" else ("piece", "place")
        places = {"place": "place_ptr + i", "piece": "piece_ptr + j"}
        found = [f"x = tl.load({places[source]}{mask})" + (f".to({compute})" if compute else "")]
        found += triton_lines(program, "x", [], "y", compute)
        if norm:
            found.append(f"squares += tl.sum({'tl.where(i < n, y * y, 0.0)' if mask else 'y * y'})")
        value = f"y.to({target}_ptr.dtype.element_ty)" if compute else "y"
        return [*found, f"tl.store({places[target]}, {value}{mask})"]

    source = fill(
        _TEMPLATE,
        name=name,
        parameters="squares_ptr," if norm else "",
        piece=piece,
        first=[f"squares = tl.full([], 0.0, {compute})"] if norm else [],
        block=lines(""),
        tail=lines(", mask=i < n"),
        last=["tl.store(squares_ptr + tl.program_id(0), squares)"] if norm else [],
    )
    return Kernel(name, source)


def pack(
    pieces: Sequence[Tensor],
    program: Pointwise = IDENTITY,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """All elements of the pieces, `program` of each, one piece after the other.

    The pieces have one dtype and device. The buffer is `out`, or new and of `dtype` (default
    theirs). Raises ValueError for pieces of several dtypes, for a program that reads further
    tensors or computes with integers, and for an `out` of another size.
    """
    flat = _buffer(pieces, dtype) if out is None else out
    _move("pack", flat, pieces, program)
    return flat


def pack_with_norm(
    pieces: Sequence[Tensor],
    program: Pointwise = IDENTITY,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`pack`, and the Euclidean norm of the program's values before they are rounded to `dtype`.

    The norm has no dims; float32, of float64 pieces float64.
    """
    flat = _buffer(pieces, dtype) if out is None else out
    return flat, _norm(_move("pack", flat, pieces, program, norm=True))


def unpack(flat: Tensor, places: Sequence[Tensor], program: Pointwise = IDENTITY) -> None:
    """Write `program` of consecutive pieces of `flat` to the places, which have one dtype.

    Raises ValueError as `pack`, and for a place that is not made of equal rows.
    """
    _move("unpack", flat, places, program)


def unpack_with_norm(
    flat: Tensor, places: Sequence[Tensor], program: Pointwise = IDENTITY
) -> Tensor:
    """`unpack`, and the norm as `pack_with_norm` gives it."""
    return _norm(_move("unpack", flat, places, program, norm=True))


def reference(
    pieces: Sequence[Tensor], program: Pointwise = IDENTITY, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`pack_with_norm` in torch, squares added in float64."""
    values = [program(p).reshape(-1) for p in pieces]
    joined = torch.cat(values) if values else torch.empty(0)
    return joined.to(dtype or pieces[0].dtype), _norm(joined.double().square()).to(joined.dtype)


def reference_unpack(
    flat: Tensor, places: Sequence[Tensor], program: Pointwise = IDENTITY
) -> Tensor:
    """`unpack_with_norm` in torch."""
    values = program(flat)
    parts = values.split_with_sizes([p.numel() for p in places])
    for place, part in zip(places, parts, strict=True):
        place.copy_(part.view(place.shape))
    return _norm(values.double().square()).to(values.dtype)


def packable(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernel runs on these tensors, of one dtype, as a copy; warns once if not."""
    if tensors[0].dtype.itemsize not in _BITS:
        name = str(tensors[0].dtype).removeprefix("torch.")
        fall_back(NAME, f"it has no form for {name}")
        return False
    return usable(NAME, *tensors, largest=LARGEST)


def _buffer(pieces: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    return pieces[0].new_empty(sum(p.numel() for p in pieces), dtype=dtype)


def _norm(squares: Tensor) -> Tensor:
    return squares.sum(dtype=torch.float64).sqrt().to(squares.dtype)


def _move(
    name: str, flat: Tensor, pieces: Sequence[Tensor], program: Pointwise, norm: bool = False
) -> Tensor:
    """Launch; return the sums of squares, one per program (empty unless `norm`)."""
    dtype = pieces[0].dtype
    _check(name, flat, pieces, program, norm)
    copies = not program and not norm and flat.dtype is dtype
    wide = (dtype if name == "pack" else flat.dtype) is torch.float64
    if copies:
        flat = flat.view(_BITS[dtype.itemsize])
        kernel = emit(name, _TRITON[flat.dtype])
    else:
        kernel = emit(name, _TRITON[dtype], program, "tl.float64" if wide else "tl.float32", norm)
    vector = ALIGNMENT // min(flat.element_size(), dtype.itemsize)
    block = block_size(BLOCK_VECTORS * vector)
    if name == "pack":
        pieces = [p if _rows(p) is not None else p.contiguous() for p in pieces]
    table = _table(flat, pieces, vector, block)
    programs = table.programs if norm else 0
    squares = flat.new_empty(programs, dtype=torch.float64 if wide else torch.float32)
    arguments = (flat, table.rows, table.blocks, *([squares] if norm else []))
    launch(kernel, (table.programs,), *arguments, VECTOR=vector, BLOCK=block)
    return squares


def _check(
    name: str, flat: Tensor, pieces: Sequence[Tensor], program: Pointwise, norm: bool
) -> None:
    dtypes = {p.dtype for p in pieces}
    if len(dtypes) > 1:
        raise ValueError(f"{name}: pieces of {' and '.join(sorted(map(str, dtypes)))}")
    if program.extras:
        raise ValueError(f"{name}: {program} reads further tensors")
    if sum(p.numel() for p in pieces) != flat.numel() or not flat.is_contiguous():
        raise ValueError(f"{name}: the pieces do not fill a buffer of {tuple(flat.shape)}")
    changes = program or norm or flat.dtype not in dtypes
    if changes and not all(d.is_floating_point for d in (flat.dtype, *dtypes)):
        raise ValueError(f"{name}: {flat.dtype} and {pieces[0].dtype} can only be copied")
    if name == "unpack" and any(_rows(p) is None for p in pieces):
        raise ValueError("unpack: a place is not made of equal rows")


def _table(flat: Tensor, pieces: Sequence[Tensor], vector: int, block: int) -> Table:
    offsets, lengths, strides, aligned = [], [], [], []
    offset, address = 0, flat.data_ptr()
    for piece in pieces:
        length, stride = _rows(piece) or (ENDLESS, 0)
        ends = (piece.data_ptr(), address + offset * flat.element_size())
        whole = length % vector == 0 and stride % vector == 0
        aligned.append(int(whole and all(a % ALIGNMENT == 0 for a in ends)))
        offsets.append(offset)
        lengths.append(length)
        strides.append(stride)
        offset += piece.numel()
    return make_table([pieces, offsets, lengths, strides, aligned], block)


def _rows(x: Tensor) -> tuple[int, int] | None:
    """Length and stride of the equal rows in memory that `x` is, or None; in elements."""
    dims = [d for d in zip(x.shape, x.stride(), strict=True) if d[0] != 1]
    length = 1
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    if not dims or not x.numel():
        return ENDLESS, 0
    stride = step = dims[-1][1]
    while dims:
        size, found = dims.pop()
        if found != step:
            return None
        step *= size
    return length, stride


def specialisations() -> list[Specialisation]:
    """Plain copies, gradients scaled and rounded for the wire with their norm, and the way back."""
    half = parse_pointwise("mul(x, 0.5)")
    forms = [
        _form(name, bits, bits, IDENTITY, False)
        for name in ("pack", "unpack")
        for bits in (torch.int16, torch.int32)
    ]
    for piece, flat, norm in (
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float16, False),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, False),
    ):
        forms.append(_form("pack", piece, flat, half, norm))
        forms.append(_form("unpack", piece, flat, half, norm))
    return forms


_SIGNATURE = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
}


def _form(
    name: str, piece: torch.dtype, flat: torch.dtype, program: Pointwise, norm: bool
) -> Specialisation:
    kernel = emit(name, _TRITON[piece], program, "tl.float32" if program else "", norm)
    vector = ALIGNMENT // min(piece.itemsize, flat.itemsize)
    pointers = {"flat_ptr": _SIGNATURE[flat], "rows_ptr": "*i64", "blocks_ptr": "*i32"}
    if norm:
        pointers["squares_ptr"] = "*fp32"
    constants = {"VECTOR": vector, "BLOCK": BLOCK_VECTORS * vector}
    return Specialisation(kernel, pointers, constants, tuple(pointers))
