"""`make verify`: every model of the zoo under every strategy and pipeline equals one device.

On 4 real gloo ranks with AdamW, against the same script in one process (which itself must equal the
plain PyTorch model bit by bit where there is no dropout). In float64 every loss, gradient and final
parameter; in float32 every loss. `training.py` says in which norms.

With `--compress int8` gradients travel as int8, which one device's do not: the table then says how
far that takes them, and the limits are those of the compression.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from autopar.errors import UserError
from tests.e2e.piped_plans import PIPED, piped_case
from tests.e2e.pool import RankFailure, RankPool
from tests.e2e.training import (
    DTYPES,
    MODELS,
    STRATEGIES,
    Outcome,
    is_large,
    make_reference,
    train_and_compare,
)

RANKS = 4
STEPS, LARGE_STEPS = 20, 4
LIMIT_FLOAT64, LIMIT_LOSS_FLOAT32 = 1e-9, 5e-5
# With int8: of the first step's gradients together (`Outcome.compression`), and of every loss.
LIMIT_COMPRESSION, LIMIT_LOSS_COMPRESSED = 2e-2, 1e-2
TIMEOUT_S = 240.0
ALL = (*STRATEGIES, *PIPED)


@dataclass
class Row:
    """One model under one strategy, by dtype; `failures` are sentences."""

    model: str
    strategy: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    time_s: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; 1 if anything failed."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    start = time.monotonic()
    rows = _verify_all(options, partial(_show, compressed=options.compress is not None))
    order = {name: i for i, name in enumerate(options.models)}
    rows.sort(key=lambda row: (order[row.model], options.strategies.index(row.strategy)))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table_of(rows, options.compress))
    failed = [row for row in rows if row.failures]
    minutes = (time.monotonic() - start) / 60
    console.print(f"{len(rows) - len(failed)} of {len(rows)} hold, in {minutes:.1f} minutes")
    if options.json:
        Path(options.json).write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.e2e.verify", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--strategies", nargs="+", default=list(ALL), choices=ALL)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=1, help="sets of 4 ranks at a time")
    parser.add_argument("--compress", choices=["int8"], help="how gradients travel")
    parser.add_argument("--json", help="write the errors to this file")
    return parser.parse_args(arguments)


def _show(row: Row, compressed: bool = False) -> None:
    """One line per case as it is done."""
    how = "FAILED" if row.failures else "ok"
    if not row.failures and any(o.inapplicable for o in row.outcomes.values()):
        how = "does not apply"
    print(f"{row.model:22} {row.strategy:27} {how} ({row.time_s:.1f} s)", flush=True)
    for dtype, outcome in row.outcomes.items():
        if outcome.compression and compressed:
            error = f"{outcome.compression:.1e} of the gradients' norm in the first step"
            print(f"    {dtype}: error of the int8 compression: {error}", flush=True)
    for text in row.failures:
        print(text, flush=True)


def _verify_all(options: argparse.Namespace, show: Callable[[Row], None]) -> list[Row]:
    """All rows, in the order in which they were done; `options.jobs` pools share the models."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in options.models:
        waiting.put(name)
    rows: list[Row] = []
    one_at_a_time = threading.Lock()  # of this process's random state
    stop = threading.Event()

    def work() -> None:
        with RankPool(RANKS) as pool:
            while not stop.is_set():
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                for row in _verify_model(name, options, pool, one_at_a_time):
                    rows.append(row)
                    show(row)
                    if stop.is_set():
                        return

    threads = [threading.Thread(target=work) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()  # the threads end their ranks after the case they are at
        raise
    return rows


def _verify_model(
    name: str, options: argparse.Namespace, pool: RankPool, one_at_a_time: threading.Lock
) -> Iterator[Row]:
    """The rows of one model."""
    steps = min(LARGE_STEPS, options.steps) if is_large(MODELS[name]) else options.steps
    with tempfile.TemporaryDirectory(prefix="autopar-verify-") as folder:
        files = {dtype: Path(folder, dtype) for dtype in options.dtype}
        try:
            with one_at_a_time:
                for dtype, file in files.items():
                    make_reference(name, dtype, steps, file)
        except Exception as error:
            text = f"on one device: {type(error).__name__}: {error}"
            yield from (Row(name, s, failures=[text]) for s in options.strategies)
            return
        for strategy in options.strategies:
            row = Row(name, strategy)
            start = time.monotonic()
            for dtype, file in files.items():
                try:
                    with one_at_a_time:
                        plan = _plan_of(name, strategy, dtype)
                    case = (name, strategy, dtype, steps, str(file), plan, options.compress)
                    outcome = pool.run(train_and_compare, *case, timeout_s=TIMEOUT_S)[0]
                except UserError as error:
                    outcome = Outcome(inapplicable=f"{name}: {error.what}")
                except RankFailure as error:
                    row.failures.append(f"{dtype}: {error}")
                    continue
                row.outcomes[dtype] = outcome
                row.failures += _too_far(dtype, outcome, options.compress)
            row.time_s = time.monotonic() - start
            yield row


def _plan_of(name: str, strategy: str, dtype: str) -> str | None:
    """The text of the plan to follow; None where the planner makes it."""
    return piped_case(name, strategy, dtype).to_json() if strategy in PIPED else None


def _too_far(dtype: str, outcome: Outcome, compress: str | None = None) -> list[str]:
    """What is beyond the limits."""
    errors = {"loss": outcome.loss}
    limit = LIMIT_FLOAT64 if dtype == "float64" else LIMIT_LOSS_FLOAT32
    limits = {"loss": limit}
    if compress is not None:
        limits = {"loss": LIMIT_LOSS_COMPRESSED, "compressed gradient": LIMIT_COMPRESSION}
        errors["compressed gradient"] = outcome.compression
    elif dtype == "float64":
        errors |= {"gradient": outcome.gradient, "parameter": outcome.parameter}
    worst = f" ({outcome.worst})" if outcome.worst else ""
    return [
        f"{dtype}: {what} differs by {error:.1e}{worst if what != 'loss' else ''}"
        for what, error in errors.items()
        if not error <= limits.get(what, limit)
    ]


def table_of(rows: Sequence[Row], compress: str | None = None) -> Table:
    """Relative errors against one device."""
    how = f", gradients as {compress}" if compress else ""
    table = Table(title=f"Relative errors on {RANKS} ranks against one device{how}")
    for name in ("model", "strategy", "mesh"):
        table.add_column(name)
    for name in ("loss f64", "gradient f64", "parameter f64", "loss f32"):
        table.add_column(name, justify="right")
    if compress:
        table.add_column(f"error of {compress}", justify="right")
    previous = ""
    for row in rows:
        if previous and row.model != previous:
            table.add_section()
        model = row.model if row.model != previous else ""
        previous = row.model
        double, single = row.outcomes.get("float64"), row.outcomes.get("float32")
        some = double or single
        if row.failures:
            mesh = f"[red]{some.mesh if some else ''} FAILED[/]"
        else:
            mesh = some.mesh or "does not apply" if some else ""
        cells = ["", "", "", ""]
        if double is not None and double.mesh:
            cells[:3] = [f"{e:.1e}" for e in (double.loss, double.gradient, double.parameter)]
        if single is not None and single.mesh:
            cells[3] = f"{single.loss:.1e}"
        if compress:
            cells.append(f"{double.compression:.1e}" if double and double.mesh else "")
        table.add_row(model, row.strategy, mesh, *cells)
    reasons = {o.inapplicable for row in rows for o in row.outcomes.values() if o.inapplicable}
    if reasons:
        table.caption = "\n".join(sorted(reasons))
    return table


if __name__ == "__main__":
    sys.exit(main())
