"""Cross-entropy in one pass over the logits each way: the losses and gradients of torch's own.

The references are in float64. Losses are computed in float32 from logits of any dtype, and held to
4 units in the last place of the largest logit: they are a few roundings of numbers of that size.
A gradient is p = exp(l - L) but for the target's, so that its error is relative to p, by the rounding
of l - L: as many units again, and one rounding to the dtype of the logits. In float64 the limit is
100 times that: torch adds up the gradients of a row, and errs by more than the kernel (1.8e-13
against 2.0e-15 of 80-bit numbers, 40003 classes smoothed).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopar.errors import KernelWarning, UserError
from autopar.ir.lowered import ShardSpec
from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise
from autopar.kernel_use import Places
from autopar.runtime.collectives import apply
from autopar.runtime.cross_entropy import cross_entropy
from autopar.runtime.kernels import cross_entropy as fused
from autopar.runtime.kernels import support
from autopar.runtime.kernels.cross_entropy import Classes, emit, emit_backward, reference
from autopar.runtime.kernels.support import fall_back
from autopar.runtime.thread_world import ThreadWorld, run_threads
from tests.simulate import (
    assert_equivalent,
    decisions_of,
    plan_of,
    simulate,
    single_device,
    zoo_loss,
    zoo_subject,
)
from tests.zoo import ZOO

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CAP = parse_pointwise("t0 = div(x, 30.0); t1 = tanh(t0); mul(t1, 30.0)")
SCALE = parse_pointwise("mul(x, 0.25)")
# Of several rows per program and of several blocks per row (16384 elements in the interpreter).
SIZES = ((5, 11), (1, 1), (7, 1), (0, 4), (1, 1000), (130, 129), (3, 40003))


def made(
    tokens: int, classes: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits, and ids of which a third is ignored where there are three."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, classes, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, max(classes, 1), (tokens,), generator=generator)
    ids[2::3] = -100
    return logits.to(dtype).requires_grad_(), ids


def close(
    got: Tensor, wanted: Tensor, exact: torch.dtype, scale: float, near: Tensor | float = 1.0
) -> None:
    """Within 4 units in the last place of `scale` times `near`, and one rounding to `got`."""
    info = torch.finfo(got.dtype)
    units = 4 * (100 if exact is torch.float64 else 1)
    limit = units * torch.finfo(exact).eps * scale * near + info.eps * wanted.abs()
    limit = limit + (0.0 if got.dtype == exact else info.smallest_normal * info.eps)
    got = got.double()
    assert torch.equal(got.isnan(), wanted.isnan())
    infinite = wanted.isinf()
    assert torch.equal(got[infinite], wanted[infinite])
    wrong = ((got - wanted).abs() > limit) & ~infinite
    assert not wrong.any(), (got[wrong][:3], wanted[wrong][:3])


def check(
    logits: Tensor,
    ids: Tensor,
    classes: Classes,
    weight: Tensor | None = None,
    program: Pointwise = IDENTITY,
    in_place: bool = False,
    scale: float = 16.0,
) -> None:
    """Kernel and reference, losses and gradients."""
    exact = logits.detach().double().requires_grad_()
    wanted = reference(exact, ids, classes, weight, program)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9))
    (wanted_grad,) = torch.autograd.grad(wanted, exact, grad.double())
    compute = torch.promote_types(logits.dtype, torch.float32)
    losses = fused.cross_entropy(logits, ids, classes, weight, None, program, in_place)
    assert losses.dtype == compute and losses.shape == ids.shape
    close(losses.detach(), wanted.detach(), compute, scale)
    (got,) = torch.autograd.grad(losses, logits, grad.to(compute))
    assert got.dtype == logits.dtype
    # What p is reduced by, for the target and by smoothing, with weights of at most 1.5.
    near = wanted_grad.abs() + 1.5 * grad[:, None].abs() * classes.smoothing / classes.size
    here = torch.arange(logits.shape[1]) == ids[:, None]
    close(got, wanted_grad, compute, scale, near + 1.5 * grad[:, None].abs() * here)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_kernel_and_reference(dtype: torch.dtype, smoothing: float, weighted: bool) -> None:
    for tokens, classes in SIZES:
        logits, ids = made(tokens, classes, dtype)
        weight = torch.rand(classes) + 0.5 if weighted else None
        check(logits, ids, Classes(0, classes, smoothing=smoothing), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", [CAP, SCALE], ids=str)
def test_prologue(dtype: torch.dtype, program: Pointwise) -> None:
    for tokens, classes in ((5, 11), (3, 40003)):
        logits, ids = made(tokens, classes, dtype)
        check(logits, ids, Classes(0, classes), program=program)
        check(logits, ids, Classes(0, classes, smoothing=0.1), program=program)
    with pytest.raises(ValueError, match="reads more than the logits"):
        fused.cross_entropy(logits, ids, Classes(0, 1), program=parse_pointwise("add(x, a0)"))


def test_a_prologue_that_rounds() -> None:
    """As torch's ops on bfloat16 do; its reference is in float32, where it rounds alike."""
    program = parse_pointwise("t0 = mul(x, 0.3); cast_bf16(t0)")
    logits, ids = made(6, 1000, torch.bfloat16)
    wanted = F.cross_entropy((logits * 0.3).float(), ids, reduction="none")
    got = fused.cross_entropy(logits, ids, Classes(0, 1000), program=program)
    torch.testing.assert_close(got, wanted)
    grads = [torch.autograd.grad(y.sum(), logits)[0] for y in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-8)  # torch rounds twice more


