"""Arguments and options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PLAN = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan, as plan --json made.")]
TARGET = Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="Its model, as for plan.")]
INPUTS = Annotated[
    list[str] | None, typer.Option("--input", help="As for plan, for module classes.")
]
OPTIMIZER = Annotated[str, typer.Option(help="What the update is priced as.")]
ANSWER = Annotated[
    Path | None, typer.Option("--json", help="Write the answer to this file; - prints it.")
]
FIGURES = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file; - prints them.")
]
TRACE = Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev to this file.")]

# Options of several hosts, named as torchrun's.
NNODES = Annotated[int, typer.Option("--nnodes", help="Hosts; start the command on each.")]
NODE_RANK = Annotated[
    int | None, typer.Option("--node-rank", help="Which host this is, from 0 on.")
]
ENDPOINT = Annotated[
    str, typer.Option("--rdzv-endpoint", help="HOST:PORT of the first host; the same on all.")
]
