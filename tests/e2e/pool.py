"""Real ranks that stay alive over many cases: one gloo process group, any number of models."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

LEFT_S = 10.0  # what the other ranks get to finish when one has failed
EXIT_S = 10.0


class RankFailure(AssertionError):
    """A function raised on a rank, or a rank died or hung; the text says which and how."""


class RankPool:
    """`size` processes in one gloo process group; `run` calls a function on all of them.

    A failure ends the processes, and the next `run` starts new ones. Functions and arguments are
    pickled, so functions have to be at the top level of a module.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.starts = 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: Path | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """What `function(*args)` returns on each rank, in order; raises RankFailure."""
        self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        problem = ""
        while len(answers) < self.size:
            left = [self._pipes[r] for r in range(self.size) if r not in answers]
            ready = wait(left, max(0.0, deadline - time.monotonic()))
            if not ready:
                problem = problem or f"ranks did not answer within {timeout_s:.0f} s"
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(EXIT_S)
                    code = self._processes[rank].exitcode
                    answers[rank] = (False, f"the process died with exit code {code}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + LEFT_S)
                    problem = "a rank failed"
        if problem:
            missing = [r for r in range(self.size) if r not in answers]
            told = [f"rank {r}: {text}" for r, (ok, text) in sorted(answers.items()) if not ok]
            if missing:
                told.append(f"no answer from ranks {missing}")
            self.kill()
            raise RankFailure(f"{problem}\n" + "\n".join(told))
        return [answers[rank][1] for rank in range(self.size)]

    def _start(self) -> None:
        if self._processes:
            return
        self.starts += 1
        context = mp.get_context("spawn")
        handle, name = tempfile.mkstemp(prefix="autopar-ranks-")
        os.close(handle)
        os.unlink(name)  # the store wants to make it
        self._store = Path(name)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        """Let the ranks end, and end those that do not."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + EXIT_S
        for process in self._processes:
            process.join(max(0.1, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End the ranks at once."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._store is not None:
            self._store.unlink(missing_ok=True)
            self._store = None


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """The life of one rank."""
    import logging
    import warnings

    import torch
    import torch.distributed as dist

    from autopar.launch import die_with_launcher

    die_with_launcher()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            os._exit(1)  # the parent is gone
        if task is None:
            break
        function, args = task
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc()[-4000:])
        pipe.send(answer)
    dist.destroy_process_group()
