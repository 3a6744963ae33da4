"""The command `autopar`: plan a model in a file, run a script on several ranks, calibrate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from autopar import __version__
from autopar.errors import UserError
from autopar.nodes import check_nodes, meet

app = typer.Typer(
    name="autopar",
    help="An auto-parallelizing compiler for single-device PyTorch code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# Options of several hosts, named as torchrun's.
NNODES = Annotated[int, typer.Option("--nnodes", help="Hosts; start the command on each.")]
NODE_RANK = Annotated[
    int | None, typer.Option("--node-rank", help="Which host this is, from 0 on.")
]
ENDPOINT = Annotated[
    str, typer.Option("--rdzv-endpoint", help="HOST:PORT of the first host; the same on all.")
]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (`sys.argv` by default) and exit: with code 2 for the user's errors."""
    try:
        app(args=arguments)
    except UserError as error:
        print(f"autopar: {error}", file=sys.stderr)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"autopar {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:NAME",
            help="A function that returns (module, args) or (module, args, kwargs), or a module "
            "class with one --input per argument of forward.",
        ),
    ],
    cluster: Annotated[
        str, typer.Option(help="cpu:4, 8xH100, 2x8xH100 (hosts x devices) or a profile's path.")
    ] = "cpu:4",
    batch: Annotated[
        int | None, typer.Option(help="Global batch size, in place of the inputs' own.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="An argument of forward, such as 'int64[8,1024]'; repeat."),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="auto, data, zero, tensor, data+tensor, zero+tensor, pipeline, pipeline+data or "
            "pipeline+tensor."
        ),
    ] = "auto",
    memory: Annotated[
        str | None, typer.Option(help="Limit per device, such as 80GiB; default the device's.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="What the update is priced as.")] = "adamw",
    micro_batches: Annotated[
        str | None,
        typer.Option(help="What to try: 1,2,4; default powers of two that divide the batch."),
    ] = None,
    recompute: Annotated[
        str | None, typer.Option(help="What to try, of none,selective,full; default all.")
    ] = None,
    stages: Annotated[
        int | None, typer.Option(help="Stages of a pipeline; default what is best.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="Of a pipeline: gpipe, 1f1b, interleaved or zero_bubble; default best."),
    ] = None,
    hints: Annotated[
        Path | None, typer.Option(help="A JSON file of hints, see docs/hints_and_editing.md.")
    ] = None,
    kernels: Annotated[
        str, typer.Option(help="Of autopar's own: auto (where faster, none on CPU), off or all.")
    ] = "auto",
    json: Annotated[
        Path | None,
        typer.Option("--json", "--save", help="Write the plan to this file; - prints it."),
    ] = None,
) -> None:
    """Plan a model without running it: no GPU, no processes, no memory for the parameters."""
    from autopar.cli_plan import plan_target

    plan_target(
        target,
        cluster,
        batch,
        inputs or [],
        strategy,
        memory,
        optimizer,
        json,
        micro_batches,
        recompute,
        hints,
        stages,
        schedule,
        kernels,
    )


@app.command()
def check(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan, edited by hand.")],
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="Its model, as for plan.")],
    cluster: Annotated[
        str | None, typer.Option(help="Price it on this cluster; default the plan's.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="For another global batch size.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="As for plan, for module classes.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="What the update is priced as.")] = "adamw",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan with its new prices.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the answer to this file; - prints it.")
    ] = None,
) -> None:
    """Check an edited plan against its model, and price what it does now."""
    from autopar.cli_check import check_file

    check_file(
        plan,
        target,
        cluster=cluster,
        batch=batch,
        inputs=inputs or [],
        optimizer=optimizer,
        out=out,
        answer=json,
    )