def layouts() -> Iterator[Tensor]:
    def whole() -> Tensor:
        return made(9, 20_000)[0].detach()

    yield whole()[:, :17_001]  # a padded vocabulary
    yield whole()[:, 5:19_999]  # that begins anywhere
    yield whole()[::2, 3:50]  # rows far apart: copied
    yield whole()[:, :7].t()
    yield whole()[:1, :7].expand(4, 7)


@pytest.mark.parametrize("in_place", [False, True])
def test_layouts(in_place: bool) -> None:
    for logits in layouts():
        before = logits.clone()
        ids = torch.arange(len(logits)) % logits.shape[1]
        check(logits.requires_grad_(), ids, Classes(0, logits.shape[1]), in_place=in_place)
        assert in_place or torch.equal(logits, before)


def test_nothing_but_smoothing() -> None:
    logits, ids = made(130, 129)
    check(logits, ids, Classes(0, 129, smoothing=1.0), torch.rand(129) + 0.5)


def test_gradients_of_losses_that_lie_apart() -> None:
    logits, ids = made(4, 9)
    grad = torch.randn(8)
    losses = fused.cross_entropy(logits, ids, Classes(0, 9))
    for apart in (grad[::2], grad[:1].expand(4)):
        got, wanted = (torch.autograd.grad(losses, logits, g, True)[0] for g in (apart, +apart))
        assert torch.equal(got, wanted)


def test_no_classes_here() -> None:
    logits = torch.empty(3, 0, requires_grad=True)
    losses = fused.cross_entropy(logits, torch.full((3,), -100), Classes(4, 4))
    assert losses.tolist() == [0.0] * 3
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert grad.shape == (3, 0)


def test_in_place_leaves_what_is_between_the_rows() -> None:
    memory = torch.full((4, 20_000), 7.0)
    logits = memory[:, 3:17_004]
    logits.copy_(made(4, 17_001)[0].detach())
    losses = fused.cross_entropy(
        logits.requires_grad_(), torch.arange(4), Classes(0, 17_001), in_place=True
    )
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert grad.data_ptr() == logits.data_ptr() and grad.stride() == logits.stride()
    assert (memory[:, :3] == 7).all() and (memory[:, 17_004:] == 7).all()


