"""Pack and unpack in the interpreter against torch: every element, every layout, one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autopar.errors import KernelWarning
from autopar.ir.lowered import COLLECTIVES, ShardSpec, SwapSpec
from autopar.ir.pointwise import IDENTITY, parse_pointwise
from autopar.runtime import buckets
from autopar.runtime.collectives import close, open_
from autopar.runtime.kernels import launch as launching
from autopar.runtime.kernels import pack as packing
from autopar.runtime.kernels.support import fall_back
from autopar.runtime.thread_world import ThreadWorld, run_threads

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = parse_pointwise("mul(x, 0.5)")
SCALED = parse_pointwise("t0 = mul(x, 0.37); cast_bf16(t0)")
SHIFTED = parse_pointwise("t0 = add(x, 1.0); sigmoid(t0)")
WHOLE = launching.INTERPRETED_BLOCK  # the fewest elements of a block in the interpreter


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched, by name."""
    seen: list[str] = []

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        seen.append(kernel.name)
        launching.launch(kernel, *arguments, **constants)

    monkeypatch.setattr(packing, "launch", launch)
    return seen


def random(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)).to(dtype)


def layouts(dtype: torch.dtype) -> list[Tensor]:
    """Empty, one element, odd, whole blocks, rows with and without alignment, overlapping."""
    full = random((6, 20, 8), dtype, 1)
    large = random((2, WHOLE), dtype, 2)
    return [
        random((WHOLE,), dtype, 3),
        full.narrow(1, 8, 8),
        large.narrow(1, 0, WHOLE // 2),
        random((0, 5), dtype),
        full.view(6, 2, 10, 8).narrow(2, 1, 3),
        random((), dtype, 4),
        random((WHOLE + 13,), dtype, 5),
        full.narrow(2, 3, 5),
        full.transpose(0, 2),
        full[0, 0, :1].expand(9),
        large.narrow(1, 1, WHOLE // 2),
    ]


def ulps(dtype: torch.dtype, count: int = 4) -> dict[str, float]:
    """Rounded once at the store; exp is not that of torch to the last bit."""
    eps = torch.finfo(dtype).eps
    return {"rtol": count * eps, "atol": count * eps}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.bool, torch.complex64])
def test_a_copy_moves_bits(dtype: torch.dtype, launches: list[str]) -> None:
    xs = layouts(dtype)
    flat = packing.pack(xs)
    assert flat.dtype is dtype
    assert torch.equal(flat, torch.cat([x.reshape(-1) for x in xs]))
    places = [torch.empty(x.shape, dtype=dtype) for x in xs]
    packing.unpack(flat, places)
    assert all(map(torch.equal, places, xs))
    assert launches == ["pack", "unpack"]


def test_a_copy_keeps_what_is_not_a_number() -> None:
    bits = torch.tensor([0x7FA00001, 0x7FC00000, -0x00400000, -0x80000000], dtype=torch.int32)
    x = bits.view(torch.float32)
    assert torch.equal(packing.pack([x, x]).view(torch.int32), bits.repeat(2))


@pytest.mark.parametrize("program", [HALF, SCALED, SHIFTED])
@pytest.mark.parametrize(
    ("dtype", "to"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_pack_scales_casts_and_sums(dtype: torch.dtype, to: torch.dtype, program: Any) -> None:
    xs = layouts(dtype)
    flat, norm = packing.pack_with_norm(xs, program, to)
    expected, expected_norm = packing.reference(xs, program, to)
    if program is HALF:
        assert torch.equal(flat, expected)
    torch.testing.assert_close(flat, expected, **ulps(to))
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
    assert torch.equal(packing.pack(xs, program, to), flat)


@pytest.mark.parametrize("program", [IDENTITY, SHIFTED])
@pytest.mark.parametrize("dtype", FLOATS)
def test_unpack_scales_casts_and_sums(dtype: torch.dtype, program: Any) -> None:
    shapes = [x.shape for x in layouts(dtype)]
    flat = random((sum(s.numel() for s in shapes),), dtype, 6)
    got = [torch.empty(s, dtype=torch.float32) for s in shapes]
    expected = [torch.empty(s, dtype=torch.float32) for s in shapes]
    norm = packing.unpack_with_norm(flat, got, program)
    expected_norm = packing.reference_unpack(flat, expected, program)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **ulps(torch.float32))
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)