@app.command()
def run(
    script: Annotated[Path, typer.Argument(help="The Python script to run on every rank.")],
    nproc: Annotated[
        int,
        typer.Option("--nproc", "-n", "--nproc-per-node", help="Processes on this machine."),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="The script's own arguments.")
    ] = None,
    nnodes: NNODES = 1,
    node_rank: NODE_RANK = None,
    rdzv_endpoint: ENDPOINT = "",
    rdzv_backend: Annotated[
        str, typer.Option(help="static, or c10d, which needs no --node-rank.")
    ] = "",
    rdzv_id: Annotated[str, typer.Option(help="Name of the run, the same on all.")] = "autopar",
    rdzv_timeout: Annotated[int, typer.Option(help="Seconds to wait for the other hosts.")] = 300,
    memory: Annotated[
        str | None,
        typer.Option(help="Limit per rank, such as 6GiB; measured and shown at the end."),
    ] = None,
    compress: Annotated[
        str | None, typer.Option(help="int8: gradients between hosts, at a price in accuracy.")
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(help="auto, off, all or interpret: where autopar's own run.")
    ] = None,
) -> None:
    """Run a script on several ranks of this machine, or of several hosts.

    For several hosts, start it on each, with options as torchrun has them.
    """
    from autopar.cli_run import run_script

    nodes = check_nodes(nnodes, node_rank, rdzv_endpoint, rdzv_backend, rdzv_id)
    code = run_script(
        script, nproc, arguments or [], nodes, rdzv_timeout, memory, compress, kernels
    )
    raise typer.Exit(code)


@app.command()
def calibrate(
    nproc: Annotated[int, typer.Option("--nproc", "-n", help="Ranks to measure at once.")] = 4,
    out: Annotated[Path, typer.Option(help="Where to write the profile.")] = Path("cluster.json"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Most of a minute in place of two.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda: one GPU.")] = "cpu",
    links: Annotated[
        str | None,
        typer.Option(help="For cuda: shipped profile of the links; default the GPU's model."),
    ] = None,
    nnodes: NNODES = 1,
    node_rank: NODE_RANK = None,
    rdzv_endpoint: ENDPOINT = "",
) -> None:
    """Measure this machine and write its profile, for AUTOPAR_CLUSTER, --cluster and cluster=.

    With --nnodes, started on every host, it measures the network between them too.
    """
    if device == "cuda":
        from autopar.runtime.calibrate_cuda import calibrate_cuda

        calibrate_cuda(out, quick, links)
    else:
        from autopar.runtime.calibrate import Hosts
        from autopar.runtime.calibrate import calibrate as measure

        place = check_nodes(nnodes, node_rank, rdzv_endpoint, "static")
        meet(place, 300)
        hosts = Hosts(place.count, place.this or 0, place.endpoint)
        measure(nproc, device, out=out, quick=quick, hosts=hosts)
    print(f"wrote {out}; set AUTOPAR_CLUSTER={out} to plan with it, or name it as --cluster")


@app.command()
def report(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan, as plan --json made.")],
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


@app.command()
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


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan, as plan --json made.")],
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="Its model, as for plan.")],
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
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="As for plan, for module classes.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Price it on this cluster; default the plan's.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Limit per device, such as 80GiB; default the device's.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="What the update is priced as.")] = "adamw",
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the answer to this file; - prints it.")
    ] = None,
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


@app.command("what-if")
def what_if(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan, as plan --json made.")],
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="Its model, as for plan.")],
    batch: Annotated[int | None, typer.Option(help="Another global batch size.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Another sequence length.")] = None,
    devices: Annotated[int | None, typer.Option(help="Another number of the same devices.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Another cluster, as for plan.")] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(help="LEVEL=FACTOR or LEVEL=NUMBERGB/s, such as network=2; repeat."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Another limit per device: 40GiB.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="As for plan, for module classes.")
    ] = None,
    planned_on: Annotated[
        str | None, typer.Option(help="Profile of the plan's own cluster, if it is not shipped.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="What the update is priced as.")] = "adamw",
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the answer to this file; - prints it.")
    ] = None,
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


@app.command()
def timeline(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan, as plan --json made.")],
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="Its model, as for plan.")],
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for ui.perfetto.dev to this file.")
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="As for plan, for module classes.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Simulate it on this cluster; default the plan's.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="What the update is priced as.")] = "adamw",
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file; - prints them.")
    ] = None,
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


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan, as plan --json made.")],
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="Its model, as for plan.")],
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
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for ui.perfetto.dev to this file.")
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="As for plan, for module classes.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="What the update is priced as.")] = "adamw",
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file; - prints them.")
    ] = None,
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


@app.command()
def kernels(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan, as plan --json made.")],
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="Its model, as for plan.")],
    arch: Annotated[
        str | None, typer.Option(help="sm_80, sm_90, gfx942, ...; default the plan's GPUs'.")
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="As for plan, for module classes.")
    ] = None,
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


@app.command("measure-rank")
def measure_rank(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan, as plan --json made.")],
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="Its model, as for plan.")],
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
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="As for plan, for module classes.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="Which optimizer runs and is priced.")] = "adamw",
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file; - prints them.")
    ] = None,
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


if __name__ == "__main__":
    main()
