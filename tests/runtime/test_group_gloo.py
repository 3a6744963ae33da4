"""The group primitives and the collectives on four real processes: gloo, and shared memory."""

from __future__ import annotations

import os
import queue
import socket
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from autopar.errors import UserError
from autopar.ir.lowered import ShardSpec
from autopar.runtime.calibrate_clock import Clock
from autopar.runtime.calibrate_collectives import (
    KINDS,
    clock_offset,
    make_teams,
    run_collectives,
    run_network,
)
from autopar.runtime.collectives import apply, close, open_
from autopar.runtime.group import SMALL_ALL_REDUCE_BYTES, Group, ProcessGroupGroup
from autopar.runtime.hosts import ranks_per_host
from autopar.runtime.shared_memory import (
    ONE_ROUND_BYTES,
    SLOTS,
    SharedMemoryGroup,
    make_group,
)
from autopar.runtime.two_level import TwoLevelGroup

WORLD = 4
HOSTS = {"two hosts": (0, 0, 1, 1), "four hosts": (0, 1, 2, 3)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, so that sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 4, shape, generator=generator).to(dtype)


def check_primitives(group: Group, n: int, rank: int) -> None:
    for dtype in (*DTYPES, torch.complex64):
        everyone = [value(r, (8, 3), dtype) for r in range(n)]
        x = everyone[rank].clone()
        stack = torch.stack(everyone)
        if dtype != torch.bool:
            assert torch.equal(group.all_reduce(x).wait(), stack.sum(0)), dtype
        if dtype != torch.complex64:
            assert torch.equal(group.all_reduce(x, "max").wait(), stack.amax(0)), dtype
            assert torch.equal(group.all_reduce(x, "min").wait(), stack.amin(0)), dtype
        assert torch.equal(group.wait(group.all_gather(x)), torch.cat(everyone)), dtype
        sizes = [3, 0, 8, 1][:n]
        cut = [e[:size] for e, size in zip(everyone, sizes, strict=True)]
        assert torch.equal(group.all_gather(cut[rank], sizes).wait(), torch.cat(cut)), dtype
        in_splits = [[1, 2, 2, 3][(r + i) % 4] for i in range(n) for r in [rank]]
        out_splits = [[1, 2, 2, 3][(r + rank) % 4] for r in range(n)]
        in_splits[-1] += 8 - sum(in_splits)
        if n == 4:
            pieces = [
                e.split([[1, 2, 2, 3][(r + i) % 4] for i in range(n)])[rank]
                for r, e in enumerate(everyone)
            ]
            got = group.all_to_all(x, out_splits, in_splits).wait()
            assert torch.equal(got, torch.cat(pieces)), dtype
        for source in range(n):
            assert torch.equal(group.broadcast(x, source).wait(), everyone[source]), dtype
        assert torch.equal(x, everyone[rank]), "an input was overwritten"
        if dtype == torch.bool:
            continue
        total = stack.sum(0)
        assert torch.equal(group.reduce_scatter(x).wait(), total.chunk(n)[rank]), dtype
        sizes = [2, 0, 5, 1] if n == 4 else [7, 1]
        assert torch.equal(group.reduce_scatter(x, sizes).wait(), total.split(sizes)[rank]), dtype
        assert torch.equal(x, everyone[rank]), "an input was overwritten"


