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
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .kernel_use import KERNEL_MODES
from .launch import COMPRESS, FAILURES, KERNELS, LAUNCHER, MEMORY
from .nodes import MEET_FIX, Nodes, first_line, meet

if TYPE_CHECKING:  # torch takes long to load
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

# Page faults otherwise dominate: a 64 MB clone takes 60 to 205 ms instead of 14 to 20. The store
# that torch shares by default breaks restarts on gloo.
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
MEET_S = 300  # in which all hosts of a run must have been started
GRACE_S = 5  # between SIGTERM and SIGKILL for ranks whose sibling failed


@dataclass(frozen=True)
class _Failure:
    """What a rank left: `kind` is "user" (UserError), "exit" (sys.exit) or "error"."""

    rank: int
    kind: str
    text: str
    time: float


def run_script(
    script: Path,
    nproc: int,
    arguments: list[str],
    nodes: Nodes | None = None,
    timeout_s: int = MEET_S,
    memory: str | None = None,
    compress: str | None = None,
    kernels: str | None = None,
) -> int:
    """Run `script` on `nproc` ranks of this machine; the exit code that the command ends with.

    `memory` is the limit per rank of a model whose `parallelize` names none, `compress` how its
    gradients travel, `kernels` where autopar's own run. With several `nodes`,
    each of them makes the same call, and has `timeout_s` to do so. The code
    is 0, the script's own, 2 for a UserError, and 128 + n where signal n ended a rank or this
    command. Raises UserError for a script or a number of processes that cannot be started, and for
    hosts that do not come.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    nodes = nodes or Nodes()
    if not script.is_file():
        raise UserError(f"there is no script {script}", fix="give the path of a Python file")
    if nproc < 1:
        raise UserError(f"cannot start {nproc} processes", fix="use --nproc 1 or more")
    if memory is not None:
        from .api import parse_bytes  # which loads torch

        parse_bytes(memory)
        os.environ[MEMORY] = memory
    if compress is not None:
        from .compression import checked_compression

        os.environ[COMPRESS] = checked_compression(compress) or ""
    if kernels is not None:
        if kernels not in KERNEL_MODES:
            choices = ", ".join(map(repr, KERNEL_MODES))
            raise UserError(f"unknown kernels {kernels!r}", fix=f"use one of {choices}")
        os.environ[KERNELS] = kernels
    with tempfile.TemporaryDirectory(prefix="autopar-run-") as folder:
        failures = Path(folder, "failures")
        failures.mkdir()
        logs = DefaultLogsSpecs(log_dir=str(Path(folder, "logs")))
        config = _config(nproc, nodes, timeout_s, logs)
        code, rank = _launch(config, script, arguments, failures, nodes, timeout_s)
        if code:
            left = _read(failures)
            _show(left, code, rank)
            if nodes.count > 1 and rank >= 0 and all(f.kind != "user" for f in left):
                print("autopar: the other hosts may have said more", file=sys.stderr)
    return code


def _config(nproc: int, nodes: Nodes, timeout_s: int, logs: DefaultLogsSpecs) -> LaunchConfig:
    """How torch's launcher starts the ranks, and where they meet."""
    from torch.distributed.launcher.api import LaunchConfig

    from .compat import shutdown_timeout

    several = nodes.count > 1
    meeting: dict[str, Any] = {}
    if several and nodes.backend == "static":
        meeting = {"rank": nodes.this, "timeout": timeout_s}
    elif several:
        meeting = {"join_timeout": timeout_s, "timeout": timeout_s}
    return LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=nproc,
        run_id=nodes.run_id if several else uuid.uuid4().hex,
        rdzv_backend=nodes.backend if several else "c10d",
        rdzv_endpoint=nodes.endpoint if several else "127.0.0.1:0",
        rdzv_configs=meeting,
        local_addr=None if several else "127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=logs,
        **shutdown_timeout(GRACE_S),
    )


def _launch(
    config: LaunchConfig,
    script: Path,
    arguments: list[str],
    failures: Path,
    nodes: Nodes,
    timeout_s: int,
) -> tuple[int, int]:
    """Start the ranks and wait for them: (exit code, the rank that failed first)."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    for name, value in RANK_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ |= {FAILURES: str(failures), LAUNCHER: str(os.getpid())}
    logging.disable(logging.CRITICAL)  # of this process: the agent's own reports
    meet(nodes, timeout_s)
    try:
        elastic_launch(config, sys.executable)("-m", "autopar.launch", str(script), *arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        return _shell_code(first.exitcode), rank
    except SignalException as stop:
        return 128 + stop.sigval, -1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, -1
    except (DistError, RendezvousError) as error:
        if nodes.count == 1:
            raise
        raise UserError(
            f"the {nodes.count} hosts did not meet at {nodes.endpoint}: {first_line(error)}",
            fix=MEET_FIX,
        ) from None
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
