"""One rank of `autopar run`: `python -m autopar.launch SCRIPT ARGS...` runs it as `python` does.

What the script raises is left in the folder `$AUTOPAR_FAILURES` for the launcher, which shows one
rank's failure, not all of them.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

from autopar.errors import UserError

FAILURES = "AUTOPAR_FAILURES"  # environment variable: the folder
MEMORY = "AUTOPAR_MEMORY"  # environment variable: the limit per rank, as `memory_limit=`
COMPRESS = "AUTOPAR_COMPRESS"  # environment variable: as `compress=`
KERNELS = "AUTOPAR_KERNELS"  # environment variable: as `kernels=`
LAUNCHER = "AUTOPAR_LAUNCHER"  # environment variable: the launcher's process id
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Run `sys.argv[1]` with the arguments that follow; exit as it does, with 2 for a UserError."""
    die_with_launcher()
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):  # a message, for which Python's exit code is 1
            leave("exit", stop.code)
            sys.exit(1)
        if stop.code:
            leave("exit", "")
        raise
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        leave("user", str(error))
        finish(2)
    except BaseException as error:
        leave("error", "".join(_from_script(error, script)))
        finish(1)


def die_with_launcher() -> None:
    """End this process when the launcher ends, however it does (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher and os.getppid() != int(launcher):  # it ended before the line above
        os._exit(1)


def leave(kind: str, text: str) -> None:
    """Write this rank's failure where the launcher looks, or print it where there is none."""
    folder = os.environ.get(FAILURES)
    if folder is None:
        print(text, file=sys.stderr)
        return
    rank = os.environ.get("RANK", "0")
    part = Path(folder, f"{rank}.part")
    part.write_text(json.dumps({"kind": kind, "text": text, "time": time.time()}))
    part.rename(Path(folder, f"{rank}.json"))


def finish(code: int) -> None:
    """Run the exit handlers and end: destructors of groups might wait for the other ranks."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _from_script(error: BaseException, script: str) -> list[str]:
    """The traceback without the frames of this file and of runpy."""
    frame: TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != script:
        frame = frame.tb_next
    return traceback.format_exception(type(error), error, frame or error.__traceback__)


if __name__ == "__main__":
    main()
