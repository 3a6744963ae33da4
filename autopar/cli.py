"""The command `autopar`: plan a model in a file, run a script on several ranks, calibrate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from autopar import __version__
from autopar.cli_questions import questions
from autopar.cli_types import ANSWER, ENDPOINT, INPUTS, NNODES, NODE_RANK, OPTIMIZER, TARGET
from autopar.errors import UserError
from autopar.nodes import check_nodes, meet

app = typer.Typer(
    name="autopar",
    help="An auto-parallelizing compiler for single-device PyTorch code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(questions)


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
    optimizer: OPTIMIZER = "adamw",
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
    target: TARGET,
    cluster: Annotated[
        str | None, typer.Option(help="Price it on this cluster; default the plan's.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="For another global batch size.")] = None,
    inputs: INPUTS = None,
    optimizer: OPTIMIZER = "adamw",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan with its new prices.")
    ] = None,
    json: ANSWER = None,
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


if __name__ == "__main__":
    main()
