"""Gradients of 16-bit leaves over many micro-batches: as good as those of one."""

from __future__ import annotations

import gc
import weakref
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from autopar.runtime import step_piece
from autopar.runtime.deferred_weights import Queue, deferring, drain
from autopar.runtime.wide_sums import WideSums, needs_wide_sum
from tests.simulate import Subject, decisions_of, plan_of, subject_of
from tests.simulate_step import simulate_step

ROWS, WIDTH, CLASSES = 128, 24, 8
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of one rounding


class MLP(nn.Module):
    """Its loss is part of it; sizes are powers of two where means divide by them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.last(self.first(x).relu()), y)


class Squares(MLP):
    """A sum over samples, whose micro-batches compute what they do alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.last(self.first(x).relu()).float().square().sum()
        return out


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return x + 1, torch.randint(CLASSES, (ROWS,), generator=generator)


@cache
def subject(dtype: torch.dtype) -> Subject:
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return subject_of(MLP(), batch(), {})


def gradients(dtype: torch.dtype, ranks: int, micro_batches: int) -> dict[str, Tensor]:
    """Of one step of the programs, on ranks with a part of the batch each."""
    made = subject(dtype)
    decisions = decisions_of(made, plan_of(made, ranks, "data" if ranks > 1 else "auto"))
    result = simulate_step(made, batch(), {}, lambda loss: loss, decisions, micro_batches)
    return {name: g for name, g in result.gradients.items() if g is not None}


def summed(dtype: torch.dtype, micro_batches: int) -> dict[str, Tensor]:
    """On one device, gradients of micro-batches in `dtype`, added up in float64."""
    module = subject(dtype).module
    total = {
        name: torch.zeros_like(p, dtype=torch.float64) for name, p in module.named_parameters()
    }
    for x, y in zip(*(part.chunk(micro_batches) for part in batch()), strict=True):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = module(x, y) / micro_batches
        parameters = dict(module.named_parameters())
        if dtype == torch.float16:
            loss = loss * 2.0**16
        made = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, made, strict=True):
            total[name] += gradient.double() / (2.0**16 if dtype == torch.float16 else 1.0)
    return total


def error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest over parameters of the error's norm over that of the gradient."""
    return max(
        float((got[name].double() - wanted[name]).norm() / wanted[name].norm()) for name in wanted
    )


@pytest.mark.parametrize(
    ("dtype", "ranks"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.bfloat16, 2)]
)
def test_sums_are_rounded_once(
    dtype: torch.dtype, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of 64 micro-batches is that of one rounding (and one per all-reduce)."""
    wanted = summed(dtype, 64 * ranks)
    got = error(gradients(dtype, ranks, 64), wanted)
    monkeypatch.setattr(step_piece, "needs_wide_sum", lambda _: False)
    narrow = error(gradients(dtype, ranks, 64), wanted)
    assert got < 0.8 * UNIT[dtype] and narrow > 2 * UNIT[dtype]


def test_parameters_that_are_stored_so() -> None:
    """Their own gradients are summed, not those of casts."""
    torch.manual_seed(0)
    given = (batch()[0].bfloat16(),)
    made = subject_of(Squares().bfloat16(), given, {})
    decisions = decisions_of(made, plan_of(made, 1, "auto"))
    got = simulate_step(made, given, {}, lambda loss: loss, decisions, 64).gradients
    parameters = dict(made.module.named_parameters())
    parts = []
    for x in given[0].chunk(64):
        parts.append(torch.autograd.grad(made.module(x), list(parameters.values())))
    for name, of_parts in zip(parameters, zip(*parts, strict=True), strict=True):
        wanted = torch.stack(of_parts).double().sum(0)
        found = got[name]
        assert found is not None and found.dtype == torch.bfloat16
        assert error({name: found}, {name: wanted}) < 0.6 * UNIT[torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "micro_batches"), [(torch.float32, 4), (torch.float32, 1), (torch.bfloat16, 1)]
)
def test_all_else_stays(
    dtype: torch.dtype, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32, and a single micro-batch, to the bit; nothing is watched."""
    assert needs_wide_sum(torch.bfloat16) and not needs_wide_sum(torch.float32)
    monkeypatch.setattr(WideSums, "watch", lambda *_: pytest.fail("watched"))
    got = gradients(dtype, 1, micro_batches)
    monkeypatch.setattr(step_piece, "needs_wide_sum", lambda _: False)
    for name, gradient in gradients(dtype, 1, micro_batches).items():
        assert torch.equal(got[name], gradient)


def weight(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor([values], dtype=torch.bfloat16))


def test_an_overflow_stays() -> None:
    """GradScaler looks for it after the step."""
    sums, leaf = WideSums(), nn.Parameter(torch.ones(3, dtype=torch.float16))
    sums.watch(leaf)
    for factor in (1.0, float("inf"), 2.0):
        (leaf * torch.tensor([factor, 40000.0, 1.0], dtype=torch.float16)).sum().backward()
    assert leaf.grad is None
    sums.settle(leaf)
    assert leaf.grad is not None and leaf.grad.dtype == torch.float16
    assert leaf.grad.tolist() == [float("inf"), float("inf"), 3.0]


def test_what_comes_later_is_added_to_the_same_sum() -> None:
    """A weight that one op defers and another does not, and one that nobody watches."""
    sums, both, free = WideSums(), weight(1.0, 1.0), weight(1.0, 1.0)
    sums.watch(both)
    one = torch.ones(1, 2, dtype=torch.bfloat16)
    for step in range(9):
        queue: Queue = []
        with deferring(queue, sums.add):
            made = nn.functional.linear(one, both) + nn.functional.linear(one, free)
            (made.sum() + (both * (256.0 if step == 0 else 0.0)).sum()).backward()
        drain(queue)
    sums.settle(both)
    sums.settle(free)
    assert both.grad is not None and both.grad.tolist() == [[264.0, 264.0]]  # 256 + 1 is 256
    assert free.grad is not None and free.grad.tolist() == [[9.0, 9.0]]


def test_large_gradients_of_any_layout() -> None:
    """A CPU adds them in pieces."""
    sums = WideSums()
    leaf = nn.Parameter(torch.zeros(700, 3001, dtype=torch.bfloat16))
    sums.watch(leaf)
    torch.manual_seed(0)
    parts = [torch.randn(3001, 700).bfloat16().t() for _ in range(3)]
    for part in parts:
        sums.add(leaf, part)
    sums.settle(leaf)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.stack(parts).float().sum(0).bfloat16())


def test_nothing_is_kept() -> None:
    """A leaf refers to its sums by a hook, and they do not refer to it."""
    sums, leaf = WideSums(), weight(1.0)
    sums.watch(leaf)
    leaf.sum().backward()
    gone, total = weakref.ref(leaf), weakref.ref(sums)
    gc.disable()
    try:
        del leaf
        assert gone() is None
        del sums
        assert total() is None
    finally:
        gc.enable()
