"""`autopar check`: a plan that was edited by hand, against its model, with what it costs now."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from .api import optimizer_name
from .cli_plan import load_call
from .cli_report import check_writable, load_readable, write_whole
from .errors import UserError
from .hints import hints_of
from .kernel_gains import with_kernels_counted
from .passes.edits import broken_hints, reprice
from .passes.hinted import hints_of_plan
from .passes.hints import with_hints
from .passes.prepare import prepare
from .passes.same_model import check_model
from .plan import Plan
from .planning import capture_training
from .questions import cluster_of
from .report import make_console, plain_table
from .units import bytes_text, seconds_text, signed_seconds


def check_file(
    plan_file: Path,
    target: str,
    *,
    cluster: str | None = None,
    batch: int | None = None,
    inputs: Sequence[str] = (),
    optimizer: str = "adamw",
    out: Path | None = None,
    answer: Path | None = None,
) -> None:
    """Check and price a plan file; raises UserError with every entry that cannot be."""
    if batch is not None and batch < 1:
        raise UserError(f"the batch size {batch} is not positive", fix="use --batch 1 or more")
    only_json = str(answer) == "-"
    if out is not None:
        check_writable(out, *([] if out == plan_file else [plan_file]))
    if answer is not None and not only_json:
        check_writable(answer, plan_file)
    plan = load_readable(plan_file)
    console = make_console()
    with make_console(stderr=True).status(f"loading {target}") as status:
        new, broken = _checked(plan, target, cluster, batch, inputs, optimizer, status.update)
    if out is not None:
        new.save(out)
    found = {
        "stored": asdict(plan.predicted),
        "predicted": asdict(new.predicted),
        "hints": dict(new.hints),
        "hints_not_kept": broken,
    }
    text = json.dumps(found, indent=1) + "\n"
    if only_json:
        sys.stdout.write(text)
        return
    if answer is not None:
        write_whole(answer, text)
    _print(plan, new, broken, console)
    for path in (out, answer):
        if path is not None:
            console.print(Text(f"wrote {path}"))


def _checked(
    plan: Plan,
    target: str,
    cluster: str | None,
    batch: int | None,
    inputs: Sequence[str],
    optimizer: str,
    progress: Callable[[str], None],
) -> tuple[Plan, list[str]]:
    """The plan with new prices, and the hints that it does not keep."""
    where, kind = cluster_of(plan, cluster), optimizer_name(optimizer)
    module, args, kwargs = load_call(target, inputs)
    progress("capturing")
    captured = capture_training(module, args, kwargs, dynamic_sequence="s" in plan.hints, fold=True)
    said = [*hints_of_plan(plan), *hints_of(module)]
    graph = with_hints(prepare(captured.graph), said, strict=False)
    check_model(plan, graph, captured.fingerprint)
    sizes = {s: plan.hints.get(s.name, size) for s, size in captured.symbols.items()}
    if batch is not None:
        symbol = next((s for s in sizes if s.name == "b"), None)
        if symbol is None:
            raise UserError("the captured model has a fixed batch size", fix="leave --batch out")
        sizes[symbol] = batch
    progress("pricing")
    new = reprice(plan, graph, sizes, where, kind)
    new = with_kernels_counted(new, plan.kernels)
    return new, broken_hints(new, graph, sizes, where)


def _print(plan: Plan, new: Plan, broken: Sequence[str], console: Console) -> None:
    sizes = ", ".join(f"{name}={size}" for name, size in new.hints.items())
    console.print()
    console.print(Text(f"everything in the plan can be run (on {new.cluster}, for {sizes})"))
    console.print()
    table = plain_table("one training step", "", ">in the file", ">now", ">now / in the file")
    old, now = plan.predicted, new.predicted
    for name, a, b, text in (
        ("time", old.time_s, now.time_s, seconds_text),
        ("compute", old.compute_s, now.compute_s, seconds_text),
        ("communication waited for", old.comm_s, now.comm_s, seconds_text),
        ("kernels", old.kernels_s, now.kernels_s, signed_seconds),
        ("memory per device", float(old.memory_bytes), float(now.memory_bytes), bytes_text),
    ):
        if name != "kernels" or a or b:
            table.add_row(name, text(a), text(b), f"{b / a:.3f}" if a else "-")
    console.print(table)
    if new.memory_limit is not None and now.memory_bytes > new.memory_limit:
        short = bytes_text(now.memory_bytes - new.memory_limit)
        console.print(Text(f"this is {short} more than the limit", "bold yellow"))
    for hint in broken:
        console.print(Text.assemble(("hint not kept ", "bold yellow"), hint))