def test_offsets_are_of_64_bits() -> None:
    """The third row begins beyond 2^31 elements; only the pages of the rows are ever touched."""
    stride, classes = (1 << 30) + 3, 50
    logits, ids = made(3, classes, torch.bfloat16)
    ids = ids.where(ids >= 0, 7)
    far = torch.empty(2 * stride + classes, dtype=torch.bfloat16).as_strided(
        (3, classes), (stride, 1)
    )
    far.copy_(logits.detach())
    message = [torch.zeros(3, 3), torch.zeros(3, 3)]
    for x, out in zip((logits.detach(), far), message, strict=True):
        fused._over_rows(emit(), x, [x, ids, None, out], Classes(0, classes), None)
    torch.testing.assert_close(*message)


# --- What is in the rows ----------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_rows(smoothing: float) -> None:
    """Their loss and gradient are zero, whatever their logits hold."""
    logits = made(6, 5)[0].detach()
    logits[1], logits[2], logits[4, 2] = math.nan, -math.inf, math.inf
    ids = torch.tensor([0, 3, 3, 1, 3, 4])
    classes = Classes(0, 5, 3, smoothing)
    for all_of_them in (False, True):
        x = logits.clone().requires_grad_()
        ids = ids.fill_(3) if all_of_them else ids
        losses = fused.cross_entropy(x, ids, classes)
        losses.sum().backward()
        ignored = ids == 3
        assert (losses[ignored] == 0).all() and (x.grad[ignored] == 0).all()
        assert x.grad.isfinite().all()
        exact = logits[~ignored].double()
        close(losses.detach()[~ignored], reference(exact, ids[~ignored], classes), x.dtype, 16.0)


def test_extremes() -> None:
    """-inf, all of a row, huge numbers and nan, as in torch."""
    inf = math.inf
    rows = [[1e4, -1e4, 0.0], [-inf, 2.0, -inf], [-inf] * 3, [inf, 1.0, 2.0], [math.nan, 1.0, 0.0]]
    for ids in ([0, 1, 1, 0, 1], [1, 0, 0, 1, 2]):
        logits = torch.tensor(rows, requires_grad=True)
        check(logits, torch.tensor(ids), Classes(0, 3), scale=1e4)


def test_an_id_that_is_no_class_cannot_pass() -> None:
    logits, _ = made(3, 4)
    losses = fused.cross_entropy(logits, torch.tensor([0, 4, -1]), Classes(0, 4))
    assert losses.isnan().tolist() == [False, True, True]
    losses.sum().backward()
    assert logits.grad.isnan().any(1).tolist() == [False, True, True]
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        cross_entropy(logits, torch.tensor([0, 4, 1]), kernel=IDENTITY)


def test_small_ids() -> None:
    logits, _ = made(3, 4)
    ids = torch.tensor([1, 3, 0])
    losses = [fused.cross_entropy(logits, i, Classes(0, 4)) for i in (ids, ids.to(torch.uint8))]
    assert torch.equal(*losses)


# --- In a program: divided, reduced, shaped ---------------------------------------------------

PIECES = {1: (13,), 2: (7, 6), 4: (4, 4, 5, 0)}


