"""What `autopar calibrate` times among ranks: collectives, and how far ranks drift apart.

The collectives are those of a training step: typed, differentiable, packed into one message and
taken apart again (`autopar.runtime.collectives`). What one takes is counted from the moment when
the last member arrives: waiting for it is the members' skew, which is measured by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.lowered import ShardSpec, SwapSpec

from .calibrate_clock import Clock
from .collectives import close, open_
from .group import Group
from .shared_memory import make_group

Sample = tuple[str, float, float]  # key, x (flops or bytes), seconds

KB, MB = 1 << 10, 1 << 20
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
# Smaller messages are single activations, those in between buckets of parameters (25 MiB), larger
# ones single parameters.
BUCKETS = (16 * MB, 32 * MB)
BUCKET_TENSORS = 16
WINDOWS_S = (5e-3, 2e-2, 6e-2)  # of compute between two meetings of the ranks
CALL_S = 0.05  # what a collective may take per round, compute in between left out
NETWORK_S = 0.4  # the same across hosts, at every size
LONGEST_S = 2.0  # larger messages are not timed across hosts, which have their bandwidth by then
OFFSET_TRIPS = 6
SLOWED_S, SLOWED_TIMES = 0.1, 5  # of compute beside an exchange that takes longer
SLOWED_BYTES = (1 << 20, 1 << 26)


def group_sizes(nproc: int) -> list[int]:
    """2, 4, … and all of them."""
    sizes = {1 << i for i in range(1, nproc.bit_length()) if 1 << i <= nproc}
    return sorted(sizes | ({nproc} if nproc > 1 else set()))


@dataclass(frozen=True)
class Team:
    """All disjoint groups of one size, which communicate at once, and this rank's own (or none)."""

    members: tuple[tuple[int, ...], ...]
    group: Group | None


def make_teams(inside: int, hosts: int = 1) -> tuple[dict[int, Team], dict[int, Team]]:
    """By group size: the teams inside hosts of `inside` ranks each, and those across the hosts.

    Groups across hosts have one rank per host: those of equal position.
    """
    starts = range(0, inside * hosts, inside)
    within = {
        size: [
            range(start + first, start + first + size)
            for start in starts
            for first in range(0, inside - size + 1, size)
        ]
        for size in group_sizes(inside)
    }
    across = {
        size: [
            range(first * inside + column, (first + size) * inside, inside)
            for first in range(0, hosts - size + 1, size)
            for column in range(inside)
        ]
        for size in group_sizes(hosts)
    }
    return _teams(within), _teams(across)


def _teams(wanted: dict[int, list[range]]) -> dict[int, Team]:
    made = {}
    for size, every in wanted.items():
        mine = None
        for ranks in every:
            handle = dist.new_group(list(ranks))  # a collective: every rank makes every group
            if dist.get_rank() in ranks:
                mine = make_group(handle)
        made[size] = Team(tuple(tuple(ranks) for ranks in every), mine)
    return made


