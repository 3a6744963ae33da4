"""Step time of pipelines in the ordinary loop against a program written for them by hand.

    python -m benchmarks.pipelines [--schedules 1f1b zero_bubble] [--rounds 7] [--steps 4]

The GPT of the speed benchmark in four stages on 4 gloo ranks of one thread each: autopar under a
plan with these cuts, and `torch.distributed.pipelining` with a module per stage, cut at the same
places, with the same schedule, micro-batches and optimizer. Both live in the same processes and
take turns of a few steps, so that what else the machine does slows down both; the ratio of the
medians is what to read. The losses of both have to agree.
"""

import argparse
import json
import multiprocessing as mp
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from autopar.runtime.children import exit_on_termination

from .models import GPT, MODELS
from .workers import MALLOC, RANKS

LAYERS = 6
# Pieces by the blocks that they begin with (LAYERS: the last norm and the head); embeddings first.
STARTS = {"1f1b": (2, 4, 6), "gpipe": (2, 4, 6), "zero_bubble": (2, 4, 6)}
INTERLEAVED = (0, 1, 2, 3, 4, 5, 6)
MICRO_BATCHES = 8
LOSS_TOLERANCE = 5e-5


class Piece(nn.Module):
    """Blocks `first` up to `last` of a GPT; the embeddings before the first, the head after all."""

    def __init__(self, model: GPT, first: int | None, last: int) -> None:
        super().__init__()
        self.tokens = model.tokens if first is None else None
        self.positions = model.positions if first is None else None
        self.blocks = model.blocks[first or 0 : last]
        ends = last > LAYERS
        self.norm = model.norm if ends else None
        self.head = model.head if ends else None

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is not None and self.positions is not None:
            x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class ByHand:
    """This rank's stages and their schedule, written for it."""

    def __init__(self, schedule: str, batch: tuple[Tensor, Tensor]) -> None:
        from torch.distributed import pipelining

        del batch
        starts = INTERLEAVED if schedule == "interleaved" else STARTS[schedule]
        bounds: list[Any] = [None, *starts, LAYERS + 1]
        torch.manual_seed(0)
        model = GPT()
        self.rank, count = dist.get_rank(), len(starts) + 1
        device = torch.device("cpu")
        stages = [
            pipelining.PipelineStage(
                Piece(model, bounds[i], bounds[i + 1]), i, count, device, group=dist.group.WORLD
            )
            for i in range(self.rank, count, RANKS)
        ]
        self.is_last = stages[-1].is_last
        kinds: dict[str, Any] = {
            "gpipe": pipelining.ScheduleGPipe,
            "1f1b": pipelining.Schedule1F1B,
            "interleaved": pipelining.ScheduleInterleaved1F1B,
            "zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
        }
        single = schedule in ("gpipe", "1f1b")
        self.schedule = kinds[schedule](
            stages[0] if single else stages, MICRO_BATCHES, loss_fn=token_loss
        )
        parameters = [p for stage in stages for p in stage.submod.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(self, batch: tuple[Tensor, Tensor]) -> float:
        """One training step; the loss on the last rank, 0 elsewhere."""
        ids, targets = batch
        losses: list[Tensor] = []
        inputs = (ids,) if self.rank == 0 else ()
        kwargs = {"target": targets, "losses": losses} if self.is_last else {}
        self.schedule.step(*inputs, **kwargs, return_outputs=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(torch.stack([x.detach() for x in losses]).mean()) if losses else 0.0


class InLoop:
    """The ordinary loop under a plan with the same cuts."""

    def __init__(self, schedule: str, batch: tuple[Tensor, Tensor]) -> None:
        import autopar

        plan = plan_with(GPT(), schedule, batch)
        torch.manual_seed(0)
        self.model = autopar.parallelize(GPT(), plan=plan)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, batch: tuple[Tensor, Tensor]) -> float:
        """One training step and its loss."""
        loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def plan_with(model: nn.Module, schedule: str, batch: tuple[Tensor, Tensor]) -> Any:
    """A plan of `RANKS` stages of one device each, cut before the blocks' first norms."""
    from autopar.capture import capture
    from autopar.ir.mesh import Mesh
    from autopar.ir.sharding import Sharding
    from autopar.passes.pipeline_plan import with_pipeline
    from autopar.passes.prepare import prepare
    from autopar.plan import Plan, Prediction, Storage

    captured = capture(model, batch, {})
    graph = prepare(captured.graph)
    params = {
        n.meta["fqns"][0]: Storage(str(Sharding.replicated(n.meta["value"].rank)))
        for n in graph.placeholders("param")
    }
    nothing = Prediction(0.0, 0.0, 0.0, 0.0, 0)
    flat = Plan(captured.fingerprint, Mesh(()), "cpu:1", "auto", {}, params, nothing)
    norms = [n.name for n in graph.calls() if n.target is torch.ops.aten.layer_norm.default]
    starts = INTERLEAVED if schedule == "interleaved" else STARTS[schedule]
    cuts = [norms[2 * block] for block in starts]
    return with_pipeline(flat, graph, RANKS, cuts, MICRO_BATCHES, schedule)


@dataclass(frozen=True)
class Result:
    """Seconds per step of both (the slowest rank's medians over all rounds), and their ratio."""

    schedule: str
    by_hand_s: float
    in_loop_s: float
    ratio: float
    ratios: list[float]
    loss_error: float
    load: float


def measure(schedule: str, rounds: int, steps: int) -> Result:
    """Run both in turns on `RANKS` processes."""
    context = mp.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    pipes: list[Connection] = []
    processes = []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        variables = {
            **MALLOC,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        process = context.Process(target=_work, args=(theirs, schedule, rounds, steps), daemon=True)
        with mock.patch.dict(os.environ, variables):
            process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        with exit_on_termination():
            answers = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for answer in answers:
        if isinstance(answer, str):
            raise RuntimeError(answer)
    times = {
        name: [max(a[name][i] for a in answers) for i in range(rounds * steps)]
        for name in ("hand", "loop")
    }
    rounds_of = {
        name: [statistics.median(t[i * steps : (i + 1) * steps]) for i in range(rounds)]
        for name, t in times.items()
    }
    hand, loop = (statistics.median(times[name]) for name in ("hand", "loop"))
    ratios = [b / a for a, b in zip(rounds_of["hand"], rounds_of["loop"], strict=True)]
    losses = [
        (max(a["hand losses"][i] for a in answers), answers[0]["loop losses"][i]) for i in (0, 1)
    ]
    error = max(abs(a - b) / abs(a) for a, b in losses)
    return Result(schedule, hand, loop, loop / hand, ratios, error, os.getloadavg()[0])


def _work(pipe: Connection, schedule: str, rounds: int, steps: int) -> None:
    try:
        pipe.send(_turns(schedule, rounds, steps))
    except BaseException:
        pipe.send(traceback.format_exc()[-3000:])


def _turns(schedule: str, rounds: int, steps: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batches = [MODELS["gpt"].batch(torch.Generator().manual_seed(i)) for i in range(8)]
    pairs: list[tuple[Tensor, Tensor]] = [(b[0], b[1]) for b in batches]
    contenders = {"hand": ByHand(schedule, pairs[0]), "loop": InLoop(schedule, pairs[0])}
    found: dict[str, list[float]] = {}
    for name, contender in contenders.items():
        found[f"{name} losses"] = [contender.step(pairs[i]) for i in range(2)]
        found[name] = []
    for turn in range(rounds):
        order = list(contenders.items())
        for name, contender in order if turn % 2 else reversed(order):
            contender.step(pairs[0])  # untimed: the other's memory is in the caches
            for step in range(steps):
                dist.barrier()
                start = time.perf_counter()
                contender.step(pairs[step % len(pairs)])
                dist.barrier()
                found[name].append(time.perf_counter() - start)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where the losses differ."""
    parser = argparse.ArgumentParser("python -m benchmarks.pipelines", description=__doc__)
    schedules = ("1f1b", "zero_bubble", "interleaved", "gpipe")
    parser.add_argument("--schedules", nargs="+", default=schedules[:3], choices=schedules)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args(arguments)
    table = Table(title=f"GPT in {RANKS} stages, {MICRO_BATCHES} micro-batches, seconds per step")
    for name in ("schedule", "by hand", "in the loop", "ratio", "ratios of rounds", "load"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    results = []
    for schedule in options.schedules:
        r = measure(schedule, options.rounds, options.steps)
        results.append(r)
        spread = f"{min(r.ratios):.2f} to {max(r.ratios):.2f}"
        cells = (f"{r.by_hand_s:.3f}", f"{r.in_loop_s:.3f}", f"{r.ratio:.3f}", spread)
        table.add_row(schedule, *cells, f"{r.load:.1f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(r) for r in results], indent=1))
    wrong = [r for r in results if not r.loss_error <= LOSS_TOLERANCE]
    for r in wrong:
        print(f"{r.schedule}: losses differ by {r.loss_error:.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
