"""All that is measured on one GPU but accuracy: kernels, training, ranks that share the device.

    python -m benchmarks.gpu [--out FOLDER]

Each part is a process of its own, which prints its table; the exit code is 1 where one misses a
goal. The parts are made to end within 8 minutes on an H100; `--limit` ends a part that does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PARTS = ("kernels", "training", "sharing")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--out", type=Path, help="a folder for the figures as JSON")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds per part")
    options, rest = parser.parse_known_args(arguments)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    codes = []
    for part in options.part or PARTS:
        command = [sys.executable, "-m", f"benchmarks.gpu.{part}", *rest]
        if options.out:
            command += ["--json", str(options.out / f"{part}.json")]
        print(f"--- {' '.join(command[1:])}", flush=True)
        start = time.monotonic()
        try:
            codes.append(subprocess.run(command, timeout=options.limit, check=False).returncode)
        except subprocess.TimeoutExpired:
            codes.append(1)
            print(f"{part}: ended after {options.limit:.0f} s")
        print(f"--- {part}: {time.monotonic() - start:.0f} s, exit code {codes[-1]}", flush=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
