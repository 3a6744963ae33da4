"""Routed gathers and scatters and prefix sums on simulated ranks, against plain indexing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autopar.ir.lowered import Route
from autopar.runtime.dispatch import prefix_sum, routed_gather, routed_scatter
from autopar.runtime.thread_world import ThreadWorld, run_threads

close = torch.testing.assert_close


def owned_of(lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    ends = list(itertools.accumulate(lengths))
    return tuple((end - n, end) for end, n in zip(ends, lengths, strict=True))


@st.composite
def lengths(draw: st.DrawFn, least: int = 0) -> tuple[int, ...]:
    """Pieces of up to four members, some perhaps empty, not all of them."""
    n = draw(st.integers(1, 4))
    made = draw(st.lists(st.integers(least, 4), min_size=n, max_size=n))
    return tuple(made) if sum(made) else (*made[:-1], 3)


def backward(y: Tensor, cotangent: Tensor) -> None:
    torch.autograd.backward(y, cotangent)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths(), lengths(), st.integers(0, 2), st.integers(1, 2), st.integers(0, 2**16))
def test_gather(
    rows: tuple[int, ...], tokens: tuple[int, ...], dim: int, indexed: int, seed: int
) -> None:
    """Rows anywhere, in any order, again and again; any dim, one or two index tensors."""
    n = min(len(rows), len(tokens))
    rows, tokens = rows[:n], tokens[:n]
    rows = rows if sum(rows) else (*rows[:-1], 2)
    draw = torch.Generator().manual_seed(seed)
    sizes = (sum(rows), 3)[:indexed]
    shape = (*(2, 3)[:dim], *sizes, 5)
    x = torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_()
    indices = [torch.randint(-s, s, (sum(tokens),), generator=draw) for s in sizes]
    at: Any = (*[slice(None)] * dim, *indices)
    expected = x[at]
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=draw)
    backward(expected, cotangent)
    world, route = ThreadWorld(n), Route(dim, sizes, owned_of(rows))

    def program(rank: int) -> None:
        mine = x.detach().split(rows, dim)[rank].clone().requires_grad_()
        here = [i.split(tokens)[rank] for i in indices]
        y = routed_gather(mine, here, route, world.group(rank))
        close(y, expected.detach().split(tokens, dim)[rank])
        backward(y, cotangent.split(tokens, dim)[rank])
        close(mine.grad, x.grad.split(rows, dim)[rank])  # type: ignore[union-attr]

    run_threads(world, program)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths(), lengths(), st.integers(0, 2), st.integers(1, 2), st.booleans(), st.integers(0, 99)
)
def test_scatter(
    rows: tuple[int, ...],
    tokens: tuple[int, ...],
    dim: int,
    indexed: int,
    accumulate: bool,
    seed: int,
) -> None:
    """Added or put; of several values for one position the last one stays, as on one device."""
    n = min(len(rows), len(tokens))
    rows, tokens = rows[:n], tokens[:n]
    rows = rows if sum(rows) else (*rows[:-1], 2)
    draw = torch.Generator().manual_seed(seed)
    sizes = (sum(rows), 3)[:indexed]
    x = torch.randn((*(2, 3)[:dim], *sizes, 5), dtype=torch.float64, generator=draw)
    x.requires_grad_()
    indices = [torch.randint(s, (sum(tokens),), generator=draw) for s in sizes]
    at: Any = (*[slice(None)] * dim, *indices)
    values = torch.randn_like(x[at]).requires_grad_()
    lead: Any = [None] * dim + indices
    expected = torch.ops.aten.index_put(x, lead, values, accumulate)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=draw)
    backward(expected, cotangent)
    world, route = ThreadWorld(n), Route(dim, sizes, owned_of(rows))

    def program(rank: int) -> None:
        mine = x.detach().split(rows, dim)[rank].clone().requires_grad_()
        here = [i.split(tokens)[rank] for i in indices]
        sent = values.detach().split(tokens, dim)[rank].clone().requires_grad_()
        y = routed_scatter(mine, here, sent, route, world.group(rank), accumulate)
        close(y, expected.detach().split(rows, dim)[rank])
        backward(y, cotangent.split(rows, dim)[rank])
        close(mine.grad, x.grad.split(rows, dim)[rank])  # type: ignore[union-attr]
        close(sent.grad, values.grad.split(tokens, dim)[rank])  # type: ignore[union-attr]

    run_threads(world, program)


def test_scatter_scales_and_takes_integers() -> None:
    world = ThreadWorld(2)
    route = Route(0, (4,), ((0, 2), (2, 4)))
    x, index = torch.arange(4), torch.tensor([3, 0, 3])

    def program(rank: int) -> Tensor:
        ones = torch.ones(3, dtype=torch.int64)
        group = world.group(rank)
        return routed_scatter(x.chunk(2)[rank], [index], ones, route, group, True, scale=2)

    assert torch.cat(run_threads(world, program)).tolist() == [4, 1, 2, 11]


def test_rows_that_nobody_owns_are_zero_and_padding_gets_no_gradient() -> None:
    """What a second axis divides is summed by it; the padding row is a global position."""
    world = ThreadWorld(2)
    table = torch.arange(12.0, dtype=torch.float64).view(6, 2)
    route = Route(0, (6,), ((4, 6), (0, 2)), wraps=False)  # rows 2 and 3 are elsewhere
    ids = torch.tensor([[5, 0, 2], [3, 1, 5]])

    def program(rank: int) -> Tensor:
        start, stop = route.owned[rank]
        mine = table[start:stop].clone().requires_grad_()
        y = routed_gather(mine, [ids[rank]], route, world.group(rank), padding_idx=5)
        expected = table[ids[rank]].masked_fill(((ids[rank] // 2) == 1)[:, None], 0)
        close(y, expected)
        y.sum().backward()
        assert mine.grad is not None
        return mine.grad[:, 0]

    assert [g.tolist() for g in run_threads(world, program)] == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize(("wraps", "wrong"), [(True, -7), (True, 6), (False, -1), (False, 6)])
def test_positions_out_of_range(wraps: bool, wrong: int) -> None:
    route = Route(0, (6,), ((0, 6),), wraps)
    group = ThreadWorld(1).group(0)
    with pytest.raises(IndexError, match=f"index {wrong} is out of bounds .* size 6"):
        routed_gather(torch.zeros(6, 2), [torch.tensor([0, wrong])], route, group)


def test_positions_out_of_range_where_only_counts_come_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU: no early look
    route = Route(0, (6, 3), ((0, 6),))
    group = ThreadWorld(1).group(0)
    wrong = [torch.tensor([0, 5, 5]), torch.tensor([0, 3, 2])]
    with pytest.raises(IndexError, match=r"1 indices are out of bounds for sizes \(6, 3\)"):
        routed_gather(torch.zeros(6, 3, 2), wrong, route, group)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths(), st.integers(0, 2), st.booleans())
def test_prefix_sum(pieces: tuple[int, ...], dim: int, whole: bool) -> None:
    shape = [2, 3, 2]
    shape[dim] = sum(pieces)
    torch.manual_seed(0)
    x = torch.randint(0, 5, shape) if whole else torch.randn(shape, dtype=torch.float64)
    x.requires_grad_(not whole)
    expected = x.cumsum(dim)
    cotangent = torch.randn(shape, dtype=torch.float64)
    if not whole:
        backward(expected, cotangent)
    world = ThreadWorld(len(pieces))

    def program(rank: int) -> None:
        mine = x.detach().split(pieces, dim)[rank].clone().requires_grad_(not whole)
        y = prefix_sum(mine, dim, world.group(rank))
        close(y, expected.detach().split(pieces, dim)[rank])
        if not whole:
            backward(y, cotangent.split(pieces, dim)[rank])
            close(mine.grad, x.grad.split(pieces, dim)[rank])  # type: ignore[union-attr]

    run_threads(world, program)
