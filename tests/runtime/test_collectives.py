"""Every typed collective, forward and backward, against the value on one device."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autopar.ir.lowered import COLLECTIVES, Collective, ShardSpec, SwapSpec
from autopar.runtime.collectives import apply, close, open_
from autopar.runtime.group import Group
from autopar.runtime.thread_world import AbortedError, ThreadWorld, run_threads

Spec = ShardSpec | SwapSpec | None


def local_of(x: Tensor, spec: ShardSpec, member: int) -> Tensor:
    """The member's shard, by indexing: independent of the code under test."""
    total = sum(spec.lengths) * spec.block
    start = sum(spec.lengths[:member]) * spec.block
    stop = start + spec.lengths[member] * spec.block
    index = [o * total + i for o in range(spec.outer) for i in range(start, stop)]
    return x.index_select(spec.dim, torch.tensor(index, dtype=torch.long))


def parts_of(x: Tensor, n: int, seed: int) -> list[Tensor]:
    """Partial values that add up to x."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for _ in range(n - 1)]
    return [*parts, x - sum(parts)] if parts else [x.clone()]


def spread(x: Tensor, kind: str, spec: ShardSpec | None, n: int, seed: int) -> list[Tensor]:
    """What every member holds of `x` as a value of `kind`."""
    if kind == "S":
        assert spec is not None
        return [local_of(x, spec, member) for member in range(n)]
    return parts_of(x, n, seed) if kind == "P" else [x.clone() for _ in range(n)]


def check_spread(
    locals_: list[Tensor], x: Tensor, kind: str, spec: ShardSpec | None, what: str
) -> None:
    """Assert that the members hold `x` as a value of `kind`."""
    if kind == "P":
        torch.testing.assert_close(sum(locals_), x, msg=lambda m: f"{what}: {m}")
        return
    for got, expected in zip(locals_, spread(x, kind, spec, len(locals_), 0), strict=True):
        torch.testing.assert_close(got, expected, msg=lambda m: f"{what}: {m}")
        assert got.is_contiguous(), what


DUAL = {"S": "S", "P": "R", "R": "R", "V": "P"}


def side(spec: Spec, which: str) -> ShardSpec | None:
    return getattr(spec, which) if isinstance(spec, SwapSpec) else spec


def check(op: Collective, shapes: list[tuple[int, ...]], specs: list[Spec], n: int) -> None:
    """One bucket through `op` and back, on n members."""
    generator = torch.Generator().manual_seed(n)
    xs = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    cs = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    befores = [side(spec, "source") for spec in specs]
    afters = [side(spec, "target") for spec in specs]
    inputs = [spread(x, op.before, b, n, 1) for x, b in zip(xs, befores, strict=True)]
    cotangents = [spread(c, DUAL[op.after], a, n, 2) for c, a in zip(cs, afters, strict=True)]

    def program(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        group = world.group(rank)
        local = [x[rank].clone().requires_grad_() for x in inputs]
        *edges, pending = open_(op, specs, group, *local)
        assert len(edges) == len(local)
        outputs = close(op, specs, group, pending, *edges)
        given = [c[rank].clone() for c in cotangents]
        copies = [c.clone() for c in given]
        torch.autograd.backward(list(outputs), given)
        for c, copy in zip(given, copies, strict=True):
            assert torch.equal(c, copy), "a gradient that others hold was overwritten"
        return [y.detach() for y in outputs], [x.grad for x in local]

    world = ThreadWorld(n)
    results = run_threads(world, program)
    for i in range(len(xs)):
        name = f"{op} {specs[i]} n={n}"
        outputs = [r[0][i] for r in results]
        gradients = [r[1][i] for r in results]
        check_spread(outputs, xs[i], op.after, afters[i], f"{name} forward")
        check_spread(gradients, cs[i], DUAL[op.before], befores[i], f"{name} backward")


def lengths(n: int, layout: str) -> tuple[int, ...]:
    """Units of each of n members."""
    return {
        "even": (2,) * n,
        "uneven": (3,) * (n - 1) + (1,),
        "empty": (2,) * (n - 1) + (0,),
        "first": (4,) + (0,) * (n - 1),
    }[layout]


def spec_of(n: int, layout: str, dim: int, outer: int = 1, block: int = 1) -> ShardSpec:
    return ShardSpec(dim, lengths(n, layout), outer, block)


def shape_of(rank: int, *specs: ShardSpec) -> tuple[int, ...]:
    shape = [3, 2, 5][:rank]
    for spec in specs:
        shape[spec.dim] = spec.size
    return tuple(shape)


WORLDS = (2, 3, 4)
LAYOUTS = ("even", "uneven", "empty", "first")
SHARDED = ("gather_vary", "gather_inv", "scatter_sum", "slice_inv", "slice_vary")


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("n", WORLDS)
def test_sharded(name: str, n: int) -> None:
    op = COLLECTIVES[name]
    for layout in LAYOUTS:
        for dim in (0, 1, 2):
            for outer, block in ((1, 1), (3, 1), (1, 2), (2, 3)):
                spec = spec_of(n, layout, dim, outer, block)
                check(op, [shape_of(3, spec)], [spec], n)


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("n", WORLDS)
def test_sharded_buckets(name: str, n: int) -> None:
    op = COLLECTIVES[name]
    for layout in LAYOUTS:
        specs: list[ShardSpec] = [
            spec_of(n, layout, 0),
            spec_of(n, "even", 1, 3),
            spec_of(n, layout, 0, 1, 2),
            spec_of(n, "uneven", 2, 2, 2),
            spec_of(n, layout, 0),
        ]
        shapes = [shape_of(rank, s) for rank, s in zip((1, 3, 2, 3, 3), specs, strict=True)]
        check(op, shapes, list(specs), n)


@pytest.mark.parametrize("n", WORLDS)
def test_swap(n: int) -> None:
    op = COLLECTIVES["swap"]
    bucket: list[Spec] = []
    shapes = []
    for source, target in ((0, 1), (1, 0), (2, 0), (1, 2)):
        for one, other in (("even", "even"), ("uneven", "empty"), ("first", "uneven")):
            for outer, block in ((1, 1), (2, 1), (1, 3)):
                a = spec_of(n, one, source, outer, 1)
                b = spec_of(n, other, target, 1, block)
                bucket.append(SwapSpec(a, b))
                shapes.append(shape_of(3, a, b))
                check(op, shapes[-1:], bucket[-1:], n)
    check(op, shapes, bucket, n)


@pytest.mark.parametrize("name", ["pvary", "psum", "keep_first"])
@pytest.mark.parametrize("n", [1, *WORLDS])
def test_replicated(name: str, n: int) -> None:
    op = COLLECTIVES[name]
    for shapes in ([(4, 3)], [()], [(2,), (0, 3), (5, 1), ()]):
        check(op, list(shapes), [None] * len(shapes), n)


@pytest.mark.parametrize("name", ["pmax", "pmin"])
@pytest.mark.parametrize("n", WORLDS)
def test_extrema(name: str, n: int) -> None:
    """Equal to amax over a stacked dim, ties included."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 4, (n, 6, 5), generator=generator).double().requires_grad_()
    cotangent = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    expected = whole.amax(0) if name == "pmax" else whole.amin(0)
    expected.backward(cotangent)

    def program(rank: int) -> tuple[Tensor, Tensor]:
        x = whole[rank].detach().clone().requires_grad_()
        y = apply(COLLECTIVES[name], None, world.group(rank), x)
        y.backward(cotangent)
        return y.detach(), x.grad

    world = ThreadWorld(n)
    for rank, (y, gradient) in enumerate(run_threads(world, program)):
        torch.testing.assert_close(y, expected.detach())
        torch.testing.assert_close(gradient, whole.grad[rank])