def check_all_reduce_sizes(group: Group, n: int, rank: int) -> None:
    limit = SMALL_ALL_REDUCE_BYTES // (4 * n)
    for numel in (0, 1, limit, limit + 1, ONE_ROUND_BYTES // 4 + 1, 300_001):
        for in_place in (False, True):
            x = torch.full((numel,), float(rank))
            y = group.all_reduce(x, in_place=in_place).wait()
            assert torch.equal(y, torch.full((numel,), n * (n - 1) / 2))
            assert in_place or torch.equal(x, torch.full((numel,), float(rank)))


def check_many_in_flight(group: Group, n: int, rank: int) -> None:
    """Waiting in another order than issuing, gathers of many sizes among other operations."""
    flights: list[Any] = []
    for i in range(20):
        flights.append((i, group.all_gather(torch.full((i * 100,), float(rank + i)))))
        flights.append((i, group.all_reduce(torch.full((i * 5000,), float(rank + i)))))
    for i, flight in reversed(flights):
        y = flight.wait()
        assert flight.wait() is y
        total = sum(range(n)) + i * n
        if y.numel() == i * 100 * n:
            expected = torch.cat([torch.full((i * 100,), float(r + i)) for r in range(n)])
            assert torch.equal(y, expected)
        else:
            assert torch.equal(y, torch.full((i * 5000,), float(total)))


def check_collectives(group: Group, n: int, rank: int) -> None:
    spec = ShardSpec(1, (2,) * (n - 1) + (1,), 2, 1)
    full = torch.arange(3 * spec.size, dtype=torch.float64).view(3, -1)
    local = apply("slice_vary", spec, group, full)
    xs = [local.clone().requires_grad_(), torch.ones(5, requires_grad=True)]
    *edges, pending = open_("gather_vary", [spec, ShardSpec(0, (5,) * n)], group, *xs)
    ys = close("gather_vary", [spec, ShardSpec(0, (5,) * n)], group, pending, *edges)
    assert torch.equal(ys[0], full)
    (ys[0].sum() * (rank + 1) + ys[1].sum()).backward()
    assert torch.equal(xs[0].grad, torch.full_like(local, n * (n + 1) / 2))
    assert torch.equal(xs[1].grad, torch.full((5,), float(n)))


def check_slots_are_used_again(group: Group, n: int, rank: int) -> None:
    """More operations than slots, one of them waited for only at the end."""
    early = group.all_gather(torch.full((3,), float(rank)))
    for i in range(SLOTS - 2):
        assert float(group.all_reduce(torch.tensor([float(i)])).wait()) == i * n
    assert torch.equal(early.wait(), torch.arange(float(n)).repeat_interleave(3))
    for i in range(SLOTS):
        assert float(group.all_reduce(torch.tensor([float(i)])).wait()) == i * n


def check_calibration(rank: int) -> None:
    """Both levels of two hosts of two ranks are timed, by one clock."""
    within, across = make_teams(2, 2)
    assert {size: team.members for size, team in within.items()} == {2: ((0, 1), (2, 3))}
    assert {size: team.members for size, team in across.items()} == {2: ((0, 2), (1, 3))}
    assert isinstance(within[2].group, SharedMemoryGroup)
    assert isinstance(across[2].group, TwoLevelGroup)
    assert abs(clock_offset()) < 0.01, "these hosts have one clock"
    clock = Clock(0.0, 4, lambda _: None)
    inside = list(run_collectives(clock, within, [1 << 10]))
    between = list(run_network(clock, across, [1 << 10, 1 << 14]))
    assert [key for key, _, _ in inside] == [f"collective:{kind}:2" for kind in KINDS]
    assert {key for key, _, _ in between} == {f"network:{kind}:2" for kind in KINDS}
    assert all(0 < seconds < 5 for _, _, seconds in (*inside, *between))


def worker(rank: int, port: int, kind: str, answers: Any) -> None:
    try:
        torch.set_num_threads(1)
        shared = kind == "shared memory"
        if kind in HOSTS:
            os.environ["AUTOPAR_HOST"] = f"host {HOSTS[kind][rank]}"
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
        )
        halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        make: Any = ProcessGroupGroup if kind == "gloo" else make_group
        world: Group = make()
        half: Group = make(halves[rank % 2])
        assert isinstance(world, SharedMemoryGroup) == shared
        if kind in HOSTS:
            assert isinstance(world, TwoLevelGroup)
            assert (world.hosts, world.inside) == (len(set(HOSTS[kind])), HOSTS[kind].count(0))
            assert isinstance(half, TwoLevelGroup)
        if shared:
            check_slots_are_used_again(world, 4, rank)
        assert (world.size, world.rank, half.size, half.rank) == (4, rank, 2, rank // 2)
        check_primitives(world, 4, rank)
        check_all_reduce_sizes(world, 4, rank)
        check_many_in_flight(world, 4, rank)
        check_collectives(world, 4, rank)
        check_all_reduce_sizes(half, 2, rank // 2)
        check_many_in_flight(half, 2, rank // 2)
        check_collectives(half, 2, rank // 2)
        if kind == "two hosts":
            check_calibration(rank)
            assert ranks_per_host() == 2
            for hosts, told in (("abbb", "different numbers"), ("abab", "follow each other")):
                os.environ["AUTOPAR_HOST"] = hosts[rank]
                with pytest.raises(UserError, match=told):
                    ranks_per_host()
        dist.barrier()
        dist.destroy_process_group()
        answers.put((rank, ""))
    except BaseException:
        answers.put((rank, traceback.format_exc()))


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["gloo", "shared memory", *HOSTS])
def test_four_processes(kind: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.Queue()
    saved = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    processes = [
        context.Process(target=worker, args=(rank, port, kind, answers), daemon=True)
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            process.start()
        for _ in range(WORLD):
            rank, error = answers.get(timeout=60)
            assert not error, f"rank {rank}: {error}"
    except queue.Empty:
        raise AssertionError("gloo processes did not answer within 60 s") from None
    finally:
        for process in processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
        if saved is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = saved
