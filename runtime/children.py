"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen
from typing import Any


@contextmanager
def exit_on_termination() -> Iterator[None]:
    """SIGTERM raises SystemExit inside of the block, so that what ends processes runs."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ended_together(processes: list[Popen[Any]]) -> Iterator[None]:
    """Kill what of `processes` still runs when the block ends, by SIGTERM to this one, too.

    The list may grow inside of the block.
    """
    with exit_on_termination():
        try:
            yield
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _exit(number: int, frame: Any) -> None:
    del frame
    sys.exit(128 + number)
