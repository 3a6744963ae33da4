"""Routed rows by the kernels on two simulated ranks: what they are without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.ir.lowered import Route
from autopar.ir.pointwise import parse_pointwise
from autopar.runtime import dispatch
from autopar.runtime.dispatch import routed_gather, routed_scatter
from autopar.runtime.group import Group
from autopar.runtime.thread_world import ThreadWorld, run_threads

ROUTE = Route(0, (12,), ((0, 7), (7, 12)), wraps=False)
GAP = Route(0, (12,), ((7, 12), (0, 4)), wraps=False)  # rows 4 to 6 are elsewhere
SQUARE = Route(1, (4, 3), ((0, 1), (1, 4)))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)

Result = list[Tensor]


def rows_of(route: Route, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    start, stop = route.owned[rank]
    return whole.narrow(route.dim, start, stop - start).to(dtype).clone().requires_grad_()


def normal(rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def run(program: Any, kernel: bool | None) -> list[Result]:
    """The results of `program(rank, group, kernel)`: an output, and what its gradients are of."""
    world = ThreadWorld(2)

    def on_rank(rank: int) -> Result:
        y, inputs = program(rank, world.group(rank), kernel)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9 + rank))
        return [y.detach(), *torch.autograd.grad(y, inputs, cotangent.to(y.dtype))]

    return run_threads(world, on_rank)


def compare(program: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """With the kernels and without; and that the kernels were it."""
    expected = run(program, None)
    launched = []
    for name in ("gather_rows", "sum_segments", "combine"):
        original = getattr(dispatch, name)

        def counted(*args: Any, _original: Any = original, **kwargs: Any) -> Tensor:
            launched.append(_original)
            out: Tensor = _original(*args, **kwargs)
            return out

        monkeypatch.setattr(dispatch, name, counted)
    made = run(program, True)
    assert launched
    # One rounding in place of one for every addition.
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for got, want in zip(made, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=limit, atol=limit)


INDICES = ([3, 3, 11, 0, 7, 3, 6], [11, 2])  # of the two ranks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [None, -1, 3])
@pytest.mark.parametrize("route", [ROUTE, GAP])
def test_gather(
    route: Route, padding: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(rank: int, group: Group, kernel: bool | None) -> tuple[Tensor, Result]:
        x = rows_of(route, rank, (12, 5), dtype)
        y = routed_gather(x, [torch.tensor(INDICES[rank])], route, group, padding, kernel)
        return y, [x]

    compare(program, monkeypatch, dtype)


def test_gather_of_two_dims_behind_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(rank: int, group: Group, kernel: bool | None) -> tuple[Tensor, Result]:
        x = rows_of(SQUARE, rank, (2, 4, 3, 5), torch.float64)
        indices = [torch.tensor([3, -1, 0]), torch.tensor([[2], [1 - rank]])]
        return routed_gather(x, indices, SQUARE, group, kernel=kernel), [x]

    compare(program, monkeypatch, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("route", [ROUTE, GAP])
def test_scatter(
    route: Route, accumulate: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(rank: int, group: Group, kernel: bool | None) -> tuple[Tensor, Result]:
        x = rows_of(route, rank, (12, 5), dtype)
        index = torch.tensor(INDICES[rank])
        values = normal(rank, (len(index), 5), dtype)
        y = routed_scatter(x, [index], values, route, group, accumulate, 0.5, kernel)
        return y, [x, values]

    compare(program, monkeypatch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ways", [1, 2, 3])
@pytest.mark.parametrize("route", [ROUTE, GAP])
def test_weighted_sum(
    route: Route, ways: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks with different numbers of tokens, one without any."""

    def program(rank: int, group: Group, kernel: bool | None) -> tuple[Tensor, Result]:
        x = rows_of(route, rank, (12, 5), dtype)
        index = torch.tensor([3, 3, 11, 0, 7, 6, 4, 10, 3, 3, 0, 1]) if rank else torch.tensor([])
        index, weight = index.to(torch.int64), normal(rank, (len(index), 1), dtype)
        more: Any = {"kernel": kernel, "weight": weight, "ways": ways, "dtype": dtype}
        y = routed_gather(x, [index], route, group, **more)
        assert y.shape == (len(index) // ways, 5)
        rows = routed_gather(x.detach(), [index], route, group)
        plain = (rows * weight.detach()).view(len(index) // ways, ways, 5).sum(1)
        torch.testing.assert_close(y.detach(), plain, rtol=0.05, atol=0.05)
        return y, [x, weight]

    compare(program, monkeypatch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_sum_and_residual(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shape of the residual, whose gradient is that of the result."""

    def program(rank: int, group: Group, kernel: bool | None) -> tuple[Tensor, Result]:
        x, shape = rows_of(ROUTE, rank, (12, 5), dtype), (1 + rank, 3, 5)
        index = torch.tensor([3, 3, 11, 0, 7, 6, 4, 10, 3, 3, 0, 1])[: 6 * (1 + rank)]
        weight, residual = normal(rank, (len(index), 1), dtype), normal(7, shape, dtype)
        more: Any = {"weight": weight, "ways": 2, "shape": shape, "dtype": dtype, "kernel": kernel}
        add = parse_pointwise("add(a0, x)")
        y = routed_gather(x, [index], ROUTE, group, **more, epilogue=add, extras=(residual,))
        assert y.shape == shape
        return y, [x, weight, residual]

    compare(program, monkeypatch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [None, "float", "mask"])
@pytest.mark.parametrize("route", [ROUTE, GAP])
def test_scatter_of_weighted_copies(
    route: Route, weights: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token to two rows, scaled, against the copies made by hand."""

    def program(rank: int, group: Group, kernel: bool | None) -> tuple[Tensor, Result]:
        x, ways = rows_of(route, rank, (12, 5), dtype), 2
        index = torch.tensor([3, 3, 11, 0, 7, 6, 4, 10])[: 4 * (1 + rank)]
        tokens = normal(rank, (1 + rank, 2, 5), dtype)
        weight = normal(8, (len(index), 1), dtype) if weights else None
        if weights == "mask":
            weight = weight > 0  # type: ignore[operator]
        more: Any = {"weight": weight, "ways": ways, "kernel": kernel}
        y = routed_scatter(x, [index], tokens, route, group, True, 0.5, **more)
        copies = tokens.view(-1, 1, 5).expand(-1, ways, 5).reshape(-1, 5)
        copies = copies if weight is None else copies * weight
        plain = routed_scatter(x, [index], copies, route, group, True, 0.5)
        torch.testing.assert_close(y, plain, rtol=0.05, atol=0.05)
        return y, [x, tokens, *([weight] if weights == "float" else [])]  # type: ignore[list-item]

    compare(program, monkeypatch, dtype)


def test_integers_go_the_usual_way() -> None:
    def program(rank: int) -> Tensor:
        x = torch.arange(12)[slice(*ROUTE.owned[rank])]
        index = torch.tensor(INDICES[rank])
        return routed_gather(x, [index], ROUTE, world.group(rank), kernel=True)

    world = ThreadWorld(2)
    assert [y.tolist() for y in run_threads(world, program)] == list(INDICES)
