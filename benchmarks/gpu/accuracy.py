"""Predicted and measured time of training steps on one GPU: exits with 1 above `--limit` percent.

    python -m benchmarks.gpu.accuracy                       # calibrates this GPU first
    python -m benchmarks.gpu.accuracy --profile h100.json   # as `autopar calibrate` wrote it
    python -m benchmarks.gpu.accuracy --device cpu --tiny   # does the script work?

A row is a model in one precision (bfloat16 parameters, or bfloat16 autocast of float32 ones), run
op by op or under torch.compile. The prediction is the same for both: the cost model prices ops, and
does not know what a compiler fuses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autopar.cost.cluster import Cluster, parse_cluster
from autopar.passes.case import make_case
from autopar.passes.compute_of import compute_of
from autopar.passes.prepare import prepare
from autopar.passes.search import search
from autopar.planning import capture_training
from autopar.runtime.calibrate_cuda import calibrate_cuda
from autopar.runtime.phase_clock import PhaseClock

from .models import SUBJECTS, TINY, Subject

LIMIT = 8.0  # percent
PRECISIONS = ("bf16", "autocast")
MODES = ("eager", "compile")


@dataclass(frozen=True)
class Row:
    """A measured step; `error` is (predicted - measured) / measured."""

    model: str
    precision: str
    mode: str
    predicted_s: float
    measured_s: float
    forward_s: float
    backward_s: float
    optimizer_s: float

    @property
    def error(self) -> float:
        return (self.predicted_s - self.measured_s) / self.measured_s


def precise(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which the forward runs, and is captured."""
    if precision == "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def build(subject: Subject, precision: str, device: torch.device) -> nn.Module:
    with device:
        module = subject.build()
    return module.to(torch.bfloat16) if precision == "bf16" else module


def batch_of(subject: Subject, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (subject.batch, subject.sequence)
    ids, targets = (torch.randint(0, subject.vocab, shape, device=device) for _ in range(2))
    return ids, targets


def predict(
    module: nn.Module, batch: tuple[Tensor, Tensor], context: Any, cluster: Cluster
) -> float:
    """Seconds of a step on one device of the cluster."""
    with context:
        captured = capture_training(module, batch, {})
    one, graph = cluster.resized(1), prepare(captured.graph)
    plan = search(graph, captured.fingerprint, captured.symbols, one)
    return compute_of(make_case(graph, captured.symbols, plan, one)).step_s


def measure(
    module: nn.Module, batch: tuple[Tensor, Tensor], context: Any, device: torch.device, steps: int
) -> dict[str, float]:
    """Median seconds of the phases of a step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    clock, taken = PhaseClock(device), []
    for _ in range(steps + 3):
        with clock.phase("forward"), context:
            loss = module(*batch)
        with clock.phase("backward"):
            loss.backward()
        with clock.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        taken.append(clock.take())
    kept = taken[3:]
    found = {p: statistics.median(t[p] for t in kept) for p in kept[0]}
    return {**found, "step": statistics.median(sum(t.values()) for t in kept)}


def rows_of(options: argparse.Namespace, cluster: Cluster) -> list[Row]:
    device = torch.device(options.device)
    rows: list[Row] = []
    for name, subject in (TINY if options.tiny else SUBJECTS).items():
        for precision in options.precision:
            if options.model and name not in options.model:
                continue
            module, batch = build(subject, precision, device), batch_of(subject, device)
            predicted = predict(module, batch, precise(precision, device), cluster)
            for mode in options.mode:
                run: Any = torch.compile(module) if mode == "compile" else module
                found = measure(run, batch, precise(precision, device), device, options.steps)
                rows.append(
                    Row(
                        name,
                        precision,
                        mode,
                        predicted,
                        found["step"],
                        found["forward"],
                        found["backward"],
                        found["optimizer"],
                    )
                )
            del module
    return rows


def print_rows(rows: Sequence[Row], limit: float) -> None:
    head = ("model", "precision", "mode", "predicted", "measured", "error", "fwd", "bwd", "opt")
    print(("{:<11} {:<9} {:<8}" + " {:>10}" * 6).format(*head))
    for row in rows:
        times = (row.predicted_s, row.measured_s)
        parts = (row.forward_s, row.backward_s, row.optimizer_s)
        cells = [f"{t * 1e3:.2f} ms" for t in times]
        cells += [f"{row.error:+.1%}", *(f"{t * 1e3:.2f} ms" for t in parts)]
        mark = " <- above the limit" if abs(row.error) * 100 > limit else ""
        print(
            f"{row.model:<11} {row.precision:<9} {row.mode:<8}"
            + "".join(f" {cell:>10}" for cell in cells)
            + mark
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--profile", help="a profile, or a spec such as 1xH100")
    parser.add_argument("--model", action="append", choices=tuple(SUBJECTS))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=LIMIT, help="percent")
    parser.add_argument("--tiny", action="store_true", help="small models: tries the script only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 2
    if options.profile:
        cluster = parse_cluster(options.profile)
    else:
        cluster = calibrate_cuda() if options.device == "cuda" else parse_cluster("cpu:1")
    rows = rows_of(options, cluster)
    print_rows(rows, options.limit)
    if options.json:
        found = [{**asdict(row), "error": row.error} for row in rows]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(abs(row.error) * 100 > options.limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
