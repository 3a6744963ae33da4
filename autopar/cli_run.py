"""`autopar run`: start the ranks of a script, and end with what the first failure says."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .launch import FAILURES, LAUNCHER

# Page faults otherwise dominate: a 64 MB clone takes 60 to 205 ms instead of 14 to 20. The store
# that torch shares by default breaks restarts on gloo.
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
GRACE_S = 5  # between SIGTERM and SIGKILL for ranks whose sibling failed


@dataclass(frozen=True)
class _Failure:
    """What a rank left: `kind` is "user" (UserError), "exit" (sys.exit) or "error"."""

    rank: int
    kind: str
    text: str
    time: float


def run_script(script: Path, nproc: int, arguments: list[str]) -> int:
    """Run `script` on `nproc` ranks of this machine; the exit code that the command ends with.

    It is 0, the script's own, 2 for a UserError, and 128 + n where signal n ended a rank or this
    command. Raises UserError for a script or a number of processes that cannot be started.
    """
    if not script.is_file():
        raise UserError(f"there is no script {script}", fix="give the path of a Python file")
    if nproc < 1:
        raise UserError(f"cannot start {nproc} processes", fix="use --nproc 1 or more")
    with tempfile.TemporaryDirectory(prefix="autopar-run-") as folder:
        failures = Path(folder, "failures")
        failures.mkdir()
        code, rank = _launch(script, nproc, arguments, failures, Path(folder, "logs"))
        if code:
            _show(_read(failures), code, rank)
    return code


def _launch(
    script: Path, nproc: int, arguments: list[str], failures: Path, logs: Path
) -> tuple[int, int]:
    """Start the ranks and wait for them: (exit code, the rank that failed first)."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name, value in RANK_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ |= {FAILURES: str(failures), LAUNCHER: str(os.getpid())}
    logging.disable(logging.CRITICAL)  # of this process: the agent's own reports
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        shutdown_timeout=GRACE_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "autopar.launch", str(script), *arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        return _shell_code(first.exitcode), rank
    except SignalException as stop:
        return 128 + stop.sigval, -1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, -1
    return 0, -1


def _shell_code(exitcode: int) -> int:
    return exitcode if exitcode >= 0 else 128 - exitcode


def _read(folder: Path) -> list[_Failure]:
    found = []
    for file in folder.glob("*.json"):
        found.append(_Failure(rank=int(file.stem), **json.loads(file.read_text())))
    return found


def _show(failures: list[_Failure], code: int, rank: int) -> None:
    """Print one failure: the lowest rank's UserError, else what failed first."""
    if rank < 0:
        return
    users = [failure for failure in failures if failure.kind == "user"]
    if users:
        print(f"autopar: {min(users, key=lambda f: f.rank).text}", file=sys.stderr)
        return
    if failures:
        first = min(failures, key=lambda f: f.time)
        if first.kind == "error":
            print(f"autopar: rank {first.rank} failed:", file=sys.stderr)
        if first.text:
            print(first.text.rstrip("\n"), file=sys.stderr)
        return
    how = f"was ended by {signal.Signals(code - 128).name}" if code > 128 else f"exited with {code}"
    hint = " (out of memory?)" if code == 128 + signal.SIGKILL else ""
    print(f"autopar: rank {rank} {how}{hint}", file=sys.stderr)
