"""Step times on two hosts that a slow link joins: autopar against DDP, FSDP2 and hybrid FSDP2.

    python -m benchmarks.two_hosts [--models gpt mlp] [--rates 1000 100] [--json out.json]

Needs root: the hosts are namespaces of this machine (`benchmarks.network`), each with half of its
cores and two ranks of one thread, and the link carries so many Mbit/s in each direction. For every
rate the cluster is calibrated by `autopar calibrate` on both hosts, then the contenders take turns
of a few whole training steps, one at a time. A step that takes longer than `--long` is timed once,
with what the first step needs more than others; one that takes longer than `--limit` is ended, and
counts as that limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autopar.cost.profile import load_profile

from .baselines import SEVERAL_HOSTS
from .models import MODELS
from .network import INTERFACE, TwoHosts, missing
from .workers import MALLOC, RANKS, ContenderError, Pool

BASELINES = ("DDP", "FSDP2", "FSDP2 hybrid")
LOSS_TOLERANCE = 5e-5
START_S = 120.0  # in which processes start, capture and plan, beside their first step
console = Console()


@dataclass
class Result:
    """What a contender did: seconds of every timed step, first losses, bytes over the link.

    `over_s` is the limit where a step was ended at it. `sent_bytes` is per step and host.
    """

    step_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent_bytes: float | None = None
    predicted_s: float | None = None
    plan: dict[str, Any] | None = None
    over_s: float | None = None
    failure: str = ""

    @property
    def median_s(self) -> float | None:
        """Seconds of a step; the limit where it was ended there."""
        if self.failure:
            return None
        return statistics.median(self.step_s) if self.step_s else self.over_s


@dataclass(frozen=True)
class Race:
    """How long the contenders run: `turn_s` each of `rounds` times, at most `steps` steps."""

    rounds: int
    steps: int
    turn_s: float
    long_s: float
    limit_s: float


def race(
    model: str, contenders: list[str], hosts: TwoHosts, profile: Path, settings: Race
) -> dict[str, Result]:
    """Let the contenders take turns."""
    results = {name: Result() for name in contenders}
    with ExitStack() as alive:
        pools: dict[str, Pool] = {}
        for number in range(settings.rounds):
            for name, result in results.items():
                if result.failure or result.over_s or (number and name not in pools):
                    continue
                try:
                    if name not in pools:
                        pools[name] = alive.enter_context(_start(model, name, hosts, profile))
                    _turn(pools[name], hosts, result, settings)
                except ContenderError as error:
                    result.failure = str(error)
                if result.failure or result.over_s or result.step_s[0] > settings.long_s:
                    pools.pop(name).close() if name in pools else None
            console.print(f"[dim]{model}: round {number + 1} of {settings.rounds}[/dim]")
    return results


def _start(model: str, name: str, hosts: TwoHosts, profile: Path) -> Pool:
    return Pool(model, name, hosts=hosts.hosts, environment={"AUTOPAR_CLUSTER": str(profile)})


def _turn(pool: Pool, hosts: TwoHosts, result: Result, settings: Race) -> None:
    """One contender's turn; its first step ever says how many steps a turn has."""
    if not pool.step:
        pool.timeout_s = settings.limit_s + START_S
        try:
            before = hosts.sent_bytes()
            first = pool.run(1, untimed=0)
            sent = max(b - a for a, b in zip(before, hosts.sent_bytes(), strict=True))
        except ContenderError as error:
            if not str(error).startswith("no answer"):
                raise
            result.over_s = settings.limit_s
            return
        result.losses = first.losses
        text = pool.plan()
        if text:
            result.plan = json.loads(text)
            result.predicted_s = float(result.plan["predicted"]["time_s"])
        elif first.step_s[0] > settings.long_s:
            result.step_s, result.sent_bytes = first.step_s, float(sent)
            return
    second = pool.run(1, untimed=0)
    steps = min(max(round(settings.turn_s / second.step_s[0]), 1), settings.steps)
    before, last = hosts.sent_bytes(), pool.run(steps, untimed=0)
    sent = max(b - a for a, b in zip(before, hosts.sent_bytes(), strict=True))
    result.step_s += last.step_s
    result.sent_bytes = sent / steps
    if len(result.losses) == 1:
        result.losses += [*second.losses, *last.losses]


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
        over = "> " if result.over_s else ""
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per turn, at most")
    parser.add_argument("--turn", type=float, default=6.0, help="seconds of a turn")
    parser.add_argument("--long", type=float, default=30.0, help="seconds of a step timed once")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds of a step")
    parser.add_argument("--profile", type=Path, help="take MBIT.json of this folder, or make it")
    parser.add_argument("--quick", action="store_true", help="calibrate quickly")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    reason = missing()
    if reason:
        console.print(f"skipped: {reason}")
        return 0
    record: dict[str, Any] = {"command": f"python -m benchmarks.two_hosts {' '.join(sys.argv[1:])}"}
    settings = Race(
        arguments.rounds, arguments.steps, arguments.turn, arguments.long, arguments.limit
    )
    with TwoHosts() as hosts, tempfile.TemporaryDirectory(prefix="autopar-hosts-") as folder:
        for mbit in arguments.rates:
            hosts.set_rate(mbit * 1e6)
            profile = (arguments.profile or Path(folder)) / f"{mbit:g}.json"
            if "autopar" in arguments.contenders and not profile.exists():
                start = time.monotonic()
                calibrate(hosts, profile, arguments.quick)
                load_profile(profile)
                console.print(f"[dim]calibrated in {time.monotonic() - start:.0f} s[/dim]")
            for model in arguments.models:
                results = race(model, arguments.contenders, hosts, profile, settings)
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
