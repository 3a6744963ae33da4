"""Reductions as int8: the same on all members, near the exact sum, and small tensors as they are."""

from __future__ import annotations

import os
import queue
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from autopar.ir.lowered import ShardSpec
from autopar.runtime.collectives import close, open_
from autopar.runtime.compressed import SMALLEST, CompressedGroup
from autopar.runtime.group import Group, ProcessGroupGroup
from autopar.runtime.kernels.int8 import BLOCK, UNIT
from autopar.runtime.shared_memory import make_group
from autopar.runtime.thread_world import ThreadGroup, ThreadWorld, run_threads
from autopar.runtime.two_level import TwoLevelGroup

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def part(rank: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(rank)).to(dtype)


def bound(parts: list[Tensor]) -> float:
    """Half a scale of every member's block, and half a scale of the sum's, at most."""
    tops = [float(p.abs().max()) for p in (*parts, sum(parts[1:], parts[0]))]
    slack = torch.finfo(parts[0].dtype).eps * tops[-1]
    return sum(tops) / 127 * 0.51 + slack


def check(group: Group, size: int, rank: int, dtype: torch.dtype, n: int) -> Tensor:
    """An all-reduce and a reduce-scatter of n elements; what the all-reduce gave."""
    parts = [part(r, n, dtype) for r in range(size)]
    exact = torch.stack(parts).double().sum(0)
    squeezed = CompressedGroup(group)
    total = squeezed.all_reduce(parts[rank]).wait()
    assert total.dtype == dtype and total.shape == parts[rank].shape
    if n:
        assert float((total.double() - exact).abs().max()) <= bound(parts)
    lengths = [n // size + (r < n % size) for r in range(size)]
    mine = squeezed.reduce_scatter(parts[rank], lengths).wait()
    wanted = exact.split_with_sizes(lengths)[rank]
    assert mine.dtype == dtype and mine.shape == wanted.shape
    if mine.numel():
        assert float((mine.double() - wanted).abs().max()) <= bound(parts)
    return total


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("n", [1, BLOCK - 1, 2 * UNIT, 9001])
def test_sums(size: int, n: int) -> None:
    world = ThreadWorld(size)
    for dtype in DTYPES:
        found = run_threads(world, lambda r, d=dtype: check(world.group(r), size, r, d, n))
        for other in found[1:]:
            assert torch.equal(found[0], other)


class Watched(ThreadGroup):
    """Counts the bytes that this member hands over, by collective."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        super().__init__(world, tuple(range(world.size)), rank, "")
        self.sent: list[tuple[str, int]] = []

    def _exchange(self, call: Any, value: Any, finish: Any) -> Tensor:
        tensors = value if isinstance(value, tuple) else (value,)
        self.sent.append((call[0], sum(t.nbytes for t in tensors)))
        return super()._exchange(call, value, finish)


def step(group: Group, rank: int, kernel: str | None) -> list[Tensor]:
    """Gradients of three parameters, one of them divided, after `kernel` has summed them."""
    shapes = ((96, 64), (64,), (16, 16))
    leaves = [torch.ones(s, requires_grad=True) for s in shapes]
    *edges, pending = open_("pvary", (None,) * 3, group, *leaves, kernel=kernel)
    outputs = list(close("pvary", (None,) * 3, group, pending, *edges))
    spec = ShardSpec(0, (40, 24))
    shard = torch.ones(spec.lengths[group.rank], 128, requires_grad=True)
    *edges, pending = open_("gather_vary", (spec,), group, shard, kernel=kernel)
    outputs += close("gather_vary", (spec,), group, pending, *edges)
    weights = [part(10 * rank + i, y.numel()).view(y.shape) for i, y in enumerate(outputs)]
    loss = sum(((y * w).sum() for y, w in zip(outputs, weights, strict=True)), torch.zeros(()))
    loss.backward()
    return [x.grad for x in (*leaves, shard) if x.grad is not None]


def test_gradients_of_large_parameters_alone() -> None:
    world = ThreadWorld(2)
    groups = [Watched(world, r) for r in range(2)]
    plain = run_threads(world, lambda r: step(groups[r], r, None))
    sent = [g.sent.copy() for g in groups]
    for g in groups:
        g.sent.clear()
    squeezed = run_threads(world, lambda r: step(groups[r], r, "int8"))
    for exact, near in zip(plain, squeezed, strict=True):
        large, bias, small, shard = (torch.equal(a, b) for a, b in zip(exact, near, strict=True))
        assert (large, bias, small, shard) == (False, True, True, False)
        for a, b in zip(exact, near, strict=True):
            assert float((a - b).norm() / a.norm()) < 0.01
    for i in (0, 1, 2):
        assert torch.equal(squeezed[0][i], squeezed[1][i])
    assert 96 * 64 >= SMALLEST > 16 * 16
    by_kind = [
        [nbytes for kind, nbytes in s if kind != "all_gather"] for s in (sent[0], groups[0].sent)
    ]
    assert max(by_kind[1]) < 0.5 * max(by_kind[0])


def test_overflow_reaches_all_members() -> None:
    world = ThreadWorld(2)

    def program(rank: int) -> Tensor:
        x = part(rank, UNIT)
        if rank == 1:
            x[7] = float("inf")
        return CompressedGroup(world.group(rank)).all_reduce(x).wait()

    for total in run_threads(world, program):
        assert not bool(total[:BLOCK].isfinite().any()) and bool(total[BLOCK:].isfinite().all())


def test_what_is_not_a_sum_of_floats_is_exact() -> None:
    world = ThreadWorld(2)

    def program(rank: int) -> None:
        group = CompressedGroup(world.group(rank))
        whole = torch.arange(9000) * (rank + 1)
        assert torch.equal(group.all_reduce(whole).wait(), torch.arange(9000) * 3)
        top = torch.maximum(part(0, 9000), part(1, 9000))
        assert torch.equal(group.all_reduce(part(rank, 9000), "max").wait(), top)
        assert torch.equal(group.broadcast(part(rank, 9), 1).wait(), part(1, 9))

    run_threads(world, program)


def _member(rank: int, port: int, hosts: str, errors: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    size = len(hosts)
    try:
        if len(set(hosts)) > 1:
            os.environ["AUTOPAR_HOST"] = hosts[rank]
        dist.init_process_group("gloo", rank=rank, world_size=size)
        group: Any = make_group() if len(set(hosts)) > 1 else ProcessGroupGroup()
        assert isinstance(group, TwoLevelGroup if len(set(hosts)) > 1 else ProcessGroupGroup)
        for n in (1, 9001, 100_000):
            for dtype in DTYPES:
                total = check(group, size, rank, dtype, n)
                of_all = ProcessGroupGroup().all_gather(total[None]).wait()
                assert all(torch.equal(of_all[0], other) for other in of_all)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        errors.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise


@pytest.mark.multiprocess
@pytest.mark.parametrize("hosts", ["aa", "aabb"])
def test_real_processes(hosts: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    errors = context.Queue()
    ranks = [
        context.Process(target=_member, args=(r, port, hosts, errors), daemon=True)
        for r in range(len(hosts))
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    found = []
    while True:
        try:
            found.append(errors.get(timeout=0.1))
        except queue.Empty:
            break
    for process in ranks:
        if process.is_alive():
            process.kill()
            found.append("a rank hangs")
    assert not found and all(p.exitcode == 0 for p in ranks), found
