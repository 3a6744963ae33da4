"""What `benchmarks.planning` measures, in a process of its own: one cold plan, or re-plans.

    python -m benchmarks.planning_cases cold|re-plan CASE

`CASE` is JSON as `Case.to_json` makes it; the last line printed is JSON: a list of rows.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before torch is imported

import json  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from dataclasses import asdict, dataclass, replace  # noqa: E402
from typing import Any  # noqa: E402

import sympy  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from autopar.cost.cluster import Cluster, parse_cluster  # noqa: E402
from autopar.ir.graph import Graph  # noqa: E402
from autopar.passes.choose_kernels import choose_kernels  # noqa: E402
from autopar.passes.pipelined import Wanted  # noqa: E402
from autopar.passes.prepare import prepare  # noqa: E402
from autopar.passes.problem import problem_of  # noqa: E402
from autopar.passes.search import MODES, Frames, search  # noqa: E402
from autopar.plan import Plan  # noqa: E402
from autopar.planning import capture_training, micro_batch_counts  # noqa: E402

from .capture import gpt_1t, llama_8b, llama_70b  # noqa: E402

COUNTED = re.compile(r"(\d+) candidates, (\d+) relaxations solved")


@dataclass(frozen=True)
class Case:
    """One plan: a model of `MODELS`, its batch and sequence, a cluster, and goals (0: none).

    `unlimited`: as if the devices had any amount of memory.
    """

    name: str
    model: str
    layers: int
    batch: int
    sequence: int
    hosts: int
    per_host: int = 8
    goal_s: float = 0.0
    goal_gib: float = 0.0
    unlimited: bool = False

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host

    @property
    def cluster(self) -> str:
        return f"{self.hosts}x{self.per_host}xH100"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


MODELS: Mapping[str, Callable[[int], nn.Module]] = {
    "llama_8b": llama_8b,
    "llama_70b": lambda _: llama_70b(),
    "gpt_1t": lambda _: gpt_1t(),
}

# Two sequences per device for Llama-3-8B, one for the others; of the GPT as in arXiv:2104.04473,
# table 1 (batch 3072 on 3072 devices).
CASES = (
    Case("Llama-3-8B", "llama_8b", 32, 512, 8192, 32, goal_s=25.0, goal_gib=2.0),
    Case("Llama-3-70B", "llama_70b", 80, 1024, 8192, 128, goal_s=45.0),
    Case("GPT 1T", "gpt_1t", 128, 3072, 2048, 384, goal_s=60.0),
)


def by_layers(unlimited: bool = False) -> list[Case]:
    """Llama-3-8B's block, other depths, the same tokens and devices.

    With unlimited memory all depths try the same variants; within it, deeper ones need more.
    """
    first = replace(CASES[0], goal_s=0.0, goal_gib=0.0, unlimited=unlimited)
    return [replace(first, name=f"{n} layers", layers=n) for n in (8, 16, 32, 64, 128)]


def by_devices() -> list[Case]:
    """Llama-3-8B on more and more devices, two sequences on each."""
    first = replace(CASES[0], goal_s=0.0, goal_gib=0.0)
    return [
        replace(first, name=f"{n} devices", hosts=n // 8, batch=2 * n)
        for n in (8, 64, 256, 1024, 4096, 16384)
    ]


@dataclass(frozen=True)
class Captured:
    """A prepared graph with what a search needs beside it."""

    graph: Graph
    fingerprint: str
    symbols: Mapping[sympy.Symbol, int]


class Clock:
    """Wall and CPU seconds since the last reading."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        wall, cpu = self.wall, self.cpu
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self.wall - wall, self.cpu - cpu


def captured(model: nn.Module, batch: int, sequence: int) -> Captured:
    """A language model on meta, captured as `autopar plan` does."""
    with torch.device("meta"):
        ids = torch.zeros(batch, sequence, dtype=torch.int64)
    found = capture_training(model, (ids, torch.zeros_like(ids)), {}, fold=True)
    return Captured(prepare(found.graph), found.fingerprint, found.symbols)


