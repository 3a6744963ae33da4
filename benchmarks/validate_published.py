"""Predict published training runs, and score the predictions.

    python -m benchmarks.validate_published [CSV] [--rows] [--json FILE] [--svg FOLDER]

Every row of the CSV (default ../shared/validation/published_runs.csv beside the repository) is one
run: a model, a plan, what was measured. The model is built on `meta`, its plan forced on the
planner, and step time and memory predicted with the shipped profile of its device. Exit code 0: the
goals on the whole file are met; 1: one is missed; 2: the file is malformed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autopar.errors import UserError

from .published import score
from .published.plan_of import plan_of, profile_of
from .published.rows import NotCovered, Row, read_rows
from .published.score import Result
from .published.svg import scatter

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT = REPOSITORY.parent / "shared" / "validation" / "published_runs.csv"
PROCESSES = 3


def predict_group(rows: Sequence[Row]) -> list[tuple[str, Result | str]]:
    """Predictions of rows that share a model, or why there is none; runs in a worker."""
    import torch

    from .published.predict import predict
    from .published.solve import layered

    torch.set_num_threads(1)
    found: list[tuple[str, Result | str]] = []
    for row in rows:
        try:
            plan = plan_of(row)
            made = predict(plan, layered(plan))
        except (NotCovered, UserError) as reason:
            found.append((row.id, str(reason).splitlines()[0]))
            continue
        except Exception as error:  # a row that breaks the planner is told, and no other is lost
            found.append((row.id, f"failed: {type(error).__name__}: {error}".splitlines()[0]))
            continue
        key = repr((plan.shape, plan.stages, plan.sizes, plan.micro_batch, plan.micro_batches))
        key += f"{row.recompute} {row.precision} {row.vpp} {profile_of(row.device)}"
        found.append(
            (
                row.id,
                Result(row, made.time_s, made.memory_bytes, plan.memory_bytes, key, made.parts),
            )
        )
    return found


def groups_of(rows: Sequence[Row]) -> tuple[list[list[Row]], dict[str, str]]:
    """Rows by the module that they capture, and why some have none."""
    groups: dict[object, list[Row]] = {}
    skipped: dict[str, str] = {}
    for row in rows:
        try:
            groups.setdefault(plan_of(row).shape, []).append(row)
        except NotCovered as reason:
            skipped[row.id] = str(reason)
    return sorted(groups.values(), key=len, reverse=True), skipped


def predict_all(
    read: Sequence[tuple[str, Row | NotCovered]], processes: int
) -> tuple[list[Result], dict[str, str]]:
    """(predictions in the file's order, why the other rows have none by id)."""
    skipped = {name: str(item) for name, item in read if isinstance(item, NotCovered)}
    rows = [item for _, item in read if isinstance(item, Row)]
    groups, more = groups_of(rows)
    skipped.update(more)
    found: dict[str, Result] = {}
    # Workers are spawned: a process that has used torch's threads is not forked.
    context = multiprocessing.get_context("spawn")
    if processes > 1 and len(groups) > 1:
        with context.Pool(min(processes, len(groups))) as pool:
            made = list(pool.imap_unordered(predict_group, groups))
    else:
        made = [predict_group(group) for group in groups]
    for name, item in (pair for part in made for pair in part):
        if isinstance(item, str):
            skipped[name] = item
        else:
            found[name] = item
    return [found[row.id] for row in rows if row.id in found], skipped


# Report -------------------------------------------------------------------------------------------


def percent(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.1%}" if signed else f"{value:.1%}"


def print_rows(console: Console, results: Sequence[Result]) -> None:
    table = Table(title="Rows")
    for name in ("id", "set", "model", "plan", "measured", "predicted", "error", "GiB", "error"):
        table.add_column(name, justify="right" if name not in ("set", "model", "plan") else "left")
    for r in results:
        row = r.row
        plan = f"{row.gpus}: tp{row.tp} pp{row.pp} cp{row.cp} dp{row.dp}"
        memory = f"{r.memory_gib:.1f}" + (f" of {row.mem_gb:g}" if row.mem_gb else "")
        table.add_row(
            row.id,
            row.family,
            row.model,
            f"{plan} {row.recompute or '?'} {row.precision}",
            "-" if row.step_s is None else f"{row.step_s:.4g} s",
            f"{r.time_s:.4g} s",
            percent(r.time_error, True),
            memory,
            percent(r.memory_error, True),
        )
    console.print(table)


def print_summary(
    console: Console, results: Sequence[Result], skipped: dict[str, str], rows: int
) -> None:
    table = Table(title="Errors of the step time and of memory")
    for name in ("rows of", "rows", "median", "90th", "bias", "memory rows", "median", "bias"):
        table.add_column(name, justify="left" if name == "rows of" else "right")
    families = dict.fromkeys(r.row.family for r in results)
    parts: list[tuple[str, list[Result]]] = [
        (family, [r for r in results if r.row.family == family]) for family in families
    ]
    parts += [
        ("fitted half", [r for r in results if not score.held_out(r.row.id)]),
        ("held-out half", [r for r in results if score.held_out(r.row.id)]),
        ("all", list(results)),
    ]
    for name, members in parts:
        t = score.errors(r.time_error for r in members)
        m = score.errors(r.memory_error for r in members)
        table.add_row(
            name,
            str(t.rows),
            percent(t.median),
            percent(t.p90),
            percent(t.bias, True),
            str(m.rows),
            percent(m.median),
            percent(m.bias, True),
        )
    for name, kind in (
        ("baseline: constant MFU per device", lambda row: profile_of(row.device)),
        ("baseline: constant MFU per device, precision", _device_and_precision),
    ):
        e = score.errors(score.constant_mfu(results, kind))
        row = (name, str(e.rows), percent(e.median), percent(e.p90), percent(e.bias, True))
        table.add_row(*row, "", "", "")
    console.print(table)
    print_ranks(console, results)
    console.print(f"covered {len(results)} of {rows} rows")
    for reason, count in Counter(skipped.values()).most_common():
        console.print(f"  not covered: {count} x {reason}")


def print_ranks(console: Console, results: Sequence[Result]) -> None:
    table = Table(
        title="Order within each sweep, and within the published tables that it is made of"
    )
    for name in ("sweep", "rows", "Kendall", "tables", "Kendall of each"):
        table.add_column(name, justify="left" if name in ("sweep", "Kendall of each") else "right")
    parts = score.tables(results)
    for name, group in score.sweeps(results).items():
        inside = [score.kendall(g) for key, g in parts.items() if key.startswith(f"{name}: ")]
        known = sorted(k for k in inside if k is not None)
        tau = score.kendall(group)
        each = " ".join(f"{k:.2f}" for k in known)
        shown = "-" if tau is None else f"{tau:.2f}"
        table.add_row(name, str(len(group)), shown, str(len(known)), each)
    console.print(table)


def _device_and_precision(row: Row) -> str:
    return f"{profile_of(row.device)} {row.precision}"


def print_goals(console: Console, goals: Sequence[score.Goal]) -> None:
    table = Table(title="Goals")
    for name in ("goal", "reached", "wanted", ""):
        table.add_column(name)
    for goal in goals:
        said = {True: "met", False: "[red]missed[/red]", None: "nothing to judge by"}[goal.met]
        ratio = goal.name.startswith("Kendall")
        show = (lambda v: f"{v:.2f}") if ratio else percent
        reached = "-" if goal.reached is None else show(goal.reached)
        sign = ">=" if goal.at_least else "<="
        table.add_row(goal.name, reached, f"{sign} {show(goal.wanted)}", said)
    console.print(table)


def as_json(
    results: Sequence[Result], skipped: dict[str, str], goals: Sequence[score.Goal]
) -> dict[str, Any]:
    return {
        "goals": [
            {"name": g.name, "reached": g.reached, "wanted": g.wanted, "met": g.met} for g in goals
        ],
        "rows": [
            {
                "id": r.row.id,
                "set": r.row.family,
                "step_s": r.row.step_s,
                "predicted_s": r.time_s,
                "time_error": r.time_error,
                "mem_gib": r.row.mem_gb,
                "predicted_gib": r.memory_gib,
                "memory_error": r.memory_error,
                "oom_right": r.oom_right,
                "held_out": score.held_out(r.row.id),
                "parts_s": r.parts,
            }
            for r in results
        ],
        "not_covered": skipped,
    }


def write_plots(folder: Path, results: Sequence[Result]) -> None:
    """`published_time.svg` and `published_memory.svg` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    times = [(r.row.family, r.row.step_s, r.time_s) for r in results if r.row.step_s]
    memory = [(r.row.family, r.row.mem_gb, r.memory_gib) for r in results if r.row.mem_gb]
    for name, points, unit in (("time", times, "step, s"), ("memory", memory, "peak, GiB")):
        text = scatter(points, f"Published runs: {name}", f"measured {unit}", f"predicted {unit}")
        (folder / f"published_{name}.svg").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--rows", action="store_true", help="print every row")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--svg", type=Path, help="write plots into this folder")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    start = time.perf_counter()
    try:
        read = read_rows(options.csv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results, skipped = predict_all(read, options.processes)
    goals = score.goals(results, len(read))
    if options.rows:
        print_rows(console, results)
    print_summary(console, results, skipped, len(read))
    print_goals(console, goals)
    console.print(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        text = json.dumps(as_json(results, skipped, goals), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.svg:
        write_plots(options.svg, results)
    return int(any(goal.met is False for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
