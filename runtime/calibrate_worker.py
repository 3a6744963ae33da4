"""One rank of `autopar calibrate`: times ops and collectives while every other rank does the same.

Run as `python -m autopar.runtime.calibrate_worker JOB.json`; `calibrate` writes the job and reads
rank 0's standard output, one JSON object per line: progress, then the results.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from autopar.runtime.group import Group
from autopar.runtime.random import keep_mask, whole
from autopar.runtime.shared_memory import make_group

aten = torch.ops.aten
Sample = tuple[str, float, float]  # key, x (flops or bytes), seconds

KB, MB = 1 << 10, 1 << 20
MATMUL_SHAPES = [  # m, k, n: no dim below 128
    (128, 128, 128),
    (128, 256, 512),
    (256, 512, 512),
    (512, 512, 512),
    (512, 512, 2048),
    (1024, 1024, 1024),
    (2048, 512, 2048),
    (2048, 2048, 2048),
]
NARROW = (1, 2, 4, 8, 16, 32, 64, 128)
SKINNY = [(8, n, n) for n in (128, 256, 512, 1024, 2048, 4096)] + [(8, 4096, 16384)]
CONVS = [  # batch, channels in, channels out, height and width, kernel
    (2, 16, 16, 16, 3),
    (2, 64, 64, 16, 3),
    (8, 3, 32, 32, 3),
    (8, 32, 32, 32, 3),
    (8, 64, 64, 32, 3),
    (8, 128, 128, 16, 3),
    (8, 64, 128, 16, 1),
    (32, 64, 64, 32, 3),
]
ATTENTION = [(1, 4, 64, 64), (4, 8, 128, 64), (16, 8, 128, 64), (2, 8, 512, 64), (2, 8, 1024, 64)]


SPOIL_BYTES = 16 * MB  # per rank: together more than the last level of cache


class Work(NamedTuple):
    """What to time: `x` is its flops or bytes; one call of `fn` does that `times` times."""

    key: str
    x: float
    fn: Callable[[], Any]
    times: int = 1


class Clock:
    """Times callables for a fixed span of time, all ranks at once, as they run in training.

    There an op seldom finds its inputs in the cache, and the members of a collective seldom arrive
    together: before every timed call the rank walks through `SPOIL_BYTES` of other memory, and
    before a collective it computes for a few milliseconds, so that what a collective takes includes
    waiting for the slowest rank.
    """

    def __init__(self, seconds: float, ranks: int, report: Callable[[str], None]) -> None:
        self.seconds, self.ranks, self.report = seconds, ranks, report
        self._spoiler = torch.zeros(SPOIL_BYTES // 4)
        self._factor = torch.full((384, 384), 1e-3)

    def __call__(self, fn: Callable[[], Any], collective: bool = False, cold: bool = True) -> float:
        """Median seconds of one call. A collective runs as often on every rank."""
        before = self._compute if collective else self._spoil if cold else _nothing
        fn()
        before()
        if self.ranks > 1:
            dist.barrier()
        start = time.perf_counter()
        fn()
        before()
        first = time.perf_counter() - start
        budget = self.seconds
        if collective:  # all must agree on the count: the slowest rank's figure
            agreed = torch.tensor([first])
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
            first = float(agreed[0])
        calls = min(max(int(budget / max(first, 1e-7)), 3), 100)
        times: list[float] = []
        for _ in range(calls):
            before()
            start = time.perf_counter()
            fn()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _spoil(self) -> None:
        self._spoiler.add_(1.0)

    def _compute(self) -> None:
        self._spoil()
        for _ in range(2):
            torch.mm(self._factor, self._factor)


def matmul_work(quick: bool) -> Iterator[Work]:
    """Square-ish products per dtype, then products with one narrow dim, then skinny ones."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for m, k, n in MATMUL_SHAPES[:: 3 if quick or dtype != torch.float32 else 1]:
            x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            yield Work(f"matmul:{name}", 2.0 * m * k * n, partial(F.linear, x, w))
    for d in NARROW:
        for m, k, n in ((d, 512, 512), (512, d, 512), (512, 512, d))[: 1 if quick else 3]:
            x, w = torch.randn(m, k), torch.randn(n, k)
            yield Work(f"narrow:{d}", 2.0 * m * k * n, partial(F.linear, x, w))
    for m, k, n in SKINNY[:: 2 if quick else 1]:
        x, w = torch.randn(m, k), torch.randn(n, k)
        yield Work("bandwidth:matmul", 4.0 * (m * k + k * n + m * n), partial(F.linear, x, w))