@pytest.mark.parametrize("members", PIECES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_divided(members: int, reduction: str) -> None:
    cases = [(0.0, False, False, (6,)), (0.2, True, False, (2, 3)), (0.2, False, True, (6,))]
    for smoothing, weighted, capped, shape in cases:
        program = CAP if capped else IDENTITY
        flat, ids = made(6, 13, torch.float64)
        weight = torch.rand(13, dtype=torch.float64) + 0.5 if weighted else None
        exact = flat.detach().requires_grad_()
        expected = F.cross_entropy(
            program(exact), ids, weight, reduction=reduction, label_smoothing=smoothing
        )
        cotangent = torch.randn_like(expected)
        expected.backward(cotangent)
        world, spec = ThreadWorld(members), ShardSpec(1, PIECES[members])

        def of_rank(
            rank: int,
            flat: Tensor = flat,
            whole: Tensor = exact,
            ids: Tensor = ids,
            weight: Tensor | None = weight,
            smoothing: float = smoothing,
            program: Pointwise = program,
            shape: tuple[int, ...] = shape,
            cotangent: Tensor = cotangent,
            world: ThreadWorld = world,
            spec: ShardSpec = spec,
            expected: Tensor = expected,
        ) -> None:
            group = world.group(rank)
            local = apply("slice_vary", spec, group, flat.detach()).clone().requires_grad_()
            loss = cross_entropy(
                local.view(*shape, local.shape[1]),
                ids.view(shape),
                weight,
                reduction,
                label_smoothing=smoothing,
                vocab_start=spec.offset(rank),
                vocab_size=13,
                vocab_group=group,
                classes_last=True,
                kernel=program,
            )
            torch.testing.assert_close(loss.detach().reshape(expected.shape), expected.detach())
            loss.backward(cotangent.view(loss.shape))
            torch.testing.assert_close(
                local.grad, apply("slice_vary", spec, group, whole.grad), rtol=1e-12, atol=1e-14
            )

        run_threads(world, of_rank)


@pytest.mark.parametrize("dtype", DTYPES)
def test_divided_in_the_dtypes(dtype: torch.dtype) -> None:
    """Two ranks give what one gives, to the last places; -inf on all of one rank, too."""
    logits, ids = made(4, 1001, dtype)
    with torch.no_grad():
        logits[1, :500] = -math.inf
    ids[1] = 600
    classes = Classes(0, 1001)
    one = fused.cross_entropy(logits, ids, classes)
    (grad,) = torch.autograd.grad(one.sum(), logits)
    world, spec = ThreadWorld(2), ShardSpec(1, (500, 501))

    def of_rank(rank: int) -> tuple[Tensor, Tensor]:
        group = world.group(rank)
        local = apply("slice_vary", spec, group, logits.detach()).clone().requires_grad_()
        here = Classes(spec.offset(rank), 1001)
        losses = fused.cross_entropy(local, ids, here, group=group, in_place=True)
        return losses, torch.autograd.grad(losses.sum(), local)[0]

    (first, left), (second, right) = run_threads(world, of_rank)
    assert torch.equal(first, second)
    compute = one.dtype
    close(first.detach(), one.detach().double(), compute, 16.0)
    whole = grad.double()
    near = whole.abs() + (torch.arange(1001) == ids[:, None])
    close(torch.cat((left, right), 1), whole, compute, 16.0, near)


def test_tokens_divided_and_unlike_counts() -> None:
    """A mean is the sum over the tokens of all ranks by their count, classes whole on each."""
    logits, ids = made(7, 5, torch.float64)
    expected = F.cross_entropy(logits, ids)
    world, spec = ThreadWorld(2), ShardSpec(0, (5, 2))

    def of_rank(rank: int) -> Tensor:
        group = world.group(rank)
        x, y = (apply("slice_vary", spec, group, t.detach()) for t in (logits, ids))
        return cross_entropy(x, y, token_group=group, kernel=IDENTITY)

    torch.testing.assert_close(sum(run_threads(world, of_rank)), expected.detach())


def test_shapes() -> None:
    """(C), (N, C, d) and nothing, as `F.cross_entropy` has them."""
    generator = torch.Generator().manual_seed(1)
    for shape, ids_shape in (((5,), ()), ((2, 5, 3), (2, 3)), ((0, 5), (0,))):
        logits = torch.randn(shape, generator=generator, requires_grad=True)
        ids = torch.randint(0, 5, ids_shape, generator=generator)
        for reduction in ("mean", "sum", "none"):
            wanted = F.cross_entropy(logits, ids, reduction=reduction)
            got = cross_entropy(logits, ids, reduction=reduction, kernel=IDENTITY)
            torch.testing.assert_close(got, wanted, equal_nan=True)
            grads = [torch.autograd.grad(y.sum(), logits)[0] for y in (got, wanted)]
            torch.testing.assert_close(*grads, equal_nan=True)
    everything = torch.full((4,), -100)
    assert cross_entropy(torch.randn(4, 3), everything, kernel=IDENTITY).isnan()


def test_the_loss_has_the_dtype_of_what_was_folded_in() -> None:
    logits, ids = made(6, 7, torch.bfloat16)
    wanted = F.cross_entropy(logits.float(), ids)
    loss = cross_entropy(logits, ids, kernel=IDENTITY, dtype=torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    assert cross_entropy(logits, ids, kernel=IDENTITY).dtype == torch.bfloat16


# --- In place ---------------------------------------------------------------------------------


def loss_of(hidden: Tensor, weight: Tensor, ids: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    return logits, cross_entropy(
        logits, ids.view(2, 3), classes_last=True, kernel=CAP, in_place=in_place
    )


def test_in_place() -> None:
    ids = made(6, 9)[1]
    hidden, weight = torch.randn(2, 3, 4), torch.randn(9, 4, requires_grad=True)
    grads = []
    for in_place in (False, True):
        logits, loss = loss_of(hidden, weight, ids, in_place)
        before = logits.detach().clone()
        of_logits, of_weight = torch.autograd.grad(loss, (logits, weight), retain_graph=True)
        grads.append((of_logits, of_weight))
        assert (of_logits.data_ptr() == logits.data_ptr()) == in_place
        assert torch.equal(logits.detach(), of_logits if in_place else before)
        if in_place:
            with pytest.raises(UserError, match="a second backward through cross_entropy"):
                torch.autograd.grad(loss, weight)
        else:
            assert torch.equal(torch.autograd.grad(loss, weight)[0], of_weight)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_others_that_kept_the_logits_raise() -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(9, 4, requires_grad=True)
    logits, loss = loss_of(hidden, weight, made(6, 9)[1], True)
    penalty = logits.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that ops make, but of those that alias one of `known`."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(t.numel() * t.element_size())
        return out


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_as_large_as_the_logits_is_made(smoothing: float) -> None:
    logits, ids = made(8, 4096)  # in float32: the interpreter's bfloat16 makes tensors of its own
    logits = logits * 1.0
    with Allocations(logits) as made_here:
        loss = cross_entropy(logits, ids, label_smoothing=smoothing, kernel=IDENTITY, in_place=True)
        torch.autograd.grad(loss, logits)
    assert max(made_here.sizes) <= 8 * 4 * 8  # four statistics per token, or its id and a mask


def test_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose plan divides the vocabulary: the gradients of one device."""
    seen: list[tuple[int, bool]] = []
    kernel = fused.cross_entropy

    def watched(logits: Tensor, ids: Tensor, classes: Classes, *rest: Any) -> Tensor:
        seen.append((logits.shape[1], rest[-1]))
        assert logits.shape[1] < classes.size
        return kernel(logits, ids, classes, *rest)

    monkeypatch.setattr(fused, "cross_entropy", watched)
    subject, entry = zoo_subject("gpt"), ZOO["gpt"]
    args, kwargs = entry.inputs(0, torch.float64, None)
    decisions = decisions_of(subject, plan_of(subject, 2, "tensor"))
    places = Places({"cross_entropy": None})
    got = simulate(subject, args, kwargs, zoo_loss(entry), decisions, kernels=places)
    assert_equivalent(got, single_device(subject.module, args, kwargs, zoo_loss(entry)))
    assert [in_place for _, in_place in seen] == [True, True]


# --- Where it cannot run ----------------------------------------------------------------------


def test_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    fall_back.cache_clear()
    logits, ids = made(6, 7)
    probabilities = torch.rand(6, 7).softmax(1)
    wanted = F.cross_entropy(CAP(logits), probabilities)
    with pytest.warns(KernelWarning, match="kernel cross_entropy: its targets are class prob"):
        got = cross_entropy(logits, probabilities, kernel=CAP, in_place=True)
    assert torch.equal(got, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(logits, probabilities, kernel=CAP)
    monkeypatch.setattr(fused, "MOST_TOKENS", 5)
    group = ThreadWorld(1).group(0)
    for vocab_group in (group, None):
        fall_back.cache_clear()
        with pytest.warns(KernelWarning, match="6 elements are more than the 5"):
            got = cross_entropy(logits, ids, kernel=CAP, vocab_group=vocab_group)
        torch.testing.assert_close(got, F.cross_entropy(CAP(logits), ids))


def test_falls_back_where_there_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prologue in torch, in the dtype that it gives."""
    logits, ids = made(6, 7, torch.bfloat16)
    monkeypatch.setattr(support, "_no_place", lambda device: "it runs on GPUs")
    fall_back.cache_clear()
    with pytest.warns(KernelWarning, match="kernel cross_entropy: it runs on GPUs"):
        got = cross_entropy(logits, ids, kernel=SCALE, dtype=torch.float32, in_place=True)
    assert torch.equal(got, F.cross_entropy(logits.float() * 0.25, ids))
    got.backward()


# --- The source -------------------------------------------------------------------------------


def test_source_of_the_forward() -> None:
    assert_expected_inline(
        emit(CAP).source,
        """\
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "classes", "stride", "start"])
def cross_entropy(
    x_ptr, ids_ptr, weight_ptr, out_ptr, rows, classes, stride, start,
    IGNORED: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    own_ptr = x_ptr
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
    own = tl.load(own_ptr + begin + local, mask=here, other=0.0).to(tl.float32)
    o0 = own / (30.0)
    o1 = tl.where(tl.abs(o0) < 0.1, o0 - o0 * o0 * o0 * (0.3333333333333333 - o0 * o0 * 0.13333333333333333), 2.0 * tl.sigmoid(2.0 * o0) - 1.0)
    chosen = o1 * (30.0)
    end = tl.max(tl.where(kept, classes + shift, 0), 0)
    stop = tl.where(end > 0, BLOCK + gap, 0)
    step = tl.full([1, BLOCK], BLOCK, tl.int32)
    ahead = tl.load(x_ptr + (BLOCK + lane), mask=step < stop, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    rest = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(0, end - gap, BLOCK):
        i = k + tl.where(k > 0, gap, 0) + lane
        column = i - shift[:, None]
        inside = (column >= 0) & (column < classes) & there[:, None]
        x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
        p0 = x / (30.0)
        p1 = tl.where(tl.abs(p0) < 0.1, p0 - p0 * p0 * p0 * (0.3333333333333333 - p0 * p0 * 0.13333333333333333), 2.0 * tl.sigmoid(2.0 * p0) - 1.0)
        u = p1 * (30.0)
        if SMOOTH:
            part = tl.where(inside, u, 0.0)
            if WEIGHTED:
                part *= tl.load(weight_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
            rest += part
        u = tl.where(inside, u, float("-inf"))
        new = tl.maximum(top, tl.max(u, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - base)[:, None] + tl.exp(u - base[:, None])
        top = new
    for first in range(BLOCK, stop, BLOCK):
        x = ahead.to(tl.float32)
        i = first + lane
        ahead = tl.load(x_ptr + (i + BLOCK), mask=first + step < stop, other=0.0)
        p0 = x / (30.0)
        p1 = tl.where(tl.abs(p0) < 0.1, p0 - p0 * p0 * p0 * (0.3333333333333333 - p0 * p0 * 0.13333333333333333), 2.0 * tl.sigmoid(2.0 * p0) - 1.0)
        u = p1 * (30.0)
        if SMOOTH:
            if WEIGHTED:
                rest += u * tl.load(weight_ptr + start + i - shift[:, None]).to(tl.float32)
            else:
                rest += u
        new = tl.maximum(top, tl.max(u, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - base)[:, None] + tl.exp(u - base[:, None])
        top = new
    tl.store(out_ptr + row, top, mask=there)
    tl.store(out_ptr + row + rows, tl.sum(total, 1), mask=there)
    tl.store(out_ptr + row + 2 * rows, tl.where(here, chosen, 0.0), mask=there)
    if SMOOTH:
        tl.store(out_ptr + row + 3 * rows, tl.sum(rest, 1), mask=there)
""",
    )


def test_source_of_the_backward() -> None:
    assert_expected_inline(
        emit_backward(CAP).source,
        """\
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "classes", "stride", "start", "grad_stride"])
def cross_entropy_backward(
    x_ptr, dx_ptr, ids_ptr, weight_ptr, whole_ptr, log_sums_ptr, grad_ptr,
    rows, classes, stride, start, grad_stride,
    IGNORED: tl.constexpr, KEEP: tl.constexpr, SPREAD: tl.constexpr, CLASSES: tl.constexpr,
    SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
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
    grad = tl.load(grad_ptr + row * grad_stride, mask=kept, other=0.0)
    log_sum = tl.load(log_sums_ptr + row, mask=kept, other=0.0)
    own = grad * KEEP
    if WEIGHTED:
        known = kept & (ids >= 0) & (ids < CLASSES)
        own *= tl.load(weight_ptr + ids, mask=known, other=0.0).to(tl.float32)
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
        i = k + tl.where(k > 0, gap, 0) + lane
        column = i - shift[:, None]
        inside = (column >= 0) & (column < classes) & there[:, None]
        x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
        p0 = x / (30.0)
        p1 = tl.where(tl.abs(p0) < 0.1, p0 - p0 * p0 * p0 * (0.3333333333333333 - p0 * p0 * 0.13333333333333333), 2.0 * tl.sigmoid(2.0 * p0) - 1.0)
        u = p1 * (30.0)
        if WEIGHTED and SMOOTH:
            share = tl.load(weight_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.exp(u - log_sum[:, None]) * factor[:, None]
        if WEIGHTED and SMOOTH:
            d -= spread[:, None] * share
        elif SMOOTH:
            d -= spread[:, None]
        d = tl.where(i == target[:, None], d - own[:, None], d)
        s0 = x / (30.0)
        s1 = tl.where(tl.abs(s0) < 0.1, s0 - s0 * s0 * s0 * (0.3333333333333333 - s0 * s0 * 0.13333333333333333), 2.0 * tl.sigmoid(2.0 * s0) - 1.0)
        s2 = s1 * s1
        s3 = (1.0) - s2
        s4 = s3 * (0.03333333333333333)
        slope = (30.0) * s4
        d *= slope
        d = tl.where(kept[:, None], d, 0.0).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + i, d, mask=inside)
    for first in range(BLOCK, BLOCK + gap, BLOCK):
        i = first + lane
        x = tl.load(x_ptr + i).to(tl.float32)
        p0 = x / (30.0)
        p1 = tl.where(tl.abs(p0) < 0.1, p0 - p0 * p0 * p0 * (0.3333333333333333 - p0 * p0 * 0.13333333333333333), 2.0 * tl.sigmoid(2.0 * p0) - 1.0)
        u = p1 * (30.0)
        if WEIGHTED and SMOOTH:
            share = tl.load(weight_ptr + start + i - shift[:, None]).to(tl.float32)
        d = tl.exp(u - log_sum[:, None]) * factor[:, None]
        if WEIGHTED and SMOOTH:
            d -= spread[:, None] * share
        elif SMOOTH:
            d -= spread[:, None]
        d = tl.where(i == target[:, None], d - own[:, None], d)
        s0 = x / (30.0)
        s1 = tl.where(tl.abs(s0) < 0.1, s0 - s0 * s0 * s0 * (0.3333333333333333 - s0 * s0 * 0.13333333333333333), 2.0 * tl.sigmoid(2.0 * s0) - 1.0)
        s2 = s1 * s1
        s3 = (1.0) - s2
        s4 = s3 * (0.03333333333333333)
        slope = (30.0) * s4
        d *= slope
        d = tl.where(kept[:, None], d, 0.0).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + i, d)
""",
    )