def test_mixed_bucket() -> None:
    """Dtypes, tensors without gradient and unused outputs in one call."""
    n = 3
    spec = ShardSpec(0, (2, 2, 1))
    specs = [spec] * 5
    full = [
        torch.arange(5),
        torch.randn(5, 2, dtype=torch.float64),
        torch.randn(5, dtype=torch.float32),
        torch.rand(5, 2) > 0.5,
        torch.randn(5, dtype=torch.complex64),
    ]

    def program(rank: int) -> tuple[list[Tensor], list[Tensor | None]]:
        group = world.group(rank)
        xs = [local_of(x, spec, rank) for x in full]
        for i in (1, 2, 4):
            xs[i].requires_grad_()
        *edges, pending = open_("gather_vary", specs, group, *xs)
        assert [e.requires_grad for e in edges] == [False, True, True, False, True]
        ys = close("gather_vary", specs, group, pending, *edges)
        assert [y.requires_grad for y in ys] == [False, True, True, False, True]
        (ys[1] * 2).sum().backward()  # ys[2] and ys[4] stay unused
        return [y.detach() for y in ys], [x.grad for x in xs]

    world = ThreadWorld(n)
    for rank, (ys, gradients) in enumerate(run_threads(world, program)):
        for y, x in zip(ys, full, strict=True):
            assert torch.equal(y, x)
        assert gradients[0] is None and gradients[3] is None
        assert torch.equal(gradients[1], torch.full_like(local_of(full[1], spec, rank), 2.0 * n))
        assert gradients[2] is None and gradients[4] is None  # as on one device


