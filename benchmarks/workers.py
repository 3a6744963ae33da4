"""A contender's processes: started once, blocked on a pipe while they wait for their turn."""

import ctypes
import multiprocessing as mp
import os
import signal
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self
from unittest import mock

from .network import INTERFACE, Host

RANKS = 4
TIMEOUT_S = 600.0
MALLOC = {  # freed memory is kept: page faults otherwise dominate large tensors on CPU
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


class ContenderError(RuntimeError):
    """A worker failed; the message is its traceback's last line."""


@dataclass(frozen=True)
class Block:
    """Steps that were run in one go: seconds per step (slowest rank) and losses (mean of ranks)."""

    step_s: list[float]
    losses: list[float]


@dataclass(frozen=True)
class _Failure:
    """What a worker says before it ends."""

    text: str


class Pool:
    """The processes of one contender on one model; use it as a context manager.

    Given `hosts` have even parts of the ranks each. `environment` is added to that of the workers.
    """

    def __init__(
        self,
        model: str,
        contender: str,
        keep_memory: bool = True,
        hosts: tuple[Host, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.ranks = 1 if contender == "one process" else RANKS
        self.step = 0
        self.timeout_s = TIMEOUT_S
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        context = mp.get_context("spawn")
        port = _free_port()
        threads = RANKS // self.ranks
        if hosts and self.ranks == 1:  # one host alone
            hosts = hosts[:1]
            threads = len(hosts[0].cores)
        try:
            for rank in range(self.ranks):
                ours, theirs = context.Pipe()
                host = hosts[rank * len(hosts) // self.ranks] if hosts else None
                arguments = (theirs, model, contender, threads, host)
                process = context.Process(target=_worker, args=arguments, daemon=True)
                variables = {
                    **_environment(rank, self.ranks, port, threads, hosts),
                    **(MALLOC if keep_memory else {}),
                    **(environment or {}),
                }
                with mock.patch.dict(os.environ, variables):
                    process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)
            self._answers()
        except BaseException:
            self.close()
            raise

    def run(self, steps: int, untimed: int = 1) -> Block:
        """Run `untimed + steps` whole training steps and return the timed ones."""
        first, self.step = self.step, self.step + untimed + steps
        try:
            for pipe in self.pipes:
                pipe.send((first, untimed + steps))
        except OSError as error:
            raise ContenderError("its processes have ended") from error
        answers = self._answers()
        return Block(
            [max(rank[0][i] for rank in answers) for i in range(untimed, untimed + steps)],
            [statistics.fmean(rank[1][i] for rank in answers) for i in range(untimed + steps)],
        )

    def plan(self) -> str:
        """The plan in use as JSON; an empty text where there is none."""
        for pipe in self.pipes:
            pipe.send("plan")
        return str(self._answers()[0])

    def _answers(self) -> list[Any]:
        answers = []
        deadline = time.monotonic() + self.timeout_s
        for pipe in self.pipes:
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise ContenderError(f"no answer in {self.timeout_s:.0f} s")
                answer = pipe.recv()
            except (EOFError, OSError) as error:
                raise ContenderError("a process ended (out of memory?)") from error
            if isinstance(answer, _Failure):
                raise ContenderError(answer.text)
            answers.append(answer)
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _environment(
    rank: int, ranks: int, port: int, threads: int, hosts: tuple[Host, ...]
) -> dict[str, str]:
    inside = ranks // max(len(hosts), 1)
    # No name of a namespace is known to a name server, of which torch would warn.
    place = {"GLOO_SOCKET_IFNAME": INTERFACE, "TORCH_CPP_LOG_LEVEL": "ERROR"} if hosts else {}
    return {
        "OMP_NUM_THREADS": str(threads),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % inside),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(inside),
        "MASTER_ADDR": hosts[0].address if hosts else "127.0.0.1",
        "MASTER_PORT": str(port),
        **place,
    }


def _worker(pipe: Connection, model: str, contender: str, threads: int, host: Host | None) -> None:
    if sys.platform == "linux":
        # The kernel ends this process with its driver, and before others when memory is short.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        if host is not None:
            host.enter()
        _serve(pipe, model, contender, threads)
    except (EOFError, KeyboardInterrupt):
        pass
    except BaseException as error:
        traceback.print_exc()
        pipe.send(_Failure(f"{type(error).__name__}: {error}"))


def _serve(pipe: Connection, model: str, contender: str, threads: int) -> None:
    import torch
    import torch.distributed as dist

    from .baselines import CONTENDERS, SEVERAL_HOSTS
    from .models import MODELS

    torch.set_num_threads(threads)
    bench = MODELS[model]
    if contender not in ("one process", "autopar"):
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    trainer = {**CONTENDERS, **SEVERAL_HOSTS}[contender](bench.build())
    pipe.send(b"ready")
    while True:
        task = pipe.recv()
        if task == "plan":
            found = getattr(trainer.model, "autopar", None)
            pipe.send("" if found is None or found.plan is None else found.plan.to_json())
            continue
        first, count = task
        batches = []
        for step in range(first, first + count):
            whole = bench.batch(torch.Generator().manual_seed(step % 16))
            batches.append(trainer.slice_of(whole))
        if dist.is_initialized():
            dist.barrier()
        times, losses, start = [], [], time.perf_counter()
        for batch in batches:
            losses.append(trainer.step(batch))
            end = time.perf_counter()
            times.append(end - start)
            start = end
        pipe.send((times, losses))
