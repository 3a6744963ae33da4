"""A process that is told to end takes with it those it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import subprocess, sys
from autopar.runtime.children import ended_together
processes = []
with ended_together(processes):
    processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
    print(processes[0].pid, flush=True)
    processes[0].wait()
"""


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_children_end_with_a_terminated_parent() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        os.kill(parent.pid, signal.SIGTERM)
        assert parent.wait(60) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 60
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)
