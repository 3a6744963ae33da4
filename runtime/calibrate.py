"""`autopar calibrate`: measure this machine and write its cluster profile.

Every number is a median taken while all ranks work at once, because they share memory bandwidth and
caches. A step waits for the slowest rank wherever ranks meet: the rates of a rank are those of the
last one, its `skew` behind their mean. The same compute is measured once more in one process
with all threads, so that the plan "one process" can be priced.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from autopar.cost.cluster import Cluster, Level
from autopar.cost.profile import save_profile
from autopar.errors import UserError

from .calibrate_collectives import Sample
from .calibrate_curves import collectives_from_samples, device_from_samples
from .children import ended_together

# Page faults otherwise dominate: a 64 MB clone takes 60 to 205 ms instead of 14 to 20.
RANK_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}
ROUNDS = {False: (3, 2), True: (1, 1)}  # by `quick`: on the ranks, and in one process
RENDEZVOUS_S = 300  # in which all hosts must have been started, and a collective must end
FOREIGN_SHARE = 0.1  # of the cores: the user hears of other programs that use more
MEMORY_SHARE = 0.85  # of the machine's memory, for all ranks together


@dataclass(frozen=True)
class Hosts:
    """Several hosts that are measured together; `endpoint` is HOST:PORT of the first of them."""

    count: int = 1
    this: int = 0
    endpoint: str = ""


def calibrate(
    nproc: int,
    device: str = "cpu",
    out: Path | None = None,
    quick: bool = False,
    hosts: Hosts | None = None,
) -> Cluster:
    """Measure `nproc` ranks of this machine; write the profile to `out` and return the cluster.

    Takes about two minutes, with `quick` most of one, and half a minute more where `hosts` are
    measured together: every host must make the same call, with its own `this`. Raises UserError for
    a device that cannot be measured, a count below 2, or ranks that fail or do not find each other.
    """
    hosts = hosts or Hosts()
    if device != "cpu":
        raise UserError(f"cannot calibrate the device {device!r}", fix="use `cpu`")
    if nproc < 2:
        raise UserError(f"cannot calibrate {nproc} rank", fix="use at least 2 ranks")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"cannot write {out}: its folder does not exist", fix="make the folder")
    cores = len(os.sched_getaffinity(0))
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    ) as progress:
        task = progress.add_task("starting", total=None)
        on_ranks, alone = ROUNDS[quick]

        def step(what: str) -> None:
            progress.update(task, description=what)

        ranks, foreign = _run(nproc, 1, quick, on_ranks, step, hosts)
        single, _ = _run(1, cores, quick, alone, step)
        progress.update(task, description="done", total=1, completed=1)
        if foreign > FOREIGN_SHARE:
            progress.console.print(
                f"[yellow]other programs used {foreign:.0%} of the processors meanwhile: "
                "calibrate again when the machine is quiet[/yellow]"
            )
    where = f"{_cpu_name()}, {cores} cores, torch {torch.__version__.split('+')[0]}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * MEMORY_SHARE
    all_of_them = f"{hosts.count} hosts of " if hosts.count > 1 else ""
    source = f"autopar calibrate, {all_of_them}{nproc} ranks at once: {where}"
    levels = [Level("host", nproc, collectives_from_samples(ranks, source))]
    if hosts.count > 1:
        between = collectives_from_samples(ranks, source, "network")
        levels.append(Level("network", nproc * hosts.count, between))
    cluster = Cluster(
        (f"{hosts.count}x" if hosts.count > 1 else "") + f"{nproc}xcpu",
        device_from_samples("cpu", ranks, memory / nproc, source),
        tuple(levels),
        device_from_samples(
            f"cpu, {cores} threads", single, memory, f"autopar calibrate, 1 process: {where}"
        ),
    )
    if out is not None:
        save_profile(cluster, out)
    return cluster


def _cpu_name() -> str:
    """Model name of the processor, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _run(
    nproc: int,
    threads: int,
    quick: bool,
    rounds: int,
    step: Callable[[str], None],
    hosts: Hosts | None = None,
) -> tuple[list[Sample], float]:
    """Start this host's ranks; the results and the foreign load; ends them all when one fails."""
    hosts = hosts or Hosts()
    title = f"{nproc} ranks" if nproc > 1 else f"one process with {threads} threads"
    if hosts.count > 1:
        title = f"{hosts.count} hosts of {title}"
    processes: list[subprocess.Popen[str]] = []
    temporary = tempfile.TemporaryDirectory(prefix="autopar-calibrate-")
    environment = {**os.environ, **RANK_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    with temporary as folder, ended_together(processes):
        for rank in range(nproc):
            job = Path(folder) / f"{rank}.json"
            job.write_text(
                json.dumps(
                    {
                        "rank": hosts.this * nproc + rank,
                        "nproc": nproc * hosts.count,
                        "inside": nproc,
                        "threads": threads,
                        "quick": quick,
                        "rounds": rounds,
                        "store": f"tcp://{hosts.endpoint}"
                        if hosts.count > 1
                        else f"file://{folder}/store",
                        "timeout_s": RENDEZVOUS_S,
                    }
                )
            )
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "autopar.runtime.calibrate_worker", str(job)],
                    env=environment,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=(Path(folder) / f"{rank}.err").open("w"),
                    text=True,
                )
            )
        results: list[Sample] = []
        foreign = 0.0
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            message = json.loads(line)
            if "progress" in message:
                step(f"{title}: {message['progress']}")
            else:
                results = [(str(k), float(x), float(t)) for k, x, t in message["results"]]
                foreign = float(message["foreign"])
        codes = [process.wait() for process in processes]
        if any(codes) or not results:
            errors = [(Path(folder) / f"{rank}.err").read_text() for rank in range(nproc)]
            last = next((e.strip().splitlines()[-1] for e in errors if e.strip()), "no message")
            raise UserError(f"calibration failed on {title}: {last}")
        return results, foreign
