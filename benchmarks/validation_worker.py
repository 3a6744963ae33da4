"""One rank of `benchmarks.validate_measured`: all plans of one model, taking turns.

Run as `python -m benchmarks.validation_worker JOB.json`; rank 0 writes the job's `out` file.
"""

from __future__ import annotations

import json
import logging
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar
from autopar.errors import UserError
from autopar.ir.text import print_graph
from autopar.runtime import collectives, group, shared_memory
from autopar.runtime.load_clock import LoadClock

from .validation_models import VALIDATION_MODELS

FOREIGN_SHARE = 0.04  # of all cores: above it, others' work disturbs a turn, which is repeated
NEAR = 1.25  # plans within this of the chosen one may be as fast: they have more turns with it
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
PARTS = ("step", "forward", "backward", "optimizer", "comm", "wait")


class CommClock:
    """Seconds spent in collectives (packing and unpacking included), and waiting for peers."""

    def __init__(self) -> None:
        self.comm_s = self.wait_s = 0.0
        self._deep = 0

    def install(self) -> None:
        """Wrap the runtime's collectives, in this process and for good."""
        for table in (collectives._FORWARD, collectives._BACKWARD):
            for name, start in table.items():
                table[name] = self._starter(start)
        for kind in COLLECTIVES:
            for owner in (shared_memory.SharedMemoryGroup, group.ProcessGroupGroup):
                setattr(owner, kind, self._timed(getattr(owner, kind)))
        group.InFlight.wait = self._timed(group.InFlight.wait)  # type: ignore[method-assign]
        waits = shared_memory.SharedMemoryGroup._sleep_until

        def sleep_until(*arguments: Any) -> None:
            start = time.perf_counter()
            waits(*arguments)
            self.wait_s += time.perf_counter() - start

        shared_memory.SharedMemoryGroup._sleep_until = sleep_until  # type: ignore[method-assign, assignment]

    def _starter(self, start: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._timed(start)
        return lambda *arguments: self._timed(timed(*arguments))

    def _timed(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._deep:
                return fn(*arguments, **named)
            self._deep += 1
            start = time.perf_counter()
            try:
                return fn(*arguments, **named)
            finally:
                self._deep -= 1
                self.comm_s += time.perf_counter() - start

        return call


@dataclass
class Runner:
    """One plan's module and optimizer, and the parts of every timed step in seconds.

    `deciding` are the steps of further turns, of the chosen plan and those near it.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    strategies: list[str]
    seconds: list[list[float]] = field(default_factory=list)
    deciding: list[list[float]] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)

    def step(self, batch: tuple[Tensor, ...], clock: CommClock) -> list[float]:
        """A whole training step; its `PARTS`."""
        clock.comm_s = clock.wait_s = 0.0
        marks = [time.perf_counter()]
        loss: Tensor = self.module(*batch)
        marks.append(time.perf_counter())
        loss.backward()  # type: ignore[no-untyped-call]
        marks.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(time.perf_counter())
        parts = [b - a for a, b in pairwise(marks)]
        return [marks[-1] - marks[0], *parts, clock.comm_s, clock.wait_s]


def prepare(job: dict[str, Any]) -> tuple[list[Runner], dict[str, str]]:
    """A runner per distinct plan, and why strategies failed."""
    model = VALIDATION_MODELS[job["model"]]
    batch = model.batch_of(torch.Generator().manual_seed(0))
    runners: dict[str, Runner] = {}
    failed: dict[str, str] = {}
    for strategy in job["strategies"]:
        torch.manual_seed(0)
        module: Any = autopar.parallelize(
            model.build(), strategy=strategy, cluster=job["cluster"] or None
        )
        try:
            module.autopar.prepare(*batch)
        except UserError as error:
            failed[strategy] = error.what
            continue
        key = program_text(module.autopar)
        if key in runners:  # two strategies, one program
            runners[key].strategies.append(strategy)
            continue
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        runners[key] = Runner(module, optimizer, [strategy])
    return list(runners.values()), failed


def program_text(controller: Any) -> str:
    """What a module's step computes and stores, whatever its mesh axes are called."""
    plan = controller.plan
    stored = {name: (s.sharding, s.regather) for name, s in plan.params.items()}
    mine = [print_graph(graph) for graph in controller.session.programs]
    lowered: list[Any] = [mine]
    if plan.pipeline is not None:  # all ranks must find the same programs alike
        lowered = [None] * dist.get_world_size()
        dist.all_gather_object(lowered, mine)
    pipeline = [str(plan.pipeline), {name: s.stages for name, s in plan.params.items()}]
    text = json.dumps([stored, lowered, plan.micro_batches, str(plan.recompute), pipeline])
    for i, axis in enumerate(plan.mesh.axes):
        text = re.sub(rf"\b{axis.name}\b", f"axis{i}", text)
    return f"{[axis.size for axis in plan.mesh.axes]} {text}"


class Turns:
    """Turns of a few steps of one plan; the first step of a turn is not counted."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._clock = CommClock()
        self._clock.install()
        batch_of = VALIDATION_MODELS[job["model"]].batch_of
        self._batches = [batch_of(torch.Generator().manual_seed(i)) for i in range(8)]
        self._load, self._left_s, self._steps = LoadClock(), job["patience_s"], job["steps"]

    def __call__(self, runner: Runner) -> tuple[list[list[float]], float]:
        """The parts of every step and what others used meanwhile, repeated while it is too much."""
        while True:
            dist.barrier()
            self._load.tick()
            start = time.perf_counter()
            timed = [
                runner.step(self._batches[i % len(self._batches)], self._clock)
                for i in range(self._steps + 1)
            ]
            dist.barrier()
            wall_s = time.perf_counter() - start
            foreign = self._load.tick()
            if foreign <= FOREIGN_SHARE or self._left_s <= 0:
                return timed[1:], foreign
            self._left_s -= wall_s + 0.5
            time.sleep(0.5)


def measure(job: dict[str, Any], runners: list[Runner], report: Callable[[str], None]) -> None:
    """Plans take turns; then the plans that are near the chosen one take more of them."""
    turn_of = Turns(job)
    for turn in range(job["rounds"] + 1):
        report(f"round {turn} of {job['rounds']}")
        for runner in runners[:: -1 if turn % 2 else 1]:
            timed, foreign = turn_of(runner)
            if turn > 0:
                runner.seconds += timed
                runner.foreign.append(foreign)
    close = near(runners)
    for turn in range(job["deciding"] if len(close) > 1 else 0):
        report(f"deciding round {turn} of {job['deciding']}")
        for runner in close[:: -1 if turn % 2 else 1]:
            runner.deciding += turn_of(runner)[0]


def near(runners: list[Runner]) -> list[Runner]:
    """The chosen plan and those about as fast, the same on every rank; none without a choice."""
    middle = [statistics.median(slowest(runner.seconds).tolist()) for runner in runners]
    chosen = [m for m, r in zip(middle, runners, strict=True) if "auto" in r.strategies]
    return [r for m, r in zip(middle, runners, strict=True) if chosen and m <= NEAR * chosen[0]]


def slowest(steps: list[list[float]]) -> Tensor:
    """Seconds of every step on the rank that takes longest, float64."""
    seconds = torch.tensor([parts[0] for parts in steps], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds


def collect(job: dict[str, Any], runners: list[Runner]) -> list[dict[str, Any]]:
    """Per plan: the prediction and, per step, each part: the step of the slowest rank, else mean.

    Waiting is taken out of `comm` only by who reads it: both are here.
    """
    found = []
    for runner in runners:
        mine = torch.tensor(runner.seconds, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        steps = torch.stack(every).mean(0)
        steps[:, 0] = slowest(runner.seconds)
        controller: Any = runner.module.autopar
        plan = controller.plan
        found.append(
            {
                "strategies": runner.strategies,
                "mesh": str(plan.mesh),
                "predicted": {
                    "step": plan.predicted.time_s,
                    "compute": plan.predicted.compute_s,
                    "comm": plan.predicted.comm_s,
                    "optimizer": plan.predicted.optimizer_s,
                },
                "measured": {name: steps[:, i].tolist() for i, name in enumerate(PARTS)},
                "deciding": slowest(runner.deciding).tolist(),
                "foreign": runner.foreign,
                "steps_per_turn": job["steps"],
                "plan": json.loads(plan.to_json()),
            }
        )
    return found


def main(path: str) -> None:
    """Run one rank's job."""
    job = json.loads(Path(path).read_text())
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def report(what: str) -> None:
        if job["rank"] == 0:
            print(json.dumps({"progress": what}), flush=True)

    dist.init_process_group(
        "gloo", init_method=f"file://{job['store']}", rank=job["rank"], world_size=job["nproc"]
    )
    report("planning")
    runners, failed = prepare(job)
    measure(job, runners, report)
    found = collect(job, runners)
    if job["rank"] == 0:
        Path(job["out"]).write_text(json.dumps({"plans": found, "failed": failed}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