def planned(
    of: Captured,
    symbols: Mapping[sympy.Symbol, int],
    cluster: Cluster,
    frames: Frames | None = None,
    unlimited: bool = False,
) -> dict[str, Any]:
    """One search and the choice of kernels: their seconds, what was looked at, what was chosen."""
    said: list[str] = []
    batch = next((n for symbol, n in symbols.items() if str(symbol) == "b"), None)
    clock = Clock()
    plan = search(
        of.graph,
        of.fingerprint,
        symbols,
        cluster,
        micro_batches=micro_batch_counts(batch),
        recompute=MODES,
        memory_limit=math.inf if unlimited else None,
        frames=frames,
        progress=said.append,
        pipelines=Wanted(),
    )
    wall, cpu = clock.read()
    choose_kernels(of.graph, symbols, plan, cluster)
    kernels, kernels_cpu = clock.read()
    candidates, solved = _counted(said)
    return {
        "search_s": wall,
        "search_cpu_s": cpu,
        "kernels_s": kernels,
        "kernels_cpu_s": kernels_cpu,
        "candidates": candidates,
        "solved": solved,
        "gap": plan.gap,
        "plan": _text(plan),
        "step_s": plan.predicted.time_s,
    }


def _counted(said: list[str]) -> tuple[int, int]:
    """Candidates and relaxations of all searches; one that goes on counts what it had, too."""
    total, last = (0, 0), (0, 0)
    for text in said:
        if m := COUNTED.search(text):
            now = (int(m[1]), int(m[2]))
            if now < last or now[1] < last[1]:  # another search
                total = (total[0] + last[0], total[1] + last[1])
            last = now
    return total[0] + last[0], total[1] + last[1]


def _text(plan: Plan) -> str:
    parts = [str(plan.mesh)]
    if plan.micro_batches > 1:
        parts.append(f"{plan.micro_batches} micro-batches")
    if plan.recompute:
        parts.append("recomputation")
    if plan.pipeline is not None:
        parts.append(plan.pipeline.schedule)
    return ", ".join(parts)


def cold(case: Case) -> list[dict[str, Any]]:
    """The first plan of this process, phase by phase; `load_s` is what the imports took."""
    row: dict[str, Any] = {"name": case.name, "load_s": time.perf_counter() - STARTED}
    clock = Clock()
    with torch.device("meta"):
        model = MODELS[case.model](case.layers)
    row["build_s"], row["build_cpu_s"] = clock.read()
    of = captured(model, case.batch, case.sequence)
    row["capture_s"], row["capture_cpu_s"] = clock.read()
    row |= planned(of, of.symbols, parse_cluster(case.cluster), unlimited=case.unlimited)
    row["total_cpu_s"] = time.process_time()
    row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [row]


def replans(
    of: Captured, first: Cluster, others: Mapping[str, tuple[int, Cluster]]
) -> list[dict[str, Any]]:
    """The first plan, then one for each (batch, cluster) of `others`, with the same frames."""
    frames = Frames(problem_of(of.graph, of.symbols, first, "adamw"))
    rows = [{"what": "first", **planned(of, of.symbols, first, frames)}]
    for what, (batch, cluster) in others.items():
        sizes = {s: batch if str(s) == "b" else n for s, n in of.symbols.items()}
        rows.append({"what": what, **planned(of, sizes, cluster, frames)})
    return rows


def slower_network(cluster: Cluster, times: float) -> Cluster:
    """The cluster with `times` less bandwidth between hosts."""
    *inner, last = cluster.levels
    slow = {
        kind: tuple(replace(c, bandwidth=c.bandwidth.scaled(1 / times)) for c in curves)
        for kind, curves in last.collectives.items()
    }
    return replace(cluster, levels=(*inner, replace(last, collectives=slow)))


def _replan_case(case: Case) -> list[dict[str, Any]]:
    with torch.device("meta"):
        model = MODELS[case.model](case.layers)
    first = parse_cluster(case.cluster)
    twice = parse_cluster(f"{2 * case.hosts}x{case.per_host}xH100")
    others = {
        f"batch {2 * case.batch}": (2 * case.batch, first),
        f"batch {case.batch // 2}": (case.batch // 2, first),
        f"{2 * case.devices} devices": (case.batch, twice),
        "half the bandwidth between hosts": (case.batch, slower_network(first, 2.0)),
        "the first again": (case.batch, first),
    }
    return replans(captured(model, case.batch, case.sequence), first, others)


def main() -> None:
    """Measure what the arguments tell, and print it as JSON."""
    what, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    rows = cold(case) if what == "cold" else _replan_case(case)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
