"""Cross-entropy on shards, in simulated ranks, against torch's own on the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ir.lowered import ShardSpec
from autopar.runtime.collectives import apply
from autopar.runtime.cross_entropy import cross_entropy
from autopar.runtime.thread_world import ThreadWorld, run_threads


def close_to(got: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


CASES = list(
    itertools.product(
        ("mean", "sum", "none"), (0.0, 0.2), (False, True), ((), (3,)), ((1, 1), (1, 3), (2, 2))
    )
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("whole_vocabulary", [False, True])
def test_cross_entropy(dtype: torch.dtype, whole_vocabulary: bool) -> None:
    """Every reduction, smoothing, weights, spatial dims and grid of tokens by classes."""
    for reduction, smoothing, weighted, spatial, (rows, columns) in CASES:
        if not whole_vocabulary or columns == 1:
            check_cross_entropy(
                dtype, whole_vocabulary, reduction, smoothing, weighted, spatial, rows, columns
            )


def check_cross_entropy(
    dtype: torch.dtype,
    whole_vocabulary: bool,
    reduction: str,
    smoothing: float,
    weighted: bool,
    spatial: tuple[int, ...],
    rows: int,
    columns: int,
) -> None:
    torch.manual_seed(1)
    tokens, classes = 7, 11
    logits = (3 * torch.randn(tokens, classes, *spatial, dtype=dtype)).requires_grad_()
    target = torch.randint(0, classes, (tokens, *spatial))
    target[2] = target[-1] = -7  # ignored, unevenly among the rows
    weight = torch.rand(classes, dtype=dtype) + 0.5 if weighted else None
    expected = F.cross_entropy(
        logits, target, weight, reduction=reduction, ignore_index=-7, label_smoothing=smoothing
    )
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    world = ThreadWorld(rows * columns)
    row_spec = ShardSpec(0, (4, 3) if rows == 2 else (7,))
    column_spec = ShardSpec(1, {1: (11,), 2: (6, 5), 3: (6, 5, 0)}[columns])

    def program(rank: int) -> None:
        row, column = divmod(rank, columns)
        token_group = world.group(rank, [column + i * columns for i in range(rows)], "token")
        vocab_group = world.group(rank, [row * columns + i for i in range(columns)], "vocab")

        def of_row(x: Tensor) -> Tensor:
            return apply("slice_vary", row_spec, token_group, x.detach())

        def of_column(x: Tensor) -> Tensor:
            return apply("slice_vary", column_spec, vocab_group, x)

        local = of_column(of_row(logits)).requires_grad_()
        mine = of_row(cotangent) if reduction == "none" else cotangent
        loss = cross_entropy(
            local,
            of_row(target),
            weight,
            reduction,
            -7,
            smoothing,
            column_spec.offset(column),
            classes,
            None if whole_vocabulary else vocab_group,
            token_group,
        )
        assert loss.dtype == dtype
        loss.backward(mine, retain_graph=True)
        first, local.grad = local.grad, None
        loss.backward(mine)
        assert torch.equal(local.grad, first), "a second backward differs"
        close_to(local.grad, of_column(of_row(logits.grad)))
        if reduction == "none":
            close_to(loss.detach(), of_row(expected))
        else:
            close_to(apply("psum", None, token_group, loss.detach()), expected.detach())

    run_threads(world, program)


def test_cross_entropy_without_token_group_is_whole() -> None:
    logits, target = torch.randn(6, 5), torch.tensor([0, 1, -100, 3, 4, -100])
    close_to(cross_entropy(logits, target), F.cross_entropy(logits, target))
    one = ThreadWorld(1).group(0)
    close_to(cross_entropy(logits, target, vocab_group=one), F.cross_entropy(logits, target))
    close_to(
        cross_entropy(logits[0], target[0], vocab_group=one), F.cross_entropy(logits[0], target[0])
    )


def test_cross_entropy_of_nothing() -> None:
    """All ignored gives nan as in torch, no tokens zero."""
    one = ThreadWorld(1).group(0)
    target = torch.full((4,), -100)
    logits = torch.randn(4, 3)
    assert torch.isnan(cross_entropy(logits, target, vocab_group=one))
    empty = torch.randn(0, 3, requires_grad=True)
    for group in (one, None):
        loss = cross_entropy(empty, target[:0], None, "sum", vocab_group=group)
        assert loss.item() == 0.0
        loss.backward()
        assert empty.grad.shape == (0, 3)


@pytest.mark.parametrize("ids", [[0, 1], [1, 1]])
def test_cross_entropy_of_extremes(ids: list[int]) -> None:
    """Huge logits, and ranks whose classes are all masked."""
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 2.0, -torch.inf]])
    world = ThreadWorld(3)
    target = torch.tensor(ids)
    whole = extreme.clone().requires_grad_()
    expected = F.cross_entropy(whole, target)
    expected.backward()

    def program(rank: int) -> None:
        local = extreme[:, rank : rank + 1].clone().requires_grad_()
        loss = cross_entropy(
            local, target, vocab_start=rank, vocab_size=3, vocab_group=world.group(rank)
        )
        close_to(loss.detach(), expected.detach())
        loss.backward()
        close_to(local.grad, whole.grad[:, rank : rank + 1])

    run_threads(world, program)


def test_cross_entropy_low_precision() -> None:
    torch.manual_seed(0)
    logits = torch.randn(300, 1000, dtype=torch.bfloat16)
    target = torch.randint(0, 1000, (300,))
    exact = logits.float().requires_grad_()
    expected = F.cross_entropy(exact, target)
    expected.backward()
    world = ThreadWorld(2)

    def program(rank: int) -> None:
        local = logits[:, rank * 500 : rank * 500 + 500].clone().requires_grad_()
        loss = cross_entropy(
            local, target, vocab_start=rank * 500, vocab_size=1000, vocab_group=world.group(rank)
        )
        assert loss.dtype == torch.bfloat16
        close_to(loss.detach().float(), expected.detach(), rtol=1e-2, atol=0)
        loss.backward()
        want = exact.grad[:, rank * 500 : rank * 500 + 500]
        close_to(local.grad.float(), want, rtol=2e-2, atol=1e-6)

    run_threads(world, program)


def test_cross_entropy_of_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64)
    target = torch.rand(5, 4, dtype=torch.float64)
    world = ThreadWorld(2)
    lengths = (3, 2)

    def program(rank: int) -> float:
        spec, group = ShardSpec(0, lengths), world.group(rank)
        mine = [apply("slice_vary", spec, group, x) for x in (logits, target)]
        return apply("psum", None, group, cross_entropy(*mine, token_group=group)).item()

    expected = F.cross_entropy(logits, target).item()
    assert run_threads(world, program) == pytest.approx([expected] * 2)
    with pytest.raises(ValueError, match="probabilities"):
        cross_entropy(logits, target, vocab_group=ThreadWorld(1).group(0))


def test_cross_entropy_checks() -> None:
    one = ThreadWorld(1).group(0)
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        cross_entropy(torch.randn(2, 3), torch.tensor([1, 9]), vocab_group=one)
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(torch.randn(2, 3), torch.tensor([1, 0]), reduction="avg")
