"""The commands that ask about a plan: what is in it, why, what it costs elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopar.cli_types import ANSWER, FIGURES, INPUTS, OPTIMIZER, PLAN, TARGET, TRACE

questions = typer.Typer()


@questions.command()
def report(
    plan: PLAN,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
    source: Annotated[
        list[Path] | None,
        typer.Option(help="A source file of the model, whose lines are then shown; repeat."),
    ] = None,
) -> None:
    """Write a plan as one HTML page that opens without network."""
    from autopar.cli_report import report_plan

    report_plan(plan, out, source or [])


@questions.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A plan.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
    json: Annotated[
        Path | None, typer.Option(help="Write what differs to this file; - prints it.")
    ] = None,
) -> None:
    """Show what differs between two plans."""
    from autopar.cli_report import compare_files

    compare_files(a, b, json)


@questions.command()
def explain(
    plan: PLAN,
    target: TARGET,
    op: Annotated[
        str | None, typer.Option(help="Explain an op: its name, module, source line or a pattern.")
    ] = None,
    param: Annotated[str | None, typer.Option(help="Explain how a parameter is stored.")] = None,
    formula: Annotated[bool, typer.Option("--formula", help="With the op's formulas.")] = False,
    crossover: Annotated[
        str | None,
        typer.Option(help="Where another plan wins: batch, sequence, bandwidth or memory."),
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="Another plan of the model for --crossover; repeat.")
    ] = None,
    level: Annotated[
        str | None, typer.Option(help="Whose bandwidth --crossover varies; default the outermost.")
    ] = None,
    inputs: INPUTS = None,
    cluster: Annotated[
        str | None, typer.Option(help="Price it on this cluster; default the plan's.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Limit per device, such as 80GiB; default the device's.")
    ] = None,
    optimizer: OPTIMIZER = "adamw",
    json: ANSWER = None,
) -> None:
    """Explain a plan: its costs as formulas, why an op does what it does, where others win."""
    from autopar.cli_explain import explain_plan

    explain_plan(
        plan,
        target,
        op=op,
        param=param,
        formula=formula,
        crossover=crossover,
        against=against or [],
        level=level,
        inputs=inputs or [],
        cluster=cluster,
        memory=memory,
        optimizer=optimizer,
        out=json,
    )


@questions.command("what-if")
def what_if(
    plan: PLAN,
    target: TARGET,
    batch: Annotated[int | None, typer.Option(help="Another global batch size.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Another sequence length.")] = None,
    devices: Annotated[int | None, typer.Option(help="Another number of the same devices.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Another cluster, as for plan.")] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(help="LEVEL=FACTOR or LEVEL=NUMBERGB/s, such as network=2; repeat."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Another limit per device: 40GiB.")] = None,
    inputs: INPUTS = None,
    planned_on: Annotated[
        str | None, typer.Option(help="Profile of the plan's own cluster, if it is not shipped.")
    ] = None,
    optimizer: OPTIMIZER = "adamw",
    json: ANSWER = None,
) -> None:
    """Price a plan at another setting, next to the best plan there."""
    from autopar.cli_what_if import what_if as ask_what_if

    ask_what_if(
        plan,
        target,
        batch=batch,
        sequence=sequence,
        devices=devices,
        cluster=cluster,
        bandwidth=tuple(bandwidth or ()),
        memory=memory,
        inputs=tuple(inputs or ()),
        planned_on=planned_on,
        optimizer=optimizer,
        out=json,
    )


@questions.command()
def timeline(
    plan: PLAN,
    target: TARGET,
    trace: TRACE = None,
    inputs: INPUTS = None,
    cluster: Annotated[
        str | None, typer.Option(help="Simulate it on this cluster; default the plan's.")
    ] = None,
    optimizer: OPTIMIZER = "adamw",
    json: FIGURES = None,
) -> None:
    """Simulate a plan's step: what overlaps, what is waited for, memory over time."""
    from autopar.cli_timeline import show_timeline

    show_timeline(
        plan,
        target,
        inputs=tuple(inputs or ()),
        cluster=cluster,
        optimizer=optimizer,
        trace=trace,
        out=json,
    )