def conv_work(quick: bool) -> Iterator[Work]:
    """Convolutions and attention, forward and backward."""
    for b, c, d, size, kernel in CONVS[:: 3 if quick else 1]:
        x, w = torch.randn(b, c, size, size), torch.randn(d, c, kernel, kernel)
        pad, flops = kernel // 2, 2.0 * b * d * size * size * c * kernel * kernel
        yield Work("conv:float32", flops, partial(F.conv2d, x, w, padding=pad))
        where = ([1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [True, True, False])
        g = torch.randn(b, d, size, size)
        backward = partial(aten.convolution_backward, g, x, w, None, *where)
        yield Work("conv_backward:float32", flops, backward, times=2)
    for b, h, length, e in ATTENTION[:: 2 if quick else 1]:
        q, k, v, g = (torch.randn(b, h, length, e) for _ in range(4))
        flops = 4.0 * b * h * length * length * e
        forward = partial(aten._scaled_dot_product_flash_attention_for_cpu, q, k, v)
        out, stats = forward()
        yield Work("attention:float32", flops, forward)
        backward = partial(
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
            *(g, q, k, v, out, stats, 0.0, False),
        )
        yield Work("attention_backward:float32", 2.5 * flops, backward)


def memory_work(sizes: list[int]) -> Iterator[Work]:
    """Memory-bound ops over tensors of `sizes` bytes; x counts bytes as cost.compute does."""
    for size in sizes:
        yield from _row_work(max(size // 4 // 512, 1), 512)
        yield from _image_work(max(size // 4 // (8 * 32 * 32), 1))
        yield from _embedding_work(max(size // 4 // 64, 16), 64)
        p, g, m, v = (torch.rand(max(size // 4, 1)) for _ in range(4))
        step = partial(
            torch._fused_adamw_,
            *([p], [g], [m], [v], [], [torch.tensor(5.0)]),
            lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.01, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        yield Work("bandwidth:adamw", 7.0 * p.nbytes, step)


def _row_work(rows: int, width: int) -> Iterator[Work]:
    """Pointwise ops, reductions and normalisations of a matrix, and their backward kernels."""
    x, y = torch.randn(rows, width), torch.randn(rows, width)
    w, b = torch.ones(width), torch.zeros(width)
    one = float(x.nbytes)
    yield Work("bandwidth:pointwise", 3 * one, partial(torch.add, x, y))
    yield Work("bandwidth:copy", 2 * one, x.clone)
    yield Work("bandwidth:reduction", one, partial(torch.sum, x, 0))
    yield Work("bandwidth:transcendental", 2 * one, partial(F.gelu, x))
    yield Work("bandwidth:transcendental_backward", 3 * one, partial(aten.gelu_backward, y, x))
    yield Work("bandwidth:softmax", 2 * one, partial(torch.softmax, x, -1))
    probabilities = torch.softmax(x, -1)
    backward = partial(aten._softmax_backward_data, y, probabilities, -1, torch.float32)
    yield Work("bandwidth:softmax_backward", 3 * one, backward)
    yield Work("bandwidth:norm", 2 * one, partial(F.layer_norm, x, (width,), w, b))
    _, mean, scale = aten.native_layer_norm(x, [width], w, b, 1e-5)
    backward = partial(
        aten.native_layer_norm_backward, y, x, [width], mean, scale, w, b, [True, True, True]
    )
    yield Work("bandwidth:norm_backward", 3 * one, backward)
    backward = partial(aten.native_dropout_backward, y, torch.rand_like(x) > 0.1, 1.1)
    region = whole((rows, width))

    def dropout() -> torch.Tensor:
        kept: torch.Tensor = aten.native_dropout_backward(x, keep_mask(0.1, 1, 2, region), 1.1)
        return kept

    yield Work("bandwidth:dropout", 2.25 * one, dropout)
    yield Work("bandwidth:dropout_backward", 2.25 * one, backward)


def _image_work(channels: int) -> Iterator[Work]:
    """Batch statistics and pooling of 8 images of 32 x 32."""
    image, g = torch.randn(8, channels, 32, 32), torch.randn(8, channels, 32, 32)
    mean, var, w, b = (torch.ones(channels) for _ in range(4))
    one = float(image.nbytes)
    forward = partial(aten.native_batch_norm, image, w, b, mean, var, True, 0.1, 1e-5)
    _, save_mean, save_scale = forward()
    yield Work("bandwidth:batch_norm", 2 * one, forward)
    backward = partial(
        aten.native_batch_norm_backward,
        *(g, image, w, mean, var, save_mean, save_scale, True, 1e-5, [True, True, True]),
    )
    yield Work("bandwidth:batch_norm_backward", 3 * one, backward)
    forward = partial(aten.max_pool2d_with_indices, image, [2, 2])
    pooled, places = forward()
    yield Work("bandwidth:pool", 1.25 * one, forward)
    where = ([2, 2], [2, 2], [0, 0], [1, 1], False, places)
    backward = partial(aten.max_pool2d_with_indices_backward, pooled, image, *where)
    yield Work("bandwidth:pool_backward", 1.25 * one, backward)


def _embedding_work(rows: int, width: int) -> Iterator[Work]:
    """The lookup of a sixteenth of a table's rows, and the table's dense gradient."""
    table, ids = torch.randn(rows, width), torch.randint(0, rows, (max(rows // 16, 16),))
    found = F.embedding(ids, table)
    one = float(found.nbytes)
    yield Work("bandwidth:embedding", ids.nbytes + 2 * one, partial(F.embedding, ids, table))
    backward = partial(aten.embedding_dense_backward, found, ids, rows, -1, False)
    yield Work("bandwidth:embedding_backward", table.nbytes + 3 * one, backward)


def overhead_work() -> Iterator[Work]:
    """An op on a few elements with autograd on: dispatch, graph node, allocation."""
    x = torch.randn(8, 8, requires_grad=True)
    y = torch.randn(8, 8, requires_grad=True)

    def hundred() -> None:
        with torch.enable_grad():
            for _ in range(100):
                x * y

    yield Work("overhead", 1.0, hundred, times=100)


def compute_work(quick: bool) -> Iterator[Work]:
    """Everything that needs no other rank."""
    yield from overhead_work()
    yield from matmul_work(quick)
    yield from conv_work(quick)
    sizes = [64 * KB, MB, 32 * MB] if quick else [16 * KB, 128 * KB, MB, 4 * MB, 16 * MB, 64 * MB]
    yield from memory_work(sizes)


def group_sizes(nproc: int) -> list[int]:
    """2, 4, … and all of them."""
    sizes = {1 << i for i in range(1, nproc.bit_length()) if 1 << i <= nproc}
    return sorted(sizes | ({nproc} if nproc > 1 else set()))


def collective_call(kind: str, group: Group, nbytes: int) -> Callable[[], Any]:
    """A call, waited for, whose byte count by the convention of cost.comm is `nbytes`."""
    members = group.size
    n = max(nbytes // 4 // members, 1)
    whole = torch.ones(members, n)
    splits = [1] * members
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: group.all_reduce(whole).wait(),
        "all_gather": lambda: group.all_gather(whole[:1]).wait(),
        "reduce_scatter": lambda: group.reduce_scatter(whole).wait(),
        "all_to_all": lambda: group.all_to_all(whole, splits, splits).wait(),
        "broadcast": lambda: group.broadcast(whole).wait(),
    }
    return calls[kind]


def _nothing() -> None:
    """What a rank does that is in no group."""


def run_collectives(clock: Clock, nproc: int, sizes: list[int]) -> list[Sample]:
    """Times of every collective in all disjoint groups of each size at once."""
    rank = dist.get_rank()
    found: list[Sample] = []
    for members in group_sizes(nproc):
        mine: Group | None = None
        for first in range(0, nproc - members + 1, members):
            ranks = list(range(first, first + members))
            handle = dist.new_group(ranks)  # a collective: every rank makes every group
            if rank in ranks:
                mine = make_group(handle)
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
            clock.report(f"{kind} among {members}")
            for nbytes in sizes:
                call = collective_call(kind, mine, nbytes) if mine else _nothing
                seconds = clock(call, collective=True)
                found.append((f"collective:{kind}:{members}", float(nbytes), seconds))
    return found


def measure(clock: Clock, nproc: int, quick: bool) -> list[Sample]:
    """One round: (key, flops or bytes, seconds) of everything."""
    found: list[Sample] = []
    for work in compute_work(quick):
        clock.report(work.key.removeprefix("bandwidth:"))
        seconds = clock(work.fn, cold=work.key != "overhead")
        found.append((work.key, work.x, seconds / work.times))
    if nproc > 1:
        sizes = [KB, 64 * KB, MB, 16 * MB]
        if not quick:
            sizes = [KB, 8 * KB, 64 * KB, 256 * KB, MB, 4 * MB, 16 * MB, 64 * MB]
        found += run_collectives(clock, nproc, sizes)
    return found


def main(path: str) -> None:
    """Run one rank's job and, on rank 0, print the medians over ranks."""
    job = json.loads(Path(path).read_text())
    rank, nproc, quick = job["rank"], job["nproc"], job["quick"]
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    torch.manual_seed(rank)

    def report(what: str) -> None:
        if rank == 0:
            print(json.dumps({"progress": what}), flush=True)

    if nproc > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{job['store']}", rank=rank, world_size=nproc
        )
    found = measure(Clock(0.02 if quick else 0.04, nproc, report), nproc, quick)
    if not quick:  # a burst of foreign load spoils one round, seldom both
        again = measure(Clock(0.04, nproc, report), nproc, quick)
        found = [(k, x, min(s, t)) for (k, x, s), (_, _, t) in zip(found, again, strict=True)]
    if nproc > 1:
        times = torch.tensor([seconds for _, _, seconds in found], dtype=torch.float64)
        every = [torch.empty_like(times) for _ in range(nproc)]
        dist.all_gather(every, times)
        middle = torch.stack(every).quantile(0.5, dim=0).tolist()
        found = [(key, x, t) for (key, x, _), t in zip(found, middle, strict=True)]
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        print(json.dumps({"results": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
