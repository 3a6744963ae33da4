"""How long planning takes: cold, again, with depth and with the size of the cluster.

    python -m benchmarks.planning [--only 8B] [--json FILE]
    python -m benchmarks.planning --re-plan | --layers | --devices [--plots docs/images]

Each cold row is a new process that imports torch, builds the model on the meta device, captures it
and searches: every mesh of one axis and of two, of three where the model has a use for a third,
all micro-batches up to 64 and every mode of recomputation; then it chooses kernels, as the command
`autopar plan` does. `total` is the wall time of the whole process, the peak is its own. CPU seconds
tell how much of the wall was the machine's other work. `--re-plan` plans again in one process, for
another batch, cluster or bandwidth. Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .planning_cases import CASES, Case, by_devices, by_layers
from .planning_plot import Line, plot

REPLAN_GOAL_S = 2.0
FLAT = 1.5  # most over least seconds of search along a sweep that is called flat
IMAGES = Path(__file__).parent.parent / "docs" / "images"

COLUMNS = (
    ("load", "load_s"),
    ("build", "build_s"),
    ("capture", "capture_s"),
    ("search", "search_s"),
    ("search, CPU", "search_cpu_s"),
    ("kernels, CPU", "kernels_cpu_s"),
    ("total", "total_s"),
    ("total, CPU", "total_cpu_s"),
)


def main() -> None:
    """Run the benchmarks that were asked for; print tables, write plots and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--re-plan", action="store_true")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--devices", action="store_true")
    parser.add_argument("--plots", type=Path, default=IMAGES, help="folder of the sweeps' plots")
    parser.add_argument("--json", type=Path, help="write every row here")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n", flush=True)
    missed: list[str] = []
    found: dict[str, list[dict[str, Any]]] = {}
    if options.re_plan:
        found["re-plan"] = _replans(missed)
    if options.layers:
        same = _rows_of(by_layers(unlimited=True), "layers")
        found["layers, unlimited memory"] = same
        found["layers"] = _rows_of(by_layers(), "layers")
        _draw({"unlimited": same, "80 GB": found["layers"]}, "layers", options.plots)
        seconds = [row["search_cpu_s"] for row in same]
        if max(seconds) > FLAT * min(seconds):
            missed.append(
                f"search along layers: {min(seconds):.1f} to {max(seconds):.1f} CPU seconds"
            )
    if options.devices:
        found["devices"] = _rows_of(by_devices(), "devices")
        _draw({"": found["devices"]}, "devices", options.plots)
    if not found:
        cases = [c for c in CASES if options.only.lower() in c.name.lower()]
        found["cold"] = _cold(cases, missed)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    for line in missed:
        print(f"missed: {line}")
    sys.exit(bool(missed))


def run(case: Case, what: str = "cold") -> list[dict[str, Any]]:
    """The rows of one case, measured in a new process; raises CalledProcessError if it fails."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.planning_cases", what, json.dumps(case.to_json())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    if what == "cold":
        rows[0]["total_s"] = time.perf_counter() - start
    return rows


def header(first: str) -> str:
    """The two header lines of a table of cold plans."""
    names = [
        first,
        *(name for name, _ in COLUMNS),
        "peak GiB",
        "candidates",
        "solved",
        "gap",
        "plan",
        "step s",
    ]
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def line_of(first: str, row: dict[str, Any]) -> str:
    """One row of such a table."""
    cells = [
        first,
        *(f"{row[key]:.1f}" for _, key in COLUMNS),
        f"{row['peak_gib']:.2f}",
        f"{row['candidates']}",
        f"{row['solved']}",
        f"{100 * row['gap']:.1f} %",
        row["plan"],
        f"{row['step_s']:.3g}",
    ]
    return "| " + " | ".join(cells) + " |"


def _cold(cases: list[Case], missed: list[str]) -> list[dict[str, Any]]:
    print(header("model, devices"))
    rows = []
    for case in cases:
        (row,) = run(case)
        rows.append(row)
        print(line_of(f"{case.name}, {case.devices}", row), flush=True)
        if case.goal_s and row["total_s"] > case.goal_s:
            missed.append(f"{case.name} took {row['total_s']:.1f} s, the goal is {case.goal_s} s")
        if case.goal_gib and row["peak_gib"] > case.goal_gib:
            missed.append(f"{case.name} took {row['peak_gib']:.2f} GiB of {case.goal_gib}")
    return rows


def _replans(missed: list[str]) -> list[dict[str, Any]]:
    rows = run(CASES[0], "re-plan")
    names = "| plan | search | search, CPU | kernels | kernels, CPU | solved | chosen | step s |"
    print(names + "\n" + "|---" * 8 + "|")
    for row in rows:
        print(
            f"| {row['what']} | {row['search_s']:.2f} | {row['search_cpu_s']:.2f} | "
            f"{row['kernels_s']:.2f} | {row['kernels_cpu_s']:.2f} | "
            f"{row['solved']} | {row['plan']} | {row['step_s']:.3g} |"
        )
        taken = row["search_s"] + row["kernels_s"]
        if row is not rows[0] and taken > REPLAN_GOAL_S:
            missed.append(
                f"re-plan ({row['what']}) took {taken:.2f} s, the goal is {REPLAN_GOAL_S}"
            )
    return rows


def _rows_of(cases: list[Case], along: str) -> list[dict[str, Any]]:
    print(header(along + (", unlimited memory" if cases[0].unlimited else "")))
    rows = []
    for case in cases:
        (row,) = run(case)
        row[along] = getattr(case, along)
        rows.append(row)
        print(line_of(str(row[along]), row), flush=True)
    print()
    return rows


def _draw(series: dict[str, list[dict[str, Any]]], along: str, plots: Path) -> None:
    lines = [
        Line(f"search {name}".strip(), [(row[along], row["search_cpu_s"]) for row in rows])
        for name, rows in series.items()
    ]
    last = list(series.values())[-1]
    lines.append(Line("capture", [(row[along], row["capture_cpu_s"]) for row in last]))
    plots.mkdir(parents=True, exist_ok=True)
    title = f"Planning Llama-3-8B: seconds against {along}"
    (plots / f"planning_{along}.svg").write_text(plot(lines, title, along, "CPU seconds"))


if __name__ == "__main__":
    main()