def test_48_tensors_take_one_launch(launches: list[str]) -> None:
    xs = [random((13 * i % 701,), torch.float32, i) for i in range(48)]
    flat, norm = packing.pack_with_norm(xs, HALF, torch.bfloat16)
    expected = torch.cat(xs) * 0.5
    assert torch.equal(flat, expected.bfloat16())
    torch.testing.assert_close(norm, expected.norm(), rtol=1e-6, atol=0)
    assert launches == ["pack"]


def test_a_norm_is_the_same_every_time() -> None:
    xs = layouts(torch.float32)
    norms = [packing.pack_with_norm([x.clone() for x in xs])[1] for _ in range(3)]
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])


def test_nothing_to_pack() -> None:
    flat, norm = packing.pack_with_norm([torch.empty(0), torch.empty(3, 0)])
    assert flat.shape == (0,)
    assert norm == 0


@pytest.mark.parametrize("start", [3, 4])
def test_nothing_beside_a_buffer_is_written(start: int) -> None:
    xs = [random((n + 1,), torch.float32)[:n] for n in (5, 3, WHOLE - 1)]
    around = torch.full((start + WHOLE + 7 + 2,), 9.0)
    inside = around[start:-2]
    packing.pack(xs, HALF, out=inside)
    assert torch.equal(inside, torch.cat(xs) * 0.5)
    assert (around[:start] == 9).all()
    assert (around[-2:] == 9).all()
    fulls = [torch.ones(x.numel() + 2) for x in xs]
    places = [full[:-2] for full in fulls]
    packing.unpack(inside, places, parse_pointwise("mul(x, 2.0)"))
    assert all(map(torch.equal, places, xs))
    assert all((full[-2:] == 1).all() for full in fulls)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3, st.integers(0, 4)), min_size=1, max_size=6),
    st.sampled_from(FLOATS),
)
def test_round_trip(sizes: list[tuple[int, int, int, int]], dtype: torch.dtype) -> None:
    def piece(full: Tensor, rows: int, start: int) -> Tensor:
        return full.narrow(1, start, rows)

    pieces = [piece(random((a, b + d, c), dtype, a), b, d) for a, b, c, d in sizes]
    flat = packing.pack(pieces, dtype=torch.float64)
    fulls = [torch.zeros(a, b + d, c, dtype=dtype) for a, b, c, d in sizes]
    places = [piece(f, s[1], s[3]) for f, s in zip(fulls, sizes, strict=True)]
    packing.unpack(flat, places)
    for full, place, x in zip(fulls, places, pieces, strict=True):
        assert torch.equal(place, x)
        assert full.count_nonzero() == x.count_nonzero()  # nothing beside it was written


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: packing.pack([x, x.half()]), "pieces of torch.float16 and torch.float32"),
        (lambda x: packing.pack([x], parse_pointwise("mul(x, a0)")), "reads further tensors"),
        (lambda x: packing.pack([x], out=torch.empty(9)), r"do not fill a buffer of \(9,\)"),
        (lambda x: packing.pack([x.int()], HALF), "can only be copied"),
        (lambda x: packing.unpack(torch.empty(8), [x.t()]), "not made of equal rows"),
    ],
)
def test_what_it_does_not_take(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.empty(2, 4))


