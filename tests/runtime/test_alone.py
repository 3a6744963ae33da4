"""Stand-ins for groups: shapes and dtypes of real collectives, the time they take left out."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from autopar.ir.lowered import ShardSpec, SwapSpec
from autopar.runtime.alone import AloneGroup
from autopar.runtime.collectives import apply
from autopar.runtime.group import Group
from autopar.runtime.phase_clock import PhaseClock
from autopar.runtime.thread_world import ThreadWorld, run_threads

CPU = torch.device("cpu")


def alone(size: int, rank: int) -> AloneGroup:
    return AloneGroup(size, rank, PhaseClock(CPU))


CALLS = [
    ("psum", None, (4, 6)),
    ("pvary", None, (4, 6)),
    ("pmax", None, (4, 6)),
    ("gather_vary", ShardSpec(1, (3, 3, 2)), None),
    ("gather_inv", ShardSpec(0, (2, 2, 2)), None),
    ("scatter_sum", ShardSpec(0, (3, 3, 1)), (7, 2)),
    ("scatter_sum", ShardSpec(1, (2, 2, 2), outer=2), (3, 12)),
    ("slice_inv", ShardSpec(0, (2, 2, 1)), (5, 2)),
    ("slice_vary", ShardSpec(0, (2, 2, 1)), (5, 2)),
    ("swap", SwapSpec(ShardSpec(0, (2, 2, 1)), ShardSpec(1, (2, 1, 1))), None),
    ("keep_first", None, (3, 2)),
]


def local(name: str, spec: ShardSpec | SwapSpec | None, rank: int) -> Tensor:
    if isinstance(spec, SwapSpec):
        return torch.randn(spec.source.local_size(rank), spec.target.size)
    assert spec is not None
    shape = [5, 5]
    shape[spec.dim] = spec.local_size(rank)
    return torch.randn(*shape)


@pytest.mark.parametrize(("name", "spec", "shape"), CALLS)
def test_shapes_and_gradients_are_those_of_a_group_that_communicates(
    name: str, spec: ShardSpec | SwapSpec | None, shape: tuple[int, ...] | None
) -> None:
    def both(group: Group, rank: int) -> tuple[torch.Size, torch.Size]:
        x = torch.randn(*shape) if shape else local(name, spec, rank)
        x.requires_grad_()
        y = apply(name, spec, group, x)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        return y.shape, x.grad.shape

    world = ThreadWorld(3)
    expected = run_threads(world, lambda rank: both(world.group(rank), rank))
    assert [both(alone(3, rank), rank) for rank in range(3)] == expected


def test_every_member_holds_what_this_one_holds() -> None:
    group, x = alone(4, 2), torch.arange(6.0).view(3, 2)
    assert torch.equal(group.all_gather(x).wait(), x.repeat(4, 1))
    assert torch.equal(group.all_gather(x, [4, 4, 3, 0]).wait(), x.repeat(4, 1)[:11])
    scattered = group.reduce_scatter(torch.arange(8.0), [3, 3, 2, 0]).wait()
    assert scattered.tolist() == [6, 7]
    counts = torch.tensor([5, 6, 7, 8])
    assert group.all_to_all(counts, [1] * 4, [1] * 4).wait().tolist() == [7] * 4
    # The sum of counts over ranks that are alike: rows of an expert, of all tokens.
    assert group.all_reduce(counts).wait().tolist() == [20, 24, 28, 32]


def test_results_share_no_memory_with_what_was_sent() -> None:
    group, x = alone(2, 0), torch.ones(4)
    results = [
        group.all_reduce(x),
        group.all_gather(x),
        group.reduce_scatter(x),
        group.all_to_all(x, [2, 2], [2, 2]),
        group.broadcast(x),
    ]
    for result in results:
        result.wait().zero_()
    assert torch.equal(x, torch.ones(4))
    assert group.all_reduce(x, in_place=True).wait() is x


def test_a_phase_is_counted_without_its_stand_ins() -> None:
    clock = PhaseClock(CPU)
    with clock.phase("forward"):
        time.sleep(0.001)
        with clock.standing_in():
            time.sleep(0.02)
    with clock.standing_in():  # outside phases: nobody's
        time.sleep(0.001)
    found = clock.take()
    assert set(found) == {"forward", "forward stand-ins"}
    assert found["forward stand-ins"] >= 0.02
    assert found["forward"] >= 0.001
    assert clock.take() == {}