def collective_call(kind: str, group: Group, nbytes: int) -> Callable[[], Any]:
    """A call, waited for, whose byte count by the convention of cost.comm is `nbytes`."""
    n = group.size
    tensors = BUCKET_TENSORS if BUCKETS[0] <= nbytes <= BUCKETS[1] else 1
    rows = 64 if nbytes >= 64 * KB else 4
    columns = max(nbytes // 4 // tensors // rows // n, 1)
    if kind == "broadcast":
        return partial(_broadcast, group, torch.ones(max(nbytes // 4, 1)))
    if kind == "all_reduce":
        return _typed("psum", None, group, [torch.ones(rows, columns * n)] * tensors)
    if kind == "all_to_all":  # from rows of the whole to columns of the whole
        swap = SwapSpec(_even(0, rows * n, n), _even(1, columns * n, n))
        return _typed("swap", swap, group, [torch.ones(rows, columns * n)] * tensors)
    # Parameters are divided by rows, activations mostly not.
    dim = 0 if nbytes >= BUCKETS[0] else 1
    shape = (rows * n, columns) if dim == 0 else (rows, columns * n)
    spec = _even(dim, shape[dim], n)
    if kind == "reduce_scatter":
        return _typed("scatter_sum", spec, group, [torch.ones(shape)] * tensors)
    shard = torch.ones(shape).chunk(n, dim)[0].contiguous()
    return _typed("gather_vary", spec, group, [shard] * tensors)


def _even(dim: int, size: int, members: int) -> ShardSpec:
    return ShardSpec(dim, (size // members,) * members)


def _typed(name: str, spec: Any, group: Group, tensors: list[Tensor]) -> Callable[[], Any]:
    inputs = [x.clone().requires_grad_() for x in tensors]
    specs = (spec,) * len(inputs)

    def call() -> Any:
        with torch.enable_grad():
            *edges, pending = open_(name, specs, group, *inputs)
            return close(name, specs, group, pending, *edges)

    return call


def _broadcast(group: Group, x: Tensor) -> Tensor:
    return group.broadcast(x).wait()


def run_collectives(clock: Clock, teams: dict[int, Team], sizes: list[int]) -> Iterator[Sample]:
    """Times of every collective in all disjoint groups of each size at once."""
    for size, team in teams.items():
        for kind in KINDS:
            clock.report(f"{kind} among {size}")
            for nbytes in sizes:
                call = collective_call(kind, team.group, nbytes) if team.group else _nothing
                calls = min(max(int(CALL_S / (3e-3 + nbytes / 1e9)), 3), 12)
                seconds = _after_last_arrival(clock.collective(call, calls), team)
                yield f"collective:{kind}:{size}", float(nbytes), seconds


def run_network(clock: Clock, teams: dict[int, Team], sizes: list[int]) -> Iterator[Sample]:
    """The same across hosts, whose clocks differ: up to the size that takes `LONGEST_S`."""
    for size, team in teams.items():
        for kind in KINDS:
            clock.report(f"{kind} among {size} hosts")
            offset_s = clock_offset()
            expected_s = 3e-3
            for nbytes in sizes:
                if expected_s > LONGEST_S:
                    break
                call = collective_call(kind, team.group, nbytes) if team.group else _nothing
                calls = min(max(int(NETWORK_S / expected_s), 1), 6)
                spans = clock.collective(call, calls, warm=expected_s < NETWORK_S)
                there = [(start - offset_s, end - offset_s) for start, end in spans]
                seconds = _after_last_arrival(there, team)
                yield f"network:{kind}:{size}", float(nbytes), seconds
                step = sizes[sizes.index(nbytes) + 1] / nbytes if nbytes < sizes[-1] else 1.0
                expected_s = seconds * step


def run_slowdown(team: Team) -> Iterator[Sample]:
    """How much longer compute takes while the hosts exchange something, as a fraction.

    Key `slowdown`, x the bytes that are exchanged, and the fraction in place of a time.
    """
    group = team.group
    trial = torch.ones(SLOWED_BYTES[0] // 4)
    start = time.perf_counter()
    if group is not None:
        group.all_reduce(trial).wait()
    took = torch.tensor([time.perf_counter() - start])
    dist.all_reduce(took, dist.ReduceOp.MAX)
    more = max(1.0, 4 * SLOWED_S / float(took))
    x = torch.ones(min(int(SLOWED_BYTES[0] * more), SLOWED_BYTES[1]) // 4)
    unit = _unit()
    calls = max(int(SLOWED_S / _seconds(unit, 10)), 1)
    ratios = []
    for _ in range(SLOWED_TIMES):
        dist.barrier()
        alone = _seconds(unit, calls)
        dist.barrier()
        flight = group.all_reduce(x) if group is not None else None
        beside = _seconds(unit, calls)
        if flight is not None:
            flight.wait()
        ratios.append(beside / alone)
    mine = torch.tensor([statistics.median(ratios)], dtype=torch.float64)
    dist.all_reduce(mine)
    yield "slowdown", float(x.nbytes), max(float(mine) / dist.get_world_size() - 1.0, 0.0)


def _unit() -> Callable[[], None]:
    """A millisecond or so of compute, of arithmetic and of memory traffic."""
    x, big = torch.full((384, 384), 1e-3), torch.zeros(1 << 20)

    def unit() -> None:
        torch.mm(x, x)
        big.add_(1.0)

    unit()
    return unit


def _seconds(unit: Callable[[], None], calls: int) -> float:
    """Mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        unit()
    return (time.perf_counter() - start) / calls


def clock_offset() -> float:
    """Seconds by which this rank's clock is ahead of rank 0's; collective.

    Cristian's algorithm: half of the shortest of a few round trips (F. Cristian, "Probabilistic
    clock synchronization", 1989), here of the middle of the trip against rank 0's answer.
    """
    mine, rank = torch.zeros(1, dtype=torch.float64), dist.get_rank()
    for other in range(1, dist.get_world_size()):
        trips = []
        for _ in range(OFFSET_TRIPS):
            stamp = torch.zeros(1, dtype=torch.float64)
            if rank == other:
                start = time.perf_counter()
                dist.send(stamp, 0)
                dist.recv(stamp, 0)
                end = time.perf_counter()
                trips.append((end - start, (start + end) / 2 - float(stamp)))
            elif rank == 0:
                dist.recv(stamp, other)
                stamp.fill_(time.perf_counter())
                dist.send(stamp, other)
        if trips:
            mine.fill_(min(trips)[1])
    return float(mine)


def _nothing() -> None:
    """What a rank does that is in no group."""


def _after_last_arrival(spans: list[tuple[float, float]], team: Team) -> float:
    """Median over calls and groups of: the last end - the last start, by one clock."""
    mine = torch.tensor(spans, dtype=torch.float64)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    ranks = torch.stack(every)  # rank, call, (start, end)
    last = torch.stack([ranks[list(members)].amax(0) for members in team.members])
    return max(float((last[..., 1] - last[..., 0]).median()), 1e-6)


def run_skew(group: Group, windows: int) -> Iterator[Sample]:
    """How much longer than ranks do on average the last one computes, between two meetings.

    Key `skew`, x the window's seconds, and the fraction in place of a time.
    """
    token, unit = torch.ones(8), _unit()
    each = torch.tensor([_seconds(unit, 20)], dtype=torch.float64)
    dist.all_reduce(each)
    unit_s = float(each) / dist.get_world_size()
    for window in WINDOWS_S:
        spans = []
        for _ in range(windows):
            group.all_reduce(token).wait()
            start = time.perf_counter()
            for _ in range(max(int(window / unit_s), 1)):
                unit()
            spans.append(time.perf_counter() - start)
        mine = torch.tensor(spans, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        ranks = torch.stack(every)
        yield "skew", window, float((ranks.amax(0) / ranks.mean(0)).median()) - 1.0
