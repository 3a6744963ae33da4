"""The model as blocks, each repeated one once: ops with splits, shardings and source lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopar.cost.families import op_family
from autopar.plan import Activation, Plan
from autopar.units import bytes_text

from .markup import Child, Markup, element, join, table
from .modules import Block, blocks_of, main_file, parameter_groups, split_block
from .shapes import axis_key, coloured, placed, whole

_MOST_OPEN = 60  # ops of a repeated block that is shown unfolded
_MOST_OPEN_ONCE = 12  # of one that is not repeated

Lines = Mapping[str, str]  # the text of `model.py:31`


def blocks_section(plan: Plan, lines: Lines) -> Markup:
    """The blocks as a chain, and the ops of each as a table that unfolds."""
    blocks = blocks_of(plan.activations)
    if not blocks:
        return element("p", "This plan carries no ops.", class_="absent")
    stored = _stored_bytes(plan)
    chain = [
        element(
            "li",
            element("a", block.title, href=f"#block-{i}"),
            element("span", f"× {block.copies}", class_="times") if block.copies > 1 else None,
            element("small", _summary(block, stored)),
            class_="repeated" if block.copies > 1 else None,
        )
        for i, block in enumerate(blocks)
    ]
    file = main_file(plan.activations)
    where = f"Lines without a file are of {file}. " if file else ""
    note = (
        f"{where}An op's splits say what each mesh axis does: dp:0 splits dim 0 of the output, "
        "tp:sum a dim that is summed over, which leaves the output partial (+tp). Sizes are of the "
        "whole output, size/axis is split; bytes are one device's, of one copy. Views are grey."
    )
    return join(
        [
            element("ol", chain, class_="chain"),
            axis_key(plan),
            element("p", note, class_="small"),
            *(_details(plan, i, block, file, lines) for i, block in enumerate(blocks)),
        ]
    )


def lines_section(plan: Plan, lines: Lines) -> Markup:
    """A table of the user's source lines: what each became, and what its outputs weigh."""
    by_line: dict[str, list[Activation]] = {}
    for a in plan.activations:
        if a.source:
            by_line.setdefault(a.source, []).append(a)
    if not by_line:
        return element("p", "This plan carries no source lines.", class_="absent")
    rows: list[list[Child]] = []
    for source in sorted(by_line, key=_file_and_number):
        ops = by_line[source]
        heavy = [a for a in ops if op_family(a.op) != "view"]
        rows.append(
            [
                whole(element("code", source)),
                *([element("code", lines.get(source, ""), class_="src")] if lines else []),
                ", ".join(dict.fromkeys(a.op for a in heavy or ops)),
                coloured("; ".join(dict.fromkeys(a.splits or "-" for a in heavy)), plan.mesh.names),
                bytes_text(sum(float(a.local_bytes) * a.count for a in heavy)),
            ]
        )
    columns = ["line", *(["source"] if lines else []), "ops", "splits", ">bytes, all copies"]
    return table("Ops by source line", columns, rows, class_="lines")


def _stored_bytes(plan: Plan) -> dict[str, float]:
    """Bytes of parameters by block, or by module outside of blocks."""
    found: dict[str, float] = {}
    for group in parameter_groups(plan):
        block, inside = split_block(group.name)
        key = block or inside.rpartition(".")[0]
        found[key] = found.get(key, 0.0) + group.local_bytes
    return found


def _summary(block: Block, stored: Mapping[str, float]) -> str:
    names = [block.name] if block.name else list(dict.fromkeys(a.module for a in block.ops))
    weights = sum(stored.get(name, 0.0) for name in names) / block.copies
    each = " each" if block.copies > 1 else ""
    return _counted(block) + (f", stores {bytes_text(weights)}{each}" if weights else "")


def _counted(block: Block) -> str:
    return f"{len(block.ops)} op" + ("s" if len(block.ops) != 1 else "")


def _details(plan: Plan, index: int, block: Block, file: str, lines: Lines) -> Markup:
    axes = plan.mesh.names
    columns = ["module", "op", "line", *(["source"] if lines else []), "splits", "output", ">bytes"]
    rows = []
    for a in block.ops:
        quiet = op_family(a.op) == "view"
        cells = [
            split_block(a.module)[1] if block.name else a.module,
            _op(a, block),
            whole(element("code", a.source.removeprefix(file) if file else a.source)),
            *([element("code", lines.get(a.source, ""), class_="src")] if lines else []),
            whole(coloured(a.splits or "-", axes)),
            placed(a.type, a.sharding, axes),
            bytes_text(a.local_bytes),
        ]
        rows.append([element("span", c, class_="quiet") for c in cells] if quiet else cells)
    title = f"{block.title}, {block.copies} copies" if block.copies > 1 else block.title
    return element(
        "details",
        element("summary", title, element("small", f" {_counted(block)}")),
        table(f"Ops of {title}", columns, rows, class_="ops"),
        id=f"block-{index}",
        open=len(block.ops) <= (_MOST_OPEN if block.name else _MOST_OPEN_ONCE),
    )


def _op(a: Activation, block: Block) -> Markup:
    """The op's name, its rule as a title, and how often it runs in one copy if more than once."""
    times = a.count // block.copies
    name = element("span", a.op, title=a.rule or None, class_="whole")
    if times > 1:
        return Markup(name + element("small", f" × {times}"))
    return name


def _file_and_number(source: str) -> tuple[str, int]:
    file, _, number = source.rpartition(":")
    return file, int(number) if number.isdigit() else 0


def read_lines(plan: Plan, sources: Mapping[str, Sequence[str]]) -> Lines:
    """The text of every source line of the plan that is in `sources` (file name -> its lines)."""
    found = {}
    for a in plan.activations:
        file, number = _file_and_number(a.source)
        text = sources.get(file, ())
        if 0 < number <= len(text):
            found[a.source] = text[number - 1].strip()
    return found
