"""Step times on two hosts that a slow link joins: autopar against DDP, FSDP2 and hybrid FSDP2.

    python -m benchmarks.two_hosts [--models gpt mlp] [--rates 1000 100] [--json out.json]

Needs root: the hosts are namespaces of this machine (`benchmarks.network`), each with half of its
cores and two ranks of one thread, and the link carries so many Mbit/s in each direction. For every
rate the cluster is calibrated by `autopar calibrate` on both hosts: in full at the fastest, and
with `--quick` at the others, whose profiles take over the device of the first. Then the contenders
take turns of a few whole training steps, one at a time; those that do not all fit in memory have
one turn.

At the fastest rate every contender runs, and what it sends per step is counted. At the others, one
whose bytes alone take longer than a baseline's step that was timed is not run (`--all` runs it):
its step is given as at least so long.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autopar.cost.cluster import Device
from autopar.cost.profile import load_profile, save_profile

from .baselines import SEVERAL_HOSTS
from .models import MODELS
from .network import INTERFACE, TwoHosts, missing
from .speed import free_bytes, memory_bytes
from .workers import MALLOC, RANKS, Block, ContenderError, Pool

BASELINES = ("FSDP2 hybrid", "DDP", "FSDP2")
console = Console()


@dataclass
class Result:
    """What a contender did: seconds of every timed step, first losses, bytes over the link.

    `sent_bytes` is per step and host. `at_least_s`: what these bytes alone take, of a contender
    that was not run.
    """

    step_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent_bytes: float | None = None
    predicted_s: float | None = None
    plan: dict[str, Any] | None = None
    at_least_s: float | None = None
    failure: str = ""

    @property
    def median_s(self) -> float | None:
        """Seconds of a step; the least that it can take where it was not run."""
        if self.failure:
            return None
        return statistics.median(self.step_s) if self.step_s else self.at_least_s


@dataclass(frozen=True)
class Race:
    """One model on one link; each of `rounds` turns takes about `turn_s`, and 1 to `steps` steps.

    A first step that takes longer than `long_s` is all that is timed. `sent_bytes` are known from
    another rate.
    """

    model: str
    hosts: TwoHosts
    profile: Path
    bytes_per_s: float
    rounds: int
    steps: int
    turn_s: float
    long_s: float
    sent_bytes: Mapping[str, float]
    strategy: str

    def run(self, contenders: list[str]) -> dict[str, Result]:
        """Let the contenders take turns."""
        results = {name: Result() for name in contenders}
        together = sum(memory_bytes(self.model, name) for name in contenders) < free_bytes()
        if together:
            with ExitStack() as alive:
                pools: dict[str, Pool] = {}
                for _ in range(self.rounds):
                    for name, result in results.items():
                        if not self._decided(name, results):
                            self._take_turn(name, result, pools, alive, self.steps)
        else:
            for name, result in results.items():
                if not self._decided(name, results):
                    with ExitStack() as alone:
                        self._take_turn(name, result, {}, alone, self.steps * self.rounds)
        return results

    def _decided(self, name: str, results: dict[str, Result]) -> bool:
        """Whether nothing is left to be timed, or nothing needs to be."""
        result = results[name]
        if result.failure or result.at_least_s or (result.step_s and self._is_long(result)):
            return True
        timed = [r.median_s for n, r in results.items() if n in BASELINES and r.step_s]
        least_s = self.sent_bytes.get(name, 0.0) / self.bytes_per_s
        if not result.step_s and timed and least_s > min(t for t in timed if t is not None):
            result.at_least_s, result.sent_bytes = least_s, self.sent_bytes[name]
        return result.at_least_s is not None

    def _is_long(self, result: Result) -> bool:
        return result.step_s[0] > self.long_s

    def _take_turn(
        self, name: str, result: Result, pools: dict[str, Pool], alive: ExitStack, steps: int
    ) -> None:
        try:
            if name not in pools:
                pools[name] = alive.enter_context(self._start(name))
            self._time(pools[name], result, steps)
        except ContenderError as error:
            result.failure = str(error)
        console.print(f"[dim]{self.model}: {name} has {len(result.step_s)} steps[/dim]")

    def _start(self, name: str) -> Pool:
        """Start a contender, in the faster way if it fits in memory."""
        free = free_bytes()
        for keep in (True, False):
            if memory_bytes(self.model, name, keep) < free:
                environment = {"AUTOPAR_CLUSTER": str(self.profile), "STRATEGY": self.strategy}
                return Pool(self.model, name, keep, self.hosts.hosts, environment)
        raise ContenderError(f"{free / 2**30:.0f} GiB of memory are too few")

    def _time(self, pool: Pool, result: Result, steps: int) -> None:
        """A turn: its first step ever and one more are timed only where they are long."""
        if not pool.step:
            first, sent = self._counted(pool, 1)
            result.losses = first.losses
            text = pool.plan()
            if text:
                result.plan = json.loads(text)
                assert result.plan is not None
                result.predicted_s = float(result.plan["predicted"]["time_s"])
            elif first.step_s[0] > self.long_s:
                result.step_s, result.sent_bytes = first.step_s, sent
                return
        warm = pool.run(1, untimed=0)
        fitting = max(round(self.turn_s / warm.step_s[-1]), 1)
        last, sent = self._counted(pool, min(fitting, steps))
        result.step_s += last.step_s
        result.sent_bytes = sent
        if len(result.losses) == 1:
            result.losses += [*warm.losses, *last.losses]

    def _counted(self, pool: Pool, steps: int) -> tuple[Block, float]:
        """Steps, and the bytes that the host which sends more has sent per step."""
        before = self.hosts.sent_bytes()
        block = pool.run(steps, untimed=0)
        after = self.hosts.sent_bytes()
        return block, max(b - a for a, b in zip(before, after, strict=True)) / steps


def calibrate(hosts: TwoHosts, out: Path, quick: bool) -> None:
    """`autopar calibrate` on both hosts at once."""
    started = [
        subprocess.Popen(
            [
                *("nsenter", "--target", str(host.holder), "--net", "--uts"),
                *(sys.executable, "-m", "autopar.cli", "calibrate", "--out", str(out)),
                *("--nproc", str(RANKS // 2), "--nnodes", "2", "--node-rank", str(rank)),
                *("--rdzv-endpoint", f"{hosts.hosts[0].address}:29400"),
                *(("--quick",) if quick else ()),
            ],
            env={
                **os.environ,
                **MALLOC,
                "GLOO_SOCKET_IFNAME": INTERFACE,
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            },
            preexec_fn=partial(os.sched_setaffinity, 0, host.cores),
            stdin=subprocess.DEVNULL,
        )
        for rank, host in enumerate(hosts.hosts)
    ]
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if any(codes):
        raise SystemExit(f"calibration ended with {codes}")


def show(model: str, mbit: float, results: dict[str, Result]) -> None:
    ours = results["autopar"].median_s if "autopar" in results else None
    table = Table(title=f"{model} at {mbit:g} Mbit/s: seconds per step, two ranks on each host")
    for column in ("contender", "median", "steps", "fastest", "slowest", "sent", "/ autopar"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, result in results.items():
        median = result.median_s
        if median is None:
            table.add_row(name, "failed")
            table.caption = f"{table.caption or ''}{name}: {result.failure}\n"
            continue
        over = "≥ " if result.at_least_s else ""
        table.add_row(
            name,
            f"{over}{median:.3f}",
            str(len(result.step_s)),
            f"{min(result.step_s, default=median):.3f}",
            f"{max(result.step_s, default=median):.3f}",
            "–" if result.sent_bytes is None else f"{result.sent_bytes / 1e6:.1f} MB",
            f"{over}{median / ours:.2f}" if ours else "–",
        )
    console.print(table)


def verdict(results: dict[str, Result]) -> dict[str, float | str | None]:
    """The best baseline over autopar, and predicted over measured."""
    times = {name: results[name].median_s for name in BASELINES if name in results}
    done = {name: t for name, t in times.items() if t is not None}
    ours = results["autopar"].median_s if "autopar" in results else None
    best = min(done, key=lambda name: done[name], default=None)
    predicted = results["autopar"].predicted_s if "autopar" in results else None
    return {
        "best": best,
        "ratio": done[best] / ours if best and ours else None,
        "predicted_over_measured": predicted / ours if predicted and ours else None,
        "loss_error": max((loss_error(results, name) or 0.0 for name in results), default=None),
    }


def loss_error(results: dict[str, Result], name: str) -> float | None:
    """The largest relative difference of the first losses from those of one process."""
    if "one process" not in results:
        return None
    pairs = list(zip(results["one process"].losses, results[name].losses, strict=False))
    return max((abs(a - b) / abs(a) for a, b in pairs), default=None)


def main() -> int:
    parser = argparse.ArgumentParser(description="Training steps on two hosts and a slow link.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt", "mlp"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1000, 100], help="Mbit/s")
    parser.add_argument(
        "--contenders", nargs="+", choices=SEVERAL_HOSTS, default=list(SEVERAL_HOSTS)
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed steps per turn, at most")
    parser.add_argument("--turn", type=float, default=5.0, help="seconds of a turn")
    parser.add_argument("--long", type=float, default=30.0, help="seconds of a step timed once")
    parser.add_argument("--all", action="store_true", help="run what cannot be the best, too")
    parser.add_argument("--strategy", default="auto", help="of autopar")
    parser.add_argument("--profile", type=Path, help="take MBIT.json of this folder, or make it")
    parser.add_argument("--quick", action="store_true", help="calibrate quickly")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    reason = missing()
    if reason:
        console.print(f"skipped: {reason}")
        return 0
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that all is undone
    record: dict[str, Any] = {"command": f"python -m benchmarks.two_hosts {' '.join(sys.argv[1:])}"}
    device: Device | None = None
    sent: dict[str, dict[str, float]] = {model: {} for model in arguments.models}
    with TwoHosts() as hosts, tempfile.TemporaryDirectory(prefix="autopar-hosts-") as folder:
        for mbit in sorted(arguments.rates, reverse=True):
            hosts.set_rate(mbit * 1e6)
            profile = (arguments.profile or Path(folder)) / f"{mbit:g}.json"
            if "autopar" in arguments.contenders and not profile.exists():
                start = time.monotonic()
                calibrate(hosts, profile, arguments.quick or device is not None)
                found = load_profile(profile)
                if device is None:
                    device = found.device
                else:
                    save_profile(replace(found, device=device), profile)
                console.print(f"[dim]calibrated in {time.monotonic() - start:.0f} s[/dim]")
            for model in arguments.models:
                race = Race(
                    *(model, hosts, profile, mbit * 1e6 / 8),
                    *(arguments.rounds, arguments.steps, arguments.turn, arguments.long),
                    {} if arguments.all else dict(sent[model]),
                    arguments.strategy,
                )
                results = race.run(arguments.contenders)
                sent[model] |= {n: r.sent_bytes for n, r in results.items() if r.sent_bytes}
                show(model, mbit, results)
                answer = verdict(results)
                console.print(answer)
                record[f"{model} at {mbit:g} Mbit/s"] = {
                    **answer,
                    "load": os.getloadavg()[0],
                    "contenders": {name: asdict(result) for name, result in results.items()},
                }
                if arguments.json:
                    arguments.json.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
