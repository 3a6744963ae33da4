"""Plans and timings as tables for people; 100 columns wide where the output is not a terminal."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cost.families import FAMILY, op_family, short_name
from .kernel_use import KernelUse
from .passes.describe import collapse, pattern
from .passes.hinted import price_text
from .plan import Activation, Alternative, Plan, Storage
from .units import bytes_text, seconds_text, signed_seconds

WIDTH = 100
LEAST_SHOWN_S = 1e-8  # a change of the step that a table names
MOST_ROWS = 60  # of a table; the JSON has all of them
_OWN_LINE = frozenset(
    name
    for name, family in FAMILY.items()
    if family in ("matmul", "conv", "attention", "embedding", "softmax", "norm", "batch_norm")
) | {"cross_entropy_loss", "conv2d", "conv1d", "conv3d"}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan: cost, parameters, activations, collectives, alternatives and notes."""
    console = console or make_console()
    console.print()
    _header(plan, console)
    tables = (_stages, _parameters, _activations, _traffic, _kernels, _alternatives)
    for table in (made(plan) for made in tables):
        if table is not None:
            console.print()
            console.print(table)
    for alternative in plan.alternatives:
        if _is_refused(alternative):
            console.print(Text(f"no {alternative.name}: {alternative.why}"))
    for price in plan.hinted:
        console.print(Text(price_text(plan, price)))
    if plan.notes:
        console.print()
        for note in plan.notes:
            console.print(Text.assemble(("warning ", "bold yellow"), note))
    console.print()


def print_timing(
    plan: Plan | None,
    measured_s: float | None,
    measured_bytes: float | None = None,
    console: Console | None = None,
) -> None:
    """Print predicted and measured step time (and memory) side by side; None where unknown."""
    console = console or make_console()
    if plan is None:
        known = "not measured yet" if measured_s is None else seconds_text(measured_s)
        console.print(f"one training step: {known}")
        return
    table = plain_table("one training step", "", ">predicted", ">measured", ">measured / predicted")
    rows: list[tuple[str, float | None, float | None, Callable[[float], str]]]
    memory = float(plan.predicted.memory_bytes)
    rows = [
        ("time", plan.predicted.time_s, measured_s, seconds_text),
        ("memory per device", memory, measured_bytes, bytes_text),
    ]
    for name, predicted, measured, text in rows:
        ratio = f"{measured / predicted:.2f}" if predicted and measured else "-"
        cells = ("-" if value is None else text(value) for value in (predicted, measured))
        table.add_row(name, *cells, ratio)
    console.print(table)


def make_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, `WIDTH` where there is none."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    return console