def test_no_autograd_nodes_without_gradient() -> None:
    world = ThreadWorld(2)

    def program(rank: int) -> None:
        group = world.group(rank)
        y = apply("psum", None, group, torch.ones(3))
        assert not y.requires_grad
        with torch.no_grad():
            y = apply("psum", None, group, torch.ones(3, requires_grad=True))
        assert not y.requires_grad
        x = torch.ones(3, requires_grad=True)
        apply("pvary", None, group, x).sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 2.0))
        apply("pvary", None, group, x).sum().backward()  # accumulates
        assert torch.equal(x.grad, torch.full((3,), 4.0))

    run_threads(world, program)


def test_retained_graph_and_early_open() -> None:
    """Two backward passes, and an open that waits after other communication was issued."""
    world = ThreadWorld(2)
    order: list[str] = []

    class Recorder:
        """Writes down when communication is issued and waited for (rank 0 only)."""

        def __init__(self, group: Group) -> None:
            self.group, self.size, self.rank = group, group.size, group.rank

        def all_reduce(self, x: Tensor, op: str = "sum", in_place: bool = False) -> object:
            flight = self.group.all_reduce(x, op, in_place)
            if self.rank == 0:
                order.append(f"issue {x.numel()}")
            outer = self

            class Flight:
                def wait(self) -> Tensor:
                    if outer.rank == 0:
                        order.append(f"wait {x.numel()}")
                    return flight.wait()

            return Flight()

    def program(rank: int) -> None:
        group = Recorder(world.group(rank))
        a = torch.ones(1, requires_grad=True)
        b = torch.ones(2, requires_grad=True)
        *ea, pa = open_("pvary", [None], group, a)
        *eb, pb = open_("pvary", [None], group, b)
        (ya,) = close("pvary", [None], group, pa, *ea)
        h = torch.full((2,), 3.0) * ya
        (yb,) = close("pvary", [None], group, pb, *eb)
        loss = (h * yb).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert torch.equal(a.grad, torch.full((1,), 24.0))
        assert torch.equal(b.grad, torch.full((2,), 12.0))

    run_threads(world, program)
    assert order == ["issue 2", "issue 1", "wait 2", "wait 1"] * 2


def test_outputs_keep_no_history_of_inputs() -> None:
    """pvary of a leaf gives another tensor on the same memory."""
    world = ThreadWorld(1)
    x = torch.ones(3, requires_grad=True)
    y = apply("pvary", None, world.group(0), x)
    assert x.is_leaf and y.data_ptr() == x.data_ptr() and y.grad_fn is not None


def test_shape_errors_come_before_sending() -> None:
    world = ThreadWorld(2)
    with pytest.raises(ValueError, match="no shard"):
        run_threads(
            world,
            lambda rank: apply(
                "gather_inv", ShardSpec(0, (1, 2)), world.group(rank), torch.ones(2)
            ),
        )
    with pytest.raises(ValueError, match="unknown collective"):
        apply("psums", None, world.group(0), torch.ones(1))


def test_failures_do_not_hang() -> None:
    world = ThreadWorld(3, timeout_s=30)
    before = threading.active_count()

    def fails(rank: int) -> None:
        if rank == 1:
            raise KeyError("broken")
        world.group(rank).all_reduce(torch.ones(1))

    with pytest.raises(KeyError, match="broken"):
        run_threads(world, fails)

    def ends_early(rank: int) -> None:
        if rank != 1:
            world.group(rank).all_reduce(torch.ones(1))

    with pytest.raises(AbortedError, match="failed or ended"):
        run_threads(world, ends_early)

    def differs(rank: int) -> None:
        world.group(rank).all_reduce(torch.ones(1 + rank % 2))

    with pytest.raises(RuntimeError, match="differ"):
        run_threads(world, differs)
    assert threading.active_count() == before
    assert run_threads(world, lambda rank: rank * 2) == [0, 2, 4]


def test_subgroups() -> None:
    world = ThreadWorld(4)

    def program(rank: int) -> float:
        row = world.group(rank, (rank // 2 * 2, rank // 2 * 2 + 1))
        column = world.group(rank, (rank % 2, rank % 2 + 2))
        x = torch.tensor([float(10**rank)])
        return apply("psum", None, column, apply("psum", None, row, x) * 2).item()

    assert run_threads(world, program) == [2222.0] * 4


def test_closing_twice_is_an_error() -> None:
    world = ThreadWorld(1)
    *edges, pending = open_("psum", [None], world.group(0), torch.ones(1))
    close("psum", [None], world.group(0), pending, *edges)
    with pytest.raises(RuntimeError, match="twice"):
        close("psum", [None], world.group(0), pending, *edges)


def test_swap_inside_one_dim_is_refused() -> None:
    spec = ShardSpec(0, (1,))
    with pytest.raises(ValueError, match="one dim"):
        apply(
            "swap", SwapSpec(spec, replace(spec, block=1)), ThreadWorld(1).group(0), torch.ones(1)
        )
