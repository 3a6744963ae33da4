"""Time of making and evaluating the cost formulas of a Llama-3-8B block.

    python -m benchmarks.symbolic [--settings 200000] [--cluster 8x8xH100]

Captures the model with three layers (a block's formulas do not depend on how many there are), plans
it on the cluster, makes the formulas of one block and evaluates them at random batch sizes, mesh
sizes and network bandwidths. Prints settings per second, and the largest difference from the
planner's own prices at settings drawn among them.
"""

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
import torch

from autopar.cost.cluster import make_mesh, parse_cluster
from autopar.cost.evaluate import Settings, compiled
from autopar.passes.accounts import regions_of
from autopar.passes.bucket_collectives import BUCKET_BYTES
from autopar.passes.case import make_case
from autopar.passes.prepare import prepare
from autopar.passes.search import search
from autopar.passes.step_formula import Terms, step_formula
from autopar.planning import capture_training
from examples.llama3_8b import Config, Llama

GOAL = 100_000  # settings per second and block
GOAL_BUILD_S = 10.0
CHECKED = 20
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=int, default=200_000)
    parser.add_argument("--cluster", default="8x8xH100")
    options = parser.parse_args()
    with torch.device("meta"):
        model = Llama(replace(Config(), layers=3)).to(torch.bfloat16)
        ids = torch.zeros(64, Config().sequence, dtype=torch.int64)
    captured = capture_training(model, (ids, torch.zeros_like(ids)), {})
    cluster = parse_cluster(options.cluster)
    graph = prepare(captured.graph)
    plan = search(graph, captured.fingerprint, captured.symbols, cluster, strategy="data+tensor")
    case = make_case(graph, captured.symbols, plan, cluster)

    start = time.perf_counter()
    regions = regions_of(case.concrete, case.blocks)
    block = step_formula(
        case.formulas,
        case.blocks,
        case.option,
        Terms(overlap=case.accounts.overlap),
        only=lambda node: regions.block(node) >= 0,
    )
    function = compiled([block.seconds, block.memory], cluster, BUCKET_BYTES)
    settings = random_settings(options.settings, [axis.name for axis in plan.mesh])
    function(settings.chunk(0, 1))
    build_s = time.perf_counter() - start
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(settings)
        times.append(time.perf_counter() - start)
    rate = options.settings / float(np.median(times))
    worst = largest_difference(captured, graph, plan, cluster, settings)
    print(f"formulas of a block made in {build_s:.2f} s (goal {GOAL_BUILD_S:.0f} s)")
    print(f"{rate:,.0f} settings/s (median of {REPEATS} runs; goal {GOAL:,})")
    print(f"largest difference from the planner's price of a step: {worst:.1e}, {CHECKED} settings")
    sys.exit(int(rate < GOAL or build_s > GOAL_BUILD_S or worst > 1e-9))


def random_settings(n: int, axes: list[str]) -> Settings:
    """Batch sizes that divide evenly, mesh sizes up to 64 devices, bandwidths around today's."""
    rng = np.random.default_rng(0)
    sizes = dict(zip(axes, (2 ** rng.integers(1, 5, n), 2 ** rng.integers(1, 3, n)), strict=True))
    batch = 16 * rng.integers(1, 64, n)
    return Settings({"b": batch}, sizes, {"network": rng.uniform(0.5, 2.0, n)})


def largest_difference(captured, graph, plan, cluster, settings) -> float:  # type: ignore[no-untyped-def]
    """Relative, between the whole step's formula and the planner's accounts, at some settings."""
    worst = 0.0
    (symbol,) = captured.symbols
    formula = make_case(graph, captured.symbols, plan, cluster)
    for i in range(CHECKED):
        batch = int(settings.sizes["b"][i])
        mesh = make_mesh(cluster, {a: int(n[i]) for a, n in settings.axes.items()})
        there = make_case(graph, {symbol: batch}, replace(plan, mesh=mesh), cluster)
        at = Settings({"b": batch}, {axis.name: axis.size for axis in mesh})
        seconds, memory, _ = formula.evaluate(at)
        worst = max(worst, abs(float(seconds[0]) / there.time_s - 1))
        worst = max(worst, abs(float(memory[0]) / there.memory_bytes - 1))
    return worst


if __name__ == "__main__":
    main()