@questions.command()
def simulate(
    plan: PLAN,
    target: TARGET,
    cluster: Annotated[str | None, typer.Option(help="Another cluster, as for plan.")] = None,
    batch: Annotated[int | None, typer.Option(help="Another global batch size.")] = None,
    micro_batches: Annotated[
        int | None, typer.Option(help="Micro-batches that the batch is divided into.")
    ] = None,
    stages: Annotated[int, typer.Option(help="Pipeline stages, each on a mesh of its own.")] = 1,
    chunks: Annotated[int, typer.Option(help="Pieces of the model per pipeline stage.")] = 1,
    schedule: Annotated[
        str | None, typer.Option(help="gpipe, 1f1b, interleaved or zero_bubble.")
    ] = None,
    overlap: Annotated[
        bool | None,
        typer.Option("--overlap/--no-overlap", help="Whether collectives run beside compute."),
    ] = None,
    slowdown: Annotated[
        float | None, typer.Option(help="How much slower compute is meanwhile: 0.1 is a tenth.")
    ] = None,
    prefetch: Annotated[
        int | None, typer.Option(help="Blocks by which gathers of parameters are ahead.")
    ] = None,
    reduce_every: Annotated[
        bool | None,
        typer.Option(
            "--reduce-every/--reduce-last",
            help="Reduce gradients in every micro-batch or in the last one.",
        ),
    ] = None,
    trace: TRACE = None,
    inputs: INPUTS = None,
    optimizer: OPTIMIZER = "adamw",
    json: FIGURES = None,
) -> None:
    """Simulate a plan elsewhere or otherwise: cluster, batch, micro-batches, pipeline, overlap."""
    from autopar.cli_timeline import Changes, simulate_plan

    changes = Changes(
        cluster,
        batch,
        micro_batches,
        schedule,
        stages,
        chunks,
        overlap,
        slowdown,
        prefetch,
        reduce_every,
    )
    simulate_plan(
        plan,
        target,
        changes,
        inputs=tuple(inputs or ()),
        optimizer=optimizer,
        trace=trace,
        out=json,
    )


@questions.command()
def kernels(
    plan: PLAN,
    target: TARGET,
    arch: Annotated[
        str | None, typer.Option(help="sm_80, sm_90, gfx942, ...; default the plan's GPUs'.")
    ] = None,
    inputs: INPUTS = None,
    cluster: Annotated[
        str | None, typer.Option(help="The plan's, if it is not a shipped one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the sources to files in this folder.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all of it to this file; - prints it.")
    ] = None,
) -> None:
    """Print the Triton that a plan will run, autopar's and Inductor's, compiled without a GPU."""
    from autopar.cli_kernels import show_kernels

    show_kernels(
        plan,
        target,
        architecture=arch,
        inputs=inputs or [],
        cluster=cluster,
        out=json,
        folder=out,
    )


@questions.command("measure-rank")
def measure_rank(
    plan: PLAN,
    target: TARGET,
    rank: Annotated[
        int | None, typer.Option(help="Which rank; default the one with the largest shards.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 3,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default cuda where there is one.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", "--cluster", help="Whose device is predicted; default the plan's cluster."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads on a CPU; default 1 for plans of several ranks.")
    ] = None,
    inputs: INPUTS = None,
    optimizer: Annotated[str, typer.Option(help="Which optimizer runs and is priced.")] = "adamw",
    json: FIGURES = None,
) -> None:
    """Run one rank of a plan alone, collectives skipped: its compute, predicted and measured."""
    from autopar.cli_measure import measure_rank as measure

    measure(
        plan,
        target,
        rank=rank,
        steps=steps,
        warmup=warmup,
        device=device,
        cluster=profile,
        threads=threads,
        inputs=tuple(inputs or ()),
        optimizer=optimizer,
        out=json,
    )
