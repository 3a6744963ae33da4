"""Rows gathered, added up and combined by the kernels, against their references in torch."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from torch import Tensor

from autopar.errors import KernelWarning
from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise
from autopar.runtime.kernels import combine as combining
from autopar.runtime.kernels import permute as permuting
from autopar.runtime.kernels import spread as spreading
from autopar.runtime.kernels.combine import combine
from autopar.runtime.kernels.permute import Segments, gather_rows, permute, sum_segments

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALE, TANH = parse_pointwise("mul(x, 0.5)"), parse_pointwise("tanh(x)")
RESIDUAL, GATED = parse_pointwise("add(x, a0)"), parse_pointwise("t0 = tanh(x); mul(t0, a0)")

# Gradients are held to those of the reference in float64, computed from the same inputs: the kernel
# rounds once, at the store, where autograd in 16 bits rounds after every addition. A few units in
# the last place of float32 for the tanh, which is written otherwise, and the order of a dot product.
TOLERANCE = {
    torch.float32: 4e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
    torch.float64: 1e-13,
}


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=draw(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def compare(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """Values of one dtype, and the gradients of the inputs against those in float64."""
    dtype = inputs[0].dtype
    limit = TOLERANCE[dtype]
    made = kernel(*inputs)
    torch.testing.assert_close(made, reference(*inputs), rtol=limit, atol=limit)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact)
    cotangent = normal(99, *made.shape, dtype=made.dtype).detach()
    gradients = torch.autograd.grad(made, inputs, cotangent)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for got, want, x in zip(gradients, wanted, inputs, strict=True):
        assert got.dtype == x.dtype
        torch.testing.assert_close(got.double(), want, rtol=limit, atol=limit)


INDICES = {
    "duplicates": torch.randint(-1, 38, (101,), generator=draw(0)),  # and some out of range
    "order": torch.randperm(37, generator=draw(1)),
    "one": torch.tensor([36]),
    "dropped": torch.full((5,), -1),
    "one_row": torch.full((9,), 4),
    "int32": torch.randint(0, 37, (20,), generator=draw(2), dtype=torch.int32),
    "none": torch.empty(0, dtype=torch.int64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INDICES)
def test_permute(name: str, dtype: torch.dtype) -> None:
    index = INDICES[name]
    for prologue in (IDENTITY, SCALE, TANH):
        compare(
            lambda x, p=prologue: permute(x, index, p),
            lambda x, p=prologue: permuting.reference(x, index, p),
            normal(3, 37, 33, dtype=dtype),
        )


@pytest.mark.parametrize(("rows", "width"), [(3, 0), (1, 1), (5, 128), (2, 20000)])
def test_sizes(rows: int, width: int) -> None:
    """No columns, one element, whole blocks, and rows of more than one block."""
    index = torch.tensor([0, -1, 2, 0, 4])
    x = normal(4, rows, width)
    compare(lambda x: permute(x, index), lambda x: permuting.reference(x, index), x)
    position, weight = index[:4].view(2, 2), normal(5, 2, 2)
    compare(
        lambda y, w: combine(y, position, w),
        lambda y, w: combining.reference(y, position, w),
        x,
        weight,
    )


def test_nothing_to_take_from() -> None:
    y, weight = normal(21, 0, 8), normal(22, 2, 2)
    index = torch.tensor([[0, -1], [1, 2]])
    assert torch.equal(permute(y, index.flatten()), torch.zeros(4, 8))
    assert torch.equal(permuting.reference(y, index.flatten()), torch.zeros(4, 8))
    for once in (False, True):
        made = combine(y, index, weight, once=once)
        assert torch.equal(made, torch.zeros(2, 8))
        of_y, of_weight = torch.autograd.grad(made.sum(), [y, weight])
        assert of_y.shape == (0, 8)
        assert torch.equal(of_weight, torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_index_add_and_reproducible(dtype: torch.dtype) -> None:
    index = INDICES["duplicates"]
    x, to = normal(6, len(index), 33, dtype=dtype).detach(), normal(7, 37, 33, dtype=dtype).detach()
    segments = Segments.of(index, 37)
    limit = TOLERANCE[dtype]
    for epilogue, extras in ((IDENTITY, ()), (RESIDUAL, (to,))):
        made = sum_segments(x, segments, epilogue, extras)
        wanted = permuting.sum_reference(x, index, 37, epilogue, extras)
        torch.testing.assert_close(made, wanted, rtol=limit, atol=limit)
        assert torch.equal(made, sum_segments(x, segments, epilogue, extras))


def test_sums_add_in_the_order_of_positions() -> None:
    """Float32 additions of very different sizes, where any other order gives another number."""
    x = torch.tensor([1e8, 1.0, -1e8, 1.0, 3e7, -3e7, 0.3])[:, None]
    total = torch.zeros(())
    for value in x[:, 0]:
        total = total + value
    made = sum_segments(x, Segments.of(torch.zeros(7, dtype=torch.int64), 1))
    assert made.item() == total.item() != x.double().sum().item()


def test_rows_out_of_range_keep_what_was_there() -> None:
    x, default = normal(8, 4, 5).detach(), normal(9, 3, 5).detach()
    made = gather_rows(x, torch.tensor([2, -1, 4]), default=default)
    assert torch.equal(made, torch.stack([x[2], default[1], default[2]]))


def places(tokens: int, ways: int, rows: int, once: bool) -> Tensor:
    """Positions of which some are dropped; with `once`, every row has exactly one."""
    if not once:
        return torch.randint(-1, rows + 1, (tokens, ways), generator=draw(tokens + ways))
    mixed = torch.randperm(tokens * ways, generator=draw(ways))
    return torch.where(mixed < rows, mixed, -1).view(tokens, ways)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ways", [1, 2, 3])
@pytest.mark.parametrize("once", [False, True])
def test_combine(ways: int, once: bool, dtype: torch.dtype) -> None:
    tokens, rows = 19, 15
    position = places(tokens, ways, rows, once)
    y, weight = normal(10, rows, 33, dtype=dtype), normal(11, tokens, ways, dtype=dtype)
    residual = normal(12, tokens, 33, dtype=dtype)
    for epilogue in (IDENTITY, RESIDUAL, GATED):
        extras = (residual,) * epilogue.extras

        def kernel(y: Tensor, w: Tensor, *a: Tensor, epilogue: Pointwise = epilogue) -> Tensor:
            return combine(y, position, w, epilogue, a, once=once)

        def reference(y: Tensor, w: Tensor, *a: Tensor, epilogue: Pointwise = epilogue) -> Tensor:
            return combining.reference(y, position, w, epilogue, a)

        compare(kernel, reference, y, weight, *extras)


@pytest.mark.parametrize("once", [False, True])
def test_combine_without_weights(once: bool) -> None:
    position = places(7, 2, 9, once)
    compare(
        lambda y: combine(y, position, once=once),
        lambda y: combining.reference(y, position),
        normal(13, 9, 20),
    )


def test_all_tokens_to_one_row_and_weights_of_another_dtype() -> None:
    position = torch.full((6, 2), 1)
    y, weight = normal(14, 3, 16, dtype=torch.bfloat16), normal(15, 6, 2)
    made = combine(y, position, weight, dtype=torch.float32)
    wanted = combining.reference(y, position, weight, dtype=torch.float32)
    torch.testing.assert_close(made, wanted)
    assert made.dtype == torch.float32
    grads = torch.autograd.grad(made.sum(), [y, weight])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


def test_only_the_gradients_that_are_asked_for() -> None:
    position = places(5, 2, 10, True)
    y, weight, residual = normal(16, 10, 8), normal(17, 5, 2), normal(18, 5, 8)
    wanted = torch.autograd.grad(
        combining.reference(y, position, weight, GATED, (residual,)).sum(), [y, weight, residual]
    )
    for i, x in enumerate((y, weight, residual)):
        inputs = [t.detach().requires_grad_(t is x) for t in (y, weight, residual)]
        made = combine(inputs[0], position, inputs[1], GATED, (inputs[2],), once=True)
        (got,) = torch.autograd.grad(made.sum(), [inputs[i]])
        torch.testing.assert_close(got, wanted[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ways", [1, 2, 3])
def test_spread(ways: int, dtype: torch.dtype) -> None:
    """Rows copied to some of their slots, weighted and not: what `combine` does, backwards."""
    position = places(9, ways, 9 * ways - 4, True)
    slots = torch.arange(9 * ways)[position.flatten() >= 0]
    order = slots[position.flatten()[slots].argsort()]
    x, weight = normal(23, 9, 33, dtype=dtype), normal(24, 9, ways, dtype=dtype)
    compare(
        lambda x, w: spreading.spread(x, order, position, w),
        lambda x, w: spreading.reference(x, order, ways, w),
        x,
        weight,
    )
    compare(
        lambda x: spreading.spread(x, order, position),
        lambda x: spreading.reference(x, order, ways),
        x,
    )


def test_spread_takes_weights_of_any_layout() -> None:
    """Those of a transposed tensor have their gradients in their own places."""
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    position = order.argsort().view(3, 2)
    x, weight = normal(25, 3, 7), normal(26, 2, 3).detach().t().requires_grad_()
    assert not weight.is_contiguous()
    compare(
        lambda x, w: spreading.spread(x, order, position, w),
        lambda x, w: spreading.reference(x, order, 2, w),
        x,
        weight,
    )


def test_combine_is_reproducible() -> None:
    position = places(19, 2, 15, False)
    y, weight = normal(19, 15, 33, dtype=torch.bfloat16), normal(20, 19, 2, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        made = combine(y, position, weight)
        runs.append((made, *torch.autograd.grad(made.float().square().sum(), [y, weight])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_is_not_taken() -> None:
    with pytest.warns(KernelWarning, match="kernel permute: it has no form for int64"):
        assert not permuting.takes("permute", torch.zeros(2, 2, dtype=torch.int64))
    with pytest.warns(KernelWarning, match="kernel combine: it has no form for complex64"):
        assert not permuting.takes("combine", torch.zeros(2, 2, dtype=torch.complex64))
    assert permuting.takes("permute", torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"prologue add\(x, a0\) reads further tensors"):
        permute(torch.zeros(2, 2), torch.tensor([0]), RESIDUAL)
    with pytest.raises(ValueError, match=r"add\(x, a0\) reads 1 tensors, not 0"):
        combine(torch.zeros(2, 2), torch.tensor([[0]]), epilogue=RESIDUAL)


class TestSource(expecttest.TestCase):
    def test_permute(self) -> None:
        self.assertExpectedInline(
            permuting.emit(SCALE).source,
            """\
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "rows"])
def permute(
    x_ptr, index_ptr, y_ptr,
    count, rows, WIDTH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (c < WIDTH)[None, :]
    target = i[:, None] * WIDTH + c[None, :]
    here = i < count
    index = tl.load(index_ptr + i, mask=here, other=-1).to(tl.int64)
    found = (index >= 0) & (index < rows * SLOTS)
    source = tl.where(found, index // SLOTS, 0)[:, None] * WIDTH + c[None, :]
    x = tl.load(x_ptr + source, mask=found[:, None] & inside, other=0.0)
    x = x.to(tl.float32)
    u = x * (0.5)
    y = tl.where(found[:, None], u, 0.0)
    tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=here[:, None] & inside)
""",
        )

    def test_sum_segments(self) -> None:
        self.assertExpectedInline(
            permuting.emit_sum(RESIDUAL).source,
            """\
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def sum_segments(
    x_ptr, order_ptr, starts_ptr, a0_ptr, y_ptr,
    count, WIDTH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (c < WIDTH)[None, :]
    target = i[:, None] * WIDTH + c[None, :]
    here = i < count
    start = tl.load(starts_ptr + i, mask=here, other=0)
    stop = tl.load(starts_ptr + i + 1, mask=here, other=0)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, tl.max(stop - start, 0), 2):
        for step in tl.static_range(2):
            at = start + first + step
            live = at < stop
            slot = tl.load(order_ptr + at, mask=live, other=0)
            source = (slot // SLOTS)[:, None] * WIDTH + c[None, :]
            x = tl.load(x_ptr + source, mask=live[:, None] & inside, other=0.0).to(tl.float32)
            total += x
    written = here[:, None] & inside
    a0 = tl.load(a0_ptr + target, mask=written, other=0.0).to(tl.float32)
    y = total + a0
    tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=written)
""",
        )

    def test_combine(self) -> None:
        self.assertExpectedInline(
            combining.emit(RESIDUAL).source,
            """\
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "rows"])
def combine(
    y_ptr, position_ptr, weight_ptr, a0_ptr, out_ptr,
    count, rows, WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (c < WIDTH)[None, :]
    target = i[:, None] * WIDTH + c[None, :]
    here = i < count
    written = here[:, None] & inside
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in tl.static_range(K):
        p = tl.load(position_ptr + i * K + k, mask=here, other=-1).to(tl.int64)
        found = (p >= 0) & (p < rows)
        source = tl.where(found, p, 0)[:, None] * WIDTH + c[None, :]
        present = found[:, None] & inside
        w = tl.load(weight_ptr + i * K + k, mask=found, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + source, mask=present, other=0.0).to(tl.float32)
        total += w[:, None] * y
    a0 = tl.load(a0_ptr + target, mask=written, other=0.0).to(tl.float32)
    out = total + a0
    tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=written)
