"""`autopar kernels`: the Triton that a plan will run, compiled for a GPU that is not here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from .cli_explain import check_out, write_json
from .cli_report import write_whole
from .errors import UserError
from .inductor_ahead import InductorKernels, inductor_kernels
from .ir.graph import Graph
from .kernel_forms import OwnKernel, own_kernels
from .kernel_use import KernelUse, places_of
from .passes.rank_program import rank_program
from .passes.step_formula import BATCH
from .plan import Plan, load_plan
from .questions import Question, ask
from .report import fitted, make_console, plain_table
from .runtime.kernels.ahead import Assembled, Specialisation, assemble, check_architecture
from .runtime.kernels.support import interpreted
from .units import bytes_text

# Of the devices of shipped clusters.
_ARCHITECTURE_OF = {
    "A100": "sm_80",
    "H100": "sm_90",
    "H200": "sm_90",
    "B200": "sm_100",
    "MI300X": "gfx942",
}


def show_kernels(
    plan_file: Path,
    target: str,
    *,
    architecture: str | None = None,
    inputs: Sequence[str] = (),
    cluster: str | None = None,
    out: Path | None = None,
    folder: Path | None = None,
) -> None:
    """Print the kernels of a plan (see `autopar kernels --help`); raises UserError for bad input.

    With `folder` every source is a file in it, and not printed.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed", fix="pip install 'autopar[kernels]'")
    if interpreted():
        raise UserError(
            "kernels cannot be compiled under Triton's interpreter",
            fix="run this without TRITON_INTERPRET",
        )
    plan = load_plan(plan_file)
    chosen = architecture or architecture_of(plan)
    check_architecture(chosen)
    check_out(out, plan_file)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"cannot write into {folder}: it is not a folder", fix="name another one")
    console = make_console()
    with make_console(stderr=True).status(f"loading {target}") as status:
        question = ask(plan_file, target, inputs=inputs, cluster=cluster, progress=status.update)
        status.update("lowering rank 0")
        program = program_of(question)
        status.update(f"compiling autopar's kernels for {chosen}")
        own = own_kernels(program, plan.stage_mesh, [use.kernel for use in plan.kernels])
        rows = [_own(kernel, plan.kernels, chosen) for kernel in own]
        calls: Mapping[str, int] = {}
        if chosen.startswith("sm_"):
            status.update(f"compiling Inductor's kernels for {chosen}")
            made = inductor_kernels(program, chosen)
            rows += _inductor(made, plan.micro_batches, chosen)
            calls = {name: n * plan.micro_batches for name, n in made.calls.items()}
    if not rows:
        raise UserError("nothing of this plan runs in Triton", fix="see `autopar plan`")
    found = {"architecture": chosen, "kernels": rows, "library_calls": dict(calls)}
    if folder is not None:
        _write_sources(folder, rows)
    if out is not None:
        write_json(out, found)
    if out is None or str(out) != "-":
        print_kernels(found, plan, console, sources=folder is None)
        for path in (folder, out):
            if path is not None:
                console.print(Text(f"wrote {path}"))


def architecture_of(plan: Plan) -> str:
    """That of the devices that the plan is for; raises UserError where no kernel runs on them."""
    for name, found in _ARCHITECTURE_OF.items():
        if name.lower() in plan.cluster.lower():
            return found
    raise UserError(
        f"the plan is for {plan.cluster}, which is no GPU that kernels are known to run on",
        fix="plan for GPUs (--cluster 4xH100), or name one: --arch sm_90",
    )


def program_of(question: Question) -> Graph:
    """Rank 0's program of one micro-batch, with the plan's kernels; of all stages of a pipeline."""
    plan = question.plan
    sizes = {s: n // plan.micro_batches if s == BATCH else n for s, n in question.hints.items()}
    places = places_of(plan.kernels, "auto")
    one = replace(plan, mesh=plan.stage_mesh, pipeline=None)
    return rank_program(question.graph, sizes, one, 0, kernels=places)


def _own(kernel: OwnKernel, uses: Sequence[KernelUse], architecture: str) -> dict[str, Any]:
    mine = [use for use in uses if use.kernel == kernel.use]
    return {
        "by": "autopar",
        "use": kernel.use,
        "where": list(dict.fromkeys(place for use in mine for place in use.where)),
        "count": kernel.places,
        **_compiled(kernel.form, architecture),
    }


def _inductor(
    found: InductorKernels, micro_batches: int, architecture: str
) -> list[dict[str, Any]]:
    return [
        {
            "by": "inductor",
            "use": kernel.phase,
            "where": [],
            "count": kernel.count * micro_batches,
            "configurations": kernel.configs,
            **_compiled(kernel.form, architecture),
        }
        for kernel in found.kernels
    ]


def _compiled(form: Specialisation, architecture: str) -> dict[str, Any]:
    made: Assembled = assemble(form, architecture)
    return {
        "name": form.kernel.name,
        "form": {**form.signature, **{k: str(v) for k, v in form.constants.items()}},
        "warps": form.warps(architecture),
        "registers": made.registers,
        "shared_bytes": made.shared_bytes,
        "spilled_bytes": made.stack_bytes,
        "wide_loads": made.wide_loads,
        "wide_stores": made.wide_stores,
        "source": form.kernel.source,
    }


def _write_sources(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every source as `01_autopar_pack.py`, in the order of the table."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}", fix="name another one") from None
    for i, row in enumerate(rows, 1):
        write_whole(folder / f"{i:02d}_{row['by']}_{row['name']}.py", row["source"])


def print_kernels(
    found: Mapping[str, Any], plan: Plan, console: Console, sources: bool = True
) -> None:
    """Two tables, what libraries do, and the sources in the tables' order."""
    rows: list[dict[str, Any]] = found["kernels"]
    console.print()
    console.print(f"kernels for {found['architecture']} of {plan.mesh} on {plan.cluster}, rank 0")
    for by, title in (("autopar", "autopar's own"), ("inductor", "Inductor's")):
        mine = [(i, row) for i, row in enumerate(rows, 1) if row["by"] == by]
        console.print()
        if not mine:
            console.print(f"{title}: none")
            continue
        console.print(_table(title, mine))
    if found["library_calls"]:
        calls = ", ".join(f"{name} {n}×" for name, n in found["library_calls"].items())
        console.print()
        console.print(Text(f"of libraries, not in Triton: {calls}"))
    if str(found["architecture"]).startswith("gfx"):
        console.print("Inductor's kernels are shown for NVIDIA's architectures alone", style="dim")
    console.print()
    for i, row in enumerate(rows, 1) if sources else ():
        console.print(Text(f"# {i}  {row['by']}: {row['name']}", style="bold"))
        if console.is_terminal:
            console.print(Syntax(row["source"].rstrip(), "python", word_wrap=True))
        else:
            console.out(row["source"].rstrip(), highlight=False)
        console.print()


def _table(title: str, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Table:
    columns = (">", "*kernel", "for", ">×", ">registers", ">shared", ">spills", ">128-bit")
    cells: list[tuple[str, ...]] = [
        (
            str(i),
            row["name"].removeprefix("triton_"),
            row["use"],
            str(row["count"]),
            str(row["registers"]),
            bytes_text(row["shared_bytes"]),
            bytes_text(row["spilled_bytes"]),
            f"{row['wide_loads']}, {row['wide_stores']}",
        )
        for i, row in rows
    ]
    return fitted(plain_table(title, *columns), cells)
