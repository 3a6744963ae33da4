"""Processes of this machine that each do one rank's part of a job, described by a JSON file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopar.runtime.calibrate import RANK_ENVIRONMENT
from autopar.runtime.children import ended_together


def run_ranks(
    worker: str, ranks: int, job: Mapping[str, Any], folder: Path, quiet: bool = False
) -> Any:
    """Run `python -m WORKER JOB.json` on every rank; what rank 0 wrote to the job's `out` file.

    The job has also `rank`, `nproc`, and the path of a `store` in the folder to meet at. Raises
    RuntimeError where a rank fails; no process is left.
    """
    out = folder / "out.json"
    processes: list[subprocess.Popen[bytes]] = []
    with ended_together(processes):
        for rank in range(ranks):
            file = folder / f"{rank}.json"
            parts = {"rank": rank, "nproc": ranks, "store": f"{folder}/store", "out": str(out)}
            file.write_text(json.dumps({**job, **parts}))
            environment = {
                **os.environ,
                **RANK_ENVIRONMENT,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
            command = [sys.executable, "-m", worker, str(file)]
            stdout = subprocess.DEVNULL if quiet else None
            processes.append(subprocess.Popen(command, env=environment, stdout=stdout))
        if any(process.wait() for process in processes) or not out.exists():
            raise RuntimeError(f"{worker}: a rank failed")
        return json.loads(out.read_text())
