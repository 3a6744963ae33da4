"""One rank of `benchmarks.memory`: a model under a plan, and the peak of its steps.

Run as `python -m benchmarks.memory_worker JOB.json`; rank 0 writes the job's `out` file.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import autopar
from autopar.clusters import cluster_of_run
from autopar.cost.cluster import parse_cluster
from autopar.errors import UserError
from autopar.first_plan import LEFT
from autopar.plan import Plan
from autopar.planning import make_plan
from autopar.runtime.arena import held_bytes
from autopar.runtime.live_memory import LiveBytes, peak_bytes

from .memory_models import MEMORY_MODELS
from .validation_models import ValidationModel

CPU = torch.device("cpu")


def resident(name: str) -> int:
    """A size in bytes that Linux keeps of this process: `VmHWM`, `VmRSS`, `RssShmem`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def plan_of(job: dict[str, Any], model: ValidationModel, batch: tuple[Tensor, ...]) -> Plan | None:
    """A plan with the recomputation or micro-batches of the job; None where it asks for none."""
    if job["recompute"] is None and job["micro_batches"] is None:
        return None
    limit = job["limit_mib"]
    cluster = cluster_of_run("cpu", parse_cluster(job["cluster"]) if job["cluster"] else None)
    return make_plan(
        model.build(),
        batch,
        {},
        cluster,
        strategy=job["strategy"],
        memory_limit=limit * 2**20 * (1 - LEFT) if limit is not None else None,
        recompute=(job["recompute"] or "none",),
        micro_batches=(job["micro_batches"] or 1,),
    )


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps; this rank's peaks in bytes and the plan."""
    model = MEMORY_MODELS[job["model"]]
    batch = model.batch_of(torch.Generator().manual_seed(0))
    limit = job["limit_mib"]
    plan = plan_of(job, model, batch)
    torch.manual_seed(0)
    module: Any = autopar.parallelize(
        model.build(),
        strategy=job["strategy"],
        cluster=job["cluster"],
        plan=plan,
        memory_limit=limit * 2**20 if limit is not None else None,
    )
    module.autopar.prepare(*batch)
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        module(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state, and the memory that is shared with the peers
    states = [x for state in optimizer.state.values() for x in state.values()]
    known = [*parameters, *module.buffers(), *batch]
    known += [x for x in states if isinstance(x, Tensor)]
    measured = max(peak_bytes(step, CPU, known) for _ in range(job["steps"]))
    at_rest = LiveBytes(known)
    rest = at_rest.now
    at_rest.close()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS") - resident("RssShmem")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    for _ in range(job["steps"]):
        step()
    grown = resident("VmHWM") - resident("RssShmem") - before
    plan = module.autopar.plan
    assert plan is not None
    return {
        "measured": measured,
        "resident": rest + grown + held_bytes(),
        "predicted": plan.predicted.memory_bytes,
        "plan": _text(plan),
    }


def _text(plan: Plan) -> str:
    parts = [str(plan.mesh)]
    if plan.micro_batches > 1:
        parts.append(f"{plan.micro_batches} micro-batches")
    for name in ("full", "selective"):
        copies = sum(getattr(r, name) for r in plan.recompute)
        if copies:
            parts.append(f"{name} {copies} of {sum(r.copies for r in plan.recompute)}")
    return ", ".join(parts)


def main(path: str) -> None:
    """Run one rank's job."""
    job = json.loads(Path(path).read_text())
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, ranks = job["rank"], job["nproc"]
    meet = f"file://{job['store']}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    try:
        mine = measure(job)
    except UserError as error:  # on all ranks
        mine = {"failed": error.what}
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine)
    if rank == 0:
        shared = {name: mine[name] for name in ("predicted", "plan", "failed") if name in mine}
        Path(job["out"]).write_text(json.dumps({**shared, "ranks": every}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