@pytest.mark.parametrize(
    ("dtype", "why"),
    [(torch.complex128, "no form for complex128"), (torch.float8_e5m2, "no form for float8_e5m2")],
)
def test_buckets_fall_back_with_one_warning(dtype: torch.dtype, why: str) -> None:
    xs = [torch.ones(3).to(dtype), torch.zeros(2).to(dtype)]
    fall_back.cache_clear()
    with pytest.warns(KernelWarning, match=f"kernel pack: it has {why}; its torch reference"):
        flat = buckets.pack(xs, kernel=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buckets.pack(xs, kernel=True)
    assert flat.tolist() == [1, 1, 1, 0, 0]


def test_what_is_negated_only_in_a_view_is_not_copied_as_it_lies(launches: list[str]) -> None:
    x = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert x.is_neg()
    fall_back.cache_clear()
    with pytest.warns(KernelWarning, match="kernel pack: a tensor is a view that negates"):
        flat = buckets.pack([x, torch.ones(1)], kernel=True)
    assert flat.tolist() == [-2, 4, 1] and launches == []


def test_too_large_falls_back(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(packing, "LARGEST", 3)
    fall_back.cache_clear()
    with pytest.warns(KernelWarning, match="4 elements are more than the 3"):
        flat = buckets.pack([torch.ones(4), torch.ones(1)], kernel=True)
    assert torch.equal(flat, torch.ones(5))
    assert launches == []


EVEN, STRIDED = ShardSpec(1, (2, 2)), ShardSpec(0, (3, 1), outer=2)
CALLS: list[tuple[str, list[Any], list[str]]] = [
    ("pvary", [None, None], ["pack"]),
    ("psum", [None, None], ["pack"]),
    ("gather_vary", [EVEN, STRIDED], ["pack", "unpack", "pack"]),
    ("gather_inv", [EVEN, STRIDED], ["pack", "unpack"]),
    ("scatter_sum", [EVEN, STRIDED], ["pack", "pack", "unpack"]),
    ("slice_inv", [EVEN, STRIDED], ["pack", "unpack"]),
    ("swap", [SwapSpec(EVEN, STRIDED)] * 2, ["pack", "unpack"] * 2),
]


@pytest.mark.parametrize(("name", "specs", "expected"), CALLS)
def test_a_collective_with_the_kernel_is_bitwise_the_one_without(
    name: str, specs: list[Any], expected: list[str], launches: list[str]
) -> None:
    op = COLLECTIVES[name]

    def local(spec: Any, rank: int) -> tuple[int, ...]:
        source = spec.source if isinstance(spec, SwapSpec) else spec
        sizes = [8, 4, 3]
        if op.before == "S":
            sizes[source.dim] = source.local_size(rank)
        return tuple(sizes)

    def results(kernel: bool | None) -> list[list[Tensor]]:
        """Of each rank: outputs, then gradients."""

        def run(rank: int) -> list[Tensor]:
            xs = [
                random(local(spec, rank), torch.float32, 10 * rank + i).requires_grad_()
                for i, spec in enumerate(specs)
            ]
            group = world.group(rank)
            *edges, pending = open_(op, specs, group, *xs, kernel=kernel)
            ys = close(op, specs, group, pending, *edges)
            torch.autograd.backward(ys, [random(y.shape, y.dtype, 99 + rank) for y in ys])
            gradients = [x.grad for x in xs if x.grad is not None]
            assert len(gradients) == len(xs)
            return [*(y.detach() for y in ys), *gradients]

        world = ThreadWorld(2)
        return run_threads(world, run)

    plain = results(None)
    assert launches == []
    ours = results(True)
    assert sorted(launches) == sorted(2 * expected)
    for a, b in zip(plain, ours, strict=True):
        assert all(map(torch.equal, a, b))
        assert all(y.is_contiguous() for y in b)


def test_emitted_source() -> None:
    kernel = packing.emit("pack", "tl.float32", HALF, "tl.float32", norm=True)
    assert_expected_inline(
        kernel.source,
        """\
import triton
import triton.language as tl


@triton.jit
def pack(
    flat_ptr, rows_ptr, blocks_ptr, squares_ptr,
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
    squares = tl.full([], 0.0, tl.float32)
    if (tl.load(entry + 5) != 0) & (first + BLOCK <= n):
        piece_ptr = tl.multiple_of(piece.to(tl.pointer_type(tl.float32)), 16)
        place_ptr = tl.multiple_of(flat_ptr + offset, 16)
        vector = first // VECTOR + tl.arange(0, BLOCK // VECTOR)[:, None]
        row = (vector // (length // VECTOR)).to(tl.int64) * (stride // VECTOR)
        lane = tl.arange(0, VECTOR)[None, :]
        i = vector * VECTOR + lane
        j = (row + vector % (length // VECTOR)) * VECTOR + lane
        x = tl.load(piece_ptr + j).to(tl.float32)
        y = x * (0.5)
        squares += tl.sum(y * y)
        tl.store(place_ptr + i, y.to(place_ptr.dtype.element_ty))
    else:
        piece_ptr = piece.to(tl.pointer_type(tl.float32))
        place_ptr = flat_ptr + offset
        for begin in tl.range(first, tl.minimum(first + BLOCK, n), BLOCK // 4):
            i = begin + tl.arange(0, BLOCK // 4)
            j = (i // length).to(tl.int64) * stride + i % length
            x = tl.load(piece_ptr + j, mask=i < n).to(tl.float32)
            y = x * (0.5)
            squares += tl.sum(tl.where(i < n, y * y, 0.0))
            tl.store(place_ptr + i, y.to(place_ptr.dtype.element_ty), mask=i < n)
    tl.store(squares_ptr + tl.program_id(0), squares)
""",
    )
