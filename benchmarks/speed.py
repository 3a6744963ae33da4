"""Interleaved step times of autopar against what a user would write by hand.

    python -m benchmarks.speed [--models gpt mlp] [--rounds 5] [--steps 5] [--json out.json]

The contenders take turns of a few whole training steps (forward, backward, optimizer, zero_grad),
one at a time, on 4 gloo ranks of one thread each; "one process" has 4 threads. Single launches
differ by 10 to 40 %, so only the ratio of medians over the rounds is worth reading.
"""

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .baselines import CONTENDERS, contenders_of
from .models import MODELS
from .workers import RANKS, ContenderError, Pool

# Peak memory of all ranks in copies of the parameters, measured on `mlp_quarter`: with freed memory
# kept by malloc, as is faster, and given back.
COPIES = {
    "one process": (6, 6),
    "DDP": (21, 18),
    "FSDP2": (40, 11),
    "FSDP2 hybrid": (40, 14),
    "hand TP": (8, 6),
    "autopar": (12, 8),
}
LOSS_TOLERANCE = 5e-5
console = Console()


@dataclass
class Result:
    """What one contender did: seconds per timed step, the first losses, or why it failed."""

    step_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.step_s) if self.step_s and not self.failure else None


def memory_bytes(model: str, contender: str, keep_memory: bool = True) -> float:
    """A rough need of all its processes together."""
    ranks = 1 if contender == "one process" else RANKS
    copies = COPIES[contender][0 if keep_memory else 1]
    return copies * MODELS[model].parameters_bytes + ranks * 0.25 * 2**30


def free_bytes() -> float:
    """The memory that can be had without swapping; unlimited where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024.0 * int(fields["MemAvailable"].split()[0])


def launch(model: str, contender: str) -> Pool:
    """Start a contender, in the way that needs less memory where the faster one does not fit."""
    free = free_bytes()
    for keep_memory in (True, False):
        if memory_bytes(model, contender, keep_memory) < free:
            return Pool(model, contender, keep_memory)
    needs = memory_bytes(model, contender, keep_memory=False)
    raise ContenderError(f"needs {needs / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def race(model: str, contenders: list[str], rounds: int, steps: int) -> dict[str, Result]:
    """Let the contenders take turns; those that do not all fit in memory start anew each turn."""
    results = {name: Result() for name in contenders}
    needs = sum(memory_bytes(model, name) for name in contenders)
    resident = needs < free_bytes()
    with ExitStack() as alive:
        pools: dict[str, Pool] = {}
        for number in range(rounds):
            for name, result in results.items():
                if result.failure:
                    continue
                try:
                    with ExitStack() as turn:
                        pool = pools.get(name)
                        if pool is None:
                            pool = (alive if resident else turn).enter_context(launch(model, name))
                        if resident:
                            pools[name] = pool
                        block = pool.run(steps, untimed=1 if pool.step else 2)
                except ContenderError as error:
                    result.failure = str(error)
                    continue
                result.step_s += block.step_s
                result.losses = result.losses or block.losses
            console.print(f"[dim]{model}: round {number + 1} of {rounds}[/dim]")
    return results


def loss_error(results: dict[str, Result], name: str) -> float | None:
    """The largest relative difference of the first losses from those of one process."""
    if "one process" not in results:
        return None
    reference, losses = results["one process"].losses, results[name].losses
    pairs = list(zip(reference, losses, strict=False))
    return max((abs(a - b) / abs(a) for a, b in pairs), default=None)


def show(model: str, results: dict[str, Result]) -> None:
    baseline = results["autopar"].median_s if "autopar" in results else None
    table = Table(title=f"{model}: seconds per step on {RANKS} gloo ranks, one thread each")
    for column in ("contender", "median", "fastest", "slowest", "time / autopar", "loss error"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, result in results.items():
        median, error = result.median_s, loss_error(results, name)
        if median is None:
            table.add_row(name, "failed")
            table.caption = f"{table.caption or ''}{name}: {result.failure}\n"
            continue
        table.add_row(
            name,
            f"{median:.3f}",
            f"{min(result.step_s):.3f}",
            f"{max(result.step_s):.3f}",
            f"{median / baseline:.2f}" if baseline else "–",
            "–" if error is None else f"{error:.0e}",
        )
    console.print(table)


def wrong_losses(model: str, results: dict[str, Result]) -> list[str]:
    exact = {"autopar", "hand TP"} | (set(CONTENDERS) if MODELS[model].exact_baselines else set())
    errors = {name: loss_error(results, name) for name in results if name in exact}
    return [name for name, error in errors.items() if error is not None and error > LOSS_TOLERANCE]


def main() -> int:
    parser = argparse.ArgumentParser(description="Interleaved training step times.")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["gpt", "mlp", "resnet", "rec"]
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per turn")
    parser.add_argument("--json", type=Path, help="write every timed step here")
    arguments = parser.parse_args()
    record: dict[str, dict[str, object]] = {}
    wrong: list[str] = []
    for model in arguments.models:
        contenders = [name for name in contenders_of(model) if name in arguments.contenders]
        results = race(model, contenders, arguments.rounds, arguments.steps)
        show(model, results)
        if "one process" in results:
            wrong += [f"{model}: {name}" for name in wrong_losses(model, results)]
        record[model] = {name: vars(result) for name, result in results.items()}
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1))
    console.print(f"[dim]python -m benchmarks.speed {' '.join(sys.argv[1:])}[/dim]")
    if wrong:
        console.print(f"[red]losses differ from one process: {', '.join(wrong)}[/red]")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