""",
        )

    def test_combine_backward(self) -> None:
        kernel = combining.emit_backward(RESIDUAL, True, ("weight", "y"))
        self.assertExpectedInline(
            kernel.source,
            """\
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "rows"])
def combine_backward(
    g_ptr, y_ptr, position_ptr, weight_ptr, dweight_ptr, dy_ptr,
    count, rows, WIDTH: tl.constexpr, K: tl.constexpr, WAYS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = i < count
    way = tl.arange(0, WAYS)
    dots = tl.zeros([ROWS, WAYS], tl.float32)
    for column in range(0, WIDTH, BLOCK):
        c = column + tl.arange(0, BLOCK)
        inside = (c < WIDTH)[None, :]
        target = i[:, None] * WIDTH + c[None, :]
        written = here[:, None] & inside
        g = tl.load(g_ptr + target, mask=written, other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            p = tl.load(position_ptr + i * K + k, mask=here, other=-1).to(tl.int64)
            found = (p >= 0) & (p < rows)
            source = tl.where(found, p, 0)[:, None] * WIDTH + c[None, :]
            present = found[:, None] & inside
            w = tl.load(weight_ptr + i * K + k, mask=found, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + source, mask=present, other=0.0).to(tl.float32)
            dots += tl.where((way == k)[None, :], tl.sum(g * y, 1)[:, None], 0.0)
            dy = w[:, None] * g
            tl.store(dy_ptr + source, dy.to(dy_ptr.dtype.element_ty), mask=present)
    known = here[:, None] & (way < K)[None, :]
    dweight = dots.to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + i[:, None] * K + way[None, :], dweight, mask=known)
""",
        )
