"""`autopar report` and `autopar compare`: a plan as a page, two plans side by side."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .compare import Comparison, Figure, compare_plans
from .cost.families import op_family
from .errors import UserError
from .files import replace_file
from .html.page import report_page
from .plan import Plan, Storage, load_plan
from .report import fitted, make_console, plain_table
from .units import bytes_text, seconds_text

_MOST = 2**63  # no figure of a plan is as large


def report_plan(plan_file: Path, out: Path, sources: Sequence[Path] = ()) -> None:
    """Write a plan's page; raises UserError for a bad plan, source or place, and writes nothing."""
    check_writable(out, plan_file, *sources)
    plan = load_readable(plan_file)
    page = report_page(plan, {path.name: _source_lines(path, plan) for path in sources})
    write_whole(out, page)
    make_console().print(Text(f"wrote {out} ({bytes_text(len(page.encode()))})"))


def compare_files(first: Path, second: Path, out: Path | None = None) -> None:
    """Print what differs between two plan files, and write it to `out` as JSON; `-`: JSON alone."""
    only_json = str(out) == "-"
    if out is not None and not only_json:
        check_writable(out, first, second)
    compared = compare_plans(load_readable(first), load_readable(second))
    text = json.dumps(asdict(compared), indent=1) + "\n"
    if only_json:
        sys.stdout.write(text)
        return
    if out is not None:
        write_whole(out, text)
    console = make_console()
    print_comparison(compared, str(first), str(second), console)
    if out is not None:
        console.print(Text(f"wrote {out}"))


def load_readable(path: Path) -> Plan:
    """Load a plan whose figures are all finite and not negative; raises UserError.

    But for what kernels change of the step and of what is sent: less is the point of them.
    """
    try:
        plan = load_plan(path)
    except RecursionError:
        raise UserError("the plan file is nested too deeply", where=str(path)) from None
    for name, value in _figures_in(asdict(plan)):
        least = -_MOST if _is_change(name) else 0
        if not (math.isfinite(value) and least <= value < _MOST):
            raise UserError(
                f"the plan file has a figure that cannot be: {name} is {value:.6g}",
                where=str(path),
                fix="make it again with `autopar plan ... --json FILE`",
            )
    return plan


def _is_change(name: str) -> bool:
    """Whether a figure of a plan file says what kernels change."""
    in_kernels = name.startswith("kernels[") and (".step_s" in name or ".sent_bytes" in name)
    return in_kernels or name == "predicted.kernels_s"


def _figures_in(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _figures_in(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from _figures_in(each, f"{name}[{i}]")
    elif isinstance(value, int):
        yield name, float(min(max(value, -_MOST), _MOST))
    elif isinstance(value, float):
        yield name, value


def check_writable(out: Path, *inputs: Path) -> None:
    """Raise UserError if `out` is a folder, one of the inputs, or in no folder."""
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder", fix="name a file in it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: its folder does not exist", fix="make the folder")
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise UserError(f"{out} is read, and would be overwritten", fix="name another file")


def write_whole(out: Path, text: str) -> None:
    """Write a file whole or not at all; raises UserError if it cannot be written."""
    try:
        replace_file(out, text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def _source_lines(path: Path, plan: Plan) -> list[str]:
    files = {a.source.rpartition(":")[0] for a in plan.activations if a.source}
    if path.name not in files:
        raise UserError(
            f"no op of the plan comes from a file {path.name}",
            fix=f"its files are {', '.join(sorted(files)) or 'not known'}; leave --source out",
        )
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def print_comparison(c: Comparison, a: str, b: str, console: Console | None = None) -> None:
    """Print two plans' differences as tables, A and B in the order given."""
    console = console or make_console()
    console.print()
    console.print(Text.assemble(("A  ", "dim"), a))
    console.print(Text.assemble(("B  ", "dim"), b))
    console.print()
    if c.identical:
        console.print("the plans are identical")
        return
    if not c.same_model:
        console.print(Text("the plans are for different models", "bold yellow"))
        console.print()
    for title, columns, rows in _tables(c):
        if rows:
            console.print(fitted(plain_table(title, *columns), rows))
            console.print()
    for mark, notes in (("only A", c.notes_only_a), ("only B", c.notes_only_b)):
        for note in notes:
            console.print(Text.assemble((f"{mark} ", "bold yellow"), note))
    if c.same_model and not (c.parameters or c.ops or c.choices):
        console.print("storage of parameters and choices of ops are the same")


_Rows = list[tuple[str, ...]]


def _tables(c: Comparison) -> Iterator[tuple[str, tuple[str, ...], _Rows]]:
    yield "settings", ("", "A", "*B"), [(d.what, d.a or "-", d.b or "-") for d in c.settings]
    yield "predicted", ("", ">A", ">B", ">B / A"), [_figure_row(f) for f in c.figures]
    yield (
        "parameters stored differently",
        ("*name", ">×", "A", "B"),
        [(p.name, str(p.count), _stored(p.a), _stored(p.b)) for p in c.parameters],
    )
    yield _op_table(c)
    yield (
        "choices by node",
        ("*node", "A", "B"),
        [(d.what, d.a, d.b) for d in c.choices] if not c.ops else [],
    )
    yield (
        "sent per device and step",
        ("collective", "axis", ">A", ">B", ">× A", ">× B"),
        [
            (
                t.collective,
                t.axis,
                bytes_text(t.a_bytes),
                bytes_text(t.b_bytes),
                str(t.a_count),
                str(t.b_count),
            )
            for t in c.traffic
        ],
    )


def _op_table(c: Comparison) -> tuple[str, tuple[str, ...], _Rows]:
    """Ops under their blocks; views, which follow from the others, only if there is nothing else.

    Splits are shown, and the outputs' shardings where the splits agree.
    """
    shown = [o for o in c.ops if op_family(o.op) != "view"] or list(c.ops)
    files = Counter(o.source.rpartition(":")[0] for o in shown if o.source)
    main = files.most_common(1)[0][0] if files else ""
    where = f" (in {main})" if main else ""
    rows: _Rows = []
    block = ""
    for o in shown:
        inside, brace, module = o.module.rpartition("}")
        if inside + brace != block:
            block = inside + brace
            if block:
                rows.append((f"{block}:", "", "", "", ""))
        name = f"{module.lstrip('.')} {o.op}".strip()
        alike = o.a_splits == o.b_splits
        texts = (o.a_output, o.b_output) if alike else (o.a_splits, o.b_splits)
        rows.append(
            (
                f"  {name}" if block else name,
                o.source.removeprefix(main) if main else o.source,
                str(o.count),
                *(text or "-" for text in texts),
            )
        )
    return f"ops that split differently{where}", ("*op", "line", ">×", "A", "B"), rows


def _figure_row(f: Figure) -> tuple[str, ...]:
    text = seconds_text if f.unit == "s" else bytes_text
    cells = ("-" if value is None else text(value) for value in (f.a, f.b))
    return (f.name, *cells, "-" if f.ratio is None else f"{f.ratio:.3g}")


def _stored(stored: Storage | None) -> str:
    if stored is None:
        return "-"
    again = " gathered twice" if stored.regather else ""
    return f"{stored.sharding}{again} {bytes_text(stored.local_bytes)}"