def plain_table(title: str, *columns: str) -> Table:
    """A plain table; a column's name may begin with `>` (right) or `*` (is cut if need be)."""
    table = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
        padding=(0, 2, 0, 0),
    )
    for column in columns:
        table.add_column(
            column.lstrip(">*"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if column.startswith("*") else None,
        )
    return table


def _header(plan: Plan, console: Console) -> None:
    p = plan.predicted
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    devices = f"{plan.world_size} device" + ("s" if plan.world_size > 1 else "")
    sizes = ", ".join(f"{name}={size}" for name, size in plan.hints.items())
    gap = "0 (proven the best of the candidates)" if plan.gap < 1e-4 else f"{plan.gap:.1%}"
    rows = [
        ("plan", Text.assemble((f"{plan.mesh}", "bold green"), f"  ({devices} of {plan.cluster})")),
        ("strategy", Text(plan.strategy + (f", for {sizes}" if sizes else ""))),
        (
            "step",
            Text.assemble(
                (seconds_text(p.time_s), "bold"),
                f" = compute {seconds_text(p.compute_s)} + communication {seconds_text(p.comm_s)}"
                f" + optimizer {seconds_text(p.optimizer_s)}{_bubble(plan)}{_kernels_change(plan)}",
            ),
        ),
        (
            "memory",
            Text.assemble(
                (bytes_text(p.memory_bytes), "bold"),
                " per device = "
                + " + ".join(f"{name} {bytes_text(n)}" for name, n in _by_size(p.memory_parts)),
            ),
        ),
        (
            "sends",
            Text(
                ", ".join(f"{kind} {bytes_text(n)}" for kind, n in _by_size(p.comm_bytes))
                or "nothing",
            ),
        ),
        ("optimality gap", Text(gap)),
    ]
    for name, text in rows:
        grid.add_row(name, text)
    console.print(grid)


def _bubble(plan: Plan) -> str:
    """The wait for other stages, of the stage that ends last."""
    if plan.pipeline is None or plan.timeline is None:
        return ""
    return f" + bubble {seconds_text(plan.timeline.bubble_s)}"


def _kernels_change(plan: Plan) -> str:
    """What autopar's own kernels change of the step."""
    change = plan.predicted.kernels_s
    return f" + kernels {signed_seconds(change)}" if change else ""


def _stages(plan: Plan) -> Table | None:
    """The stages of a pipeline: what each holds, and how its time goes."""
    if plan.pipeline is None or plan.timeline is None or not plan.timeline.stages:
        return None
    chunks = f", {plan.pipeline.chunks} pieces each" if plan.pipeline.chunks > 1 else ""
    table = plain_table(
        f"pipeline stages ({plan.pipeline.schedule}{chunks}, {plan.micro_batches} micro-batches)",
        *(">stage", "*modules", ">compute", ">waits", ">bubble", ">in flight", ">memory"),
    )
    rows: list[tuple[str, ...]] = [
        (
            str(i),
            use.what,
            seconds_text(use.compute_s),
            seconds_text(use.exposed_s),
            seconds_text(use.bubble_s),
            f"{use.in_flight:.3g}",
            bytes_text(use.peak_bytes),
        )
        for i, use in enumerate(plan.timeline.stages)
    ]
    return fitted(table, rows)


def _is_refused(alternative: Alternative) -> bool:
    """Whether a kind of plan was not looked at; its reason needs more room than a table has."""
    return alternative.mesh == "-"


def _by_size(parts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(((k, n) for k, n in parts.items() if n), key=lambda part: -part[1])


def _parameters(plan: Plan) -> Table | None:
    groups: dict[tuple[str, Storage], list[str]] = {}
    for name, stored in plan.params.items():
        groups.setdefault((pattern(name), stored), []).append(name)
    if not groups:
        return None
    table = plain_table("parameters", "*name", ">×", "type", "sharding", ">stored per device")
    rows: list[tuple[str, ...]] = []
    for (_, stored), names in groups.items():
        sharding = stored.sharding + (" gathered twice" if stored.regather else "")
        size = bytes_text(stored.local_bytes * len(names))
        rows.append((collapse(names), str(len(names)), stored.type, sharding, size))
    return fitted(table, rows)


def _activations(plan: Plan) -> Table | None:
    """Ops by repeated block: neighbours that split alike on one line, views left out."""
    shown = [a for a in plan.activations if op_family(a.op) != "view"]
    if not shown:
        return None
    files = Counter(a.source.rpartition(":")[0] for a in shown if a.source)
    main = files.most_common(1)[0][0] if files else ""
    where = f" (lines without a file are of {main})" if main else ""
    table = plain_table(
        f"activations{where}",
        *("*op", "line", ">×", "splits", "output", ">bytes"),
    )
    rows: list[tuple[str, ...]] = []
    block = ""
    for _, run in itertools.groupby(_alike(shown), key=lambda pair: pair[0]):
        ops = [a for _, a in run]
        first, last = ops[0], ops[-1]
        inside, brace, module = first.module.rpartition("}")
        if inside + brace != block:
            block = inside + brace
            if block:
                rows.append((f"{block}:", *[""] * 5))
        names = ", ".join(short_name(a.op) for a in ops)
        name = f"{module.lstrip('.')} {names}".strip()
        rows.append(
            (
                f"  {name}" if block else name,
                _tail(first.source.removeprefix(main), 16),
                str(last.count),
                last.splits or "-",
                _placed(last.type, last.sharding),
                bytes_text(sum(a.local_bytes for a in ops)),
            )
        )
    return fitted(table, rows)


def _alike(shown: Sequence[Activation]) -> list[tuple[int, Activation]]:
    """The ops with a number that neighbours on one line of the table share."""
    found: list[tuple[int, Activation]] = []
    for a in shown:
        number, before = found[-1] if found else (0, None)
        joins = (
            before is not None
            and not {a.op, before.op} & _OWN_LINE
            and (a.module, a.splits, a.count) == (before.module, before.splits, before.count)
        )
        found.append((number if joins else number + 1, a))
    return found


def _placed(type_: str, sharding: str) -> str:
    """`f32[8/dp,32] +tp`: a type with the axes that split each dim, and what is partial."""
    dtype, _, sizes = type_.rstrip("]").partition("[")
    splits, _, partial = sharding[1:].partition("]")
    dims = zip(sizes.split(", "), splits.split(", "), strict=True)
    return f"{dtype}[{','.join(s if a in '-' else f'{s}/{a}' for s, a in dims)}]{partial}"


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def _traffic(plan: Plan) -> Table | None:
    if not plan.traffic:
        return None
    table = plain_table(
        "collectives per step", "collective", "axis", "*what for", ">×", ">sent per device"
    )
    rows: list[tuple[str, ...]] = [
        (t.collective, t.axis, t.purpose, str(t.count), bytes_text(t.sent_bytes))
        for t in plan.traffic
    ]
    return fitted(table, rows)


def _kernels(plan: Plan) -> Table | None:
    return kernels_table(plan.kernels)


def kernels_table(uses: Sequence[KernelUse]) -> Table | None:
    """Where a plan uses autopar's own kernels, and what each is predicted to save per step."""
    if not uses:
        return None
    table = plain_table(
        "kernels",
        *("kernel", "*at", ">×", ">with", ">without", ">step", ">saves"),
        "*before | after",
    )
    rows: list[tuple[str, ...]] = [
        (
            use.kernel,
            _places(use),
            str(use.count),
            seconds_text(use.time_s),
            seconds_text(use.unfused_s),
            signed_seconds(use.step_s) if abs(use.step_s) >= LEAST_SHOWN_S else "-",
            bytes_text(use.saved_bytes) if use.saved_bytes else "-",
            use.fusion or "-",
        )
        for use in uses
    ]
    return fitted(table, rows)


def _places(use: KernelUse) -> str:
    """Names that differ in the number at their end, together: `dropout, dropout_{1..4}`."""
    alike: dict[str, list[str]] = {}
    for name in use.where:
        alike.setdefault(re.sub(r"_\d+$", "_#", name), []).append(re.sub(r"_(\d+)$", r".\1", name))
    shown = (re.sub(r"\.(\d+|\{[^}]*\})$", r"_\1", collapse(names)) for names in alike.values())
    return ", ".join(shown)


def _alternatives(plan: Plan) -> Table | None:
    shown = [a for a in plan.alternatives if not _is_refused(a)]
    if not shown:
        return None
    table = plain_table("alternatives", "strategy", "mesh", ">step", ">memory", "*why not")
    ranked = sorted(shown, key=lambda a: math.inf if a.time_s is None else a.time_s)
    rows: list[tuple[str, ...]] = []
    for a in ranked:
        time = "-" if a.time_s is None else seconds_text(a.time_s)
        memory = "-" if a.memory_bytes is None else bytes_text(a.memory_bytes)
        rows.append((a.name, a.mesh, time, memory, a.why))
    return fitted(table, rows)


def fitted(table: Table, rows: list[tuple[str, ...]]) -> Table:
    """The table with its rows, its first column cut where the whole would be wider than `WIDTH`."""
    columns = [[str(c.header) for c in table.columns], *rows[:MOST_ROWS]]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    elastic = next((i for i, c in enumerate(table.columns) if c.ratio), 0)
    spare = WIDTH - sum(widths) - 2 * (len(widths) - 1)
    table.columns[elastic].ratio = None
    table.columns[elastic].max_width = max(20, widths[elastic] + spare)
    for row in rows[:MOST_ROWS]:
        table.add_row(*(Text(cell) for cell in row))
    if len(rows) > MOST_ROWS:
        table.caption = f"and {len(rows) - MOST_ROWS} more; --json FILE has all of them"
        table.caption_justify = "left"
    return table
