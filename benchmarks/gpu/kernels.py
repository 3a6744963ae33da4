"""Bandwidth of every kernel on one GPU, against a device copy, Inductor and PyTorch's own way.

    python -m benchmarks.gpu.kernels
    python -m benchmarks.gpu.kernels --device cpu --tiny   # in Triton's interpreter: does it work?

Bandwidth is the bytes that the operation must move at the least over its median time, caches cold.
"of copy" compares it with a `copy_` that moves as many bytes, measured in turns with it. Every
result is compared with the kernel's torch reference first. Exits with 1 where a result is wrong,
where a kernel reaches less than `COPY_GOAL` of the copy, or where a baseline is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COPY_GOAL, BASELINE_GOAL = 0.9, 1.0


@dataclass(frozen=True)
class Row:
    """One kernel on one size: seconds, and how they compare (above 1: ours is faster)."""

    kernel: str
    case: str
    gigabytes_per_s: float
    of_copy: float
    ours_s: float
    baselines_s: Mapping[str, float]
    error: float
    limit: float

    @property
    def over_best(self) -> float | None:
        """The best baseline's time over ours."""
        return min(self.baselines_s.values()) / self.ours_s if self.baselines_s else None

    @property
    def misses(self) -> list[str]:
        found = []
        if not self.error <= self.limit:
            found.append("wrong result")
        if self.of_copy < COPY_GOAL:
            found.append("below the copy")
        if self.over_best is not None and self.over_best < BASELINE_GOAL:
            found.append("a baseline is faster")
        return found


def measure(case: Any, clock: Any, rounds: int) -> Row:
    """Time a `kernel_cases.Case` and its baselines in turns."""
    import torch

    half = max(case.nbytes // 2, 1)
    source = torch.empty(half, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: target.copy_(source), 1),
        "ours": (case.ours, case.launches),
        **{name: (run, 64) for name, run in case.baselines.items()},
    }
    error = case.error()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (run, launches) in contenders.items():
            times[name].append(clock(run, launches))
    found = {name: statistics.median(taken) for name, taken in times.items()}
    copy_s, ours_s = found.pop("copy"), found.pop("ours")
    rate = case.nbytes / ours_s / 1e9
    return Row(case.kernel, case.name, rate, copy_s / ours_s, ours_s, found, error, case.limit)


def print_row(row: Row) -> None:
    best = f"{row.over_best:.2f}x" if row.over_best is not None else "-"
    others = ", ".join(f"{name} {s * 1e6:.0f} us" for name, s in row.baselines_s.items())
    print(
        f"{row.kernel:<16} {row.case:<34} {row.gigabytes_per_s:>8.0f} GB/s {row.of_copy:>6.1%} of "
        f"copy {best:>7} ({row.ours_s * 1e6:.0f} us; {others}) error {row.error:.1e}"
        + "".join(f" <- {miss}" for miss in row.misses),
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernel", action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=5, help="per round")
    parser.add_argument("--tiny", action="store_true", help="small sizes: tries the script only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    import torch

    from autopar.runtime.device_clock import FLUSH_BYTES, DeviceClock

    from .kernel_cases import CASES

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    flush = 1 << 10 if options.tiny else FLUSH_BYTES
    clock = DeviceClock(device, options.calls, flush_bytes=flush)
    rows = []
    for name, make in CASES.items():
        if options.kernel and name.split(":")[0] not in options.kernel:
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            case = make(device, options.tiny)
        rows.append(measure(case, clock, options.rounds))
        print_row(rows[-1])
        del case
        if options.device == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()
    if options.json:
        found = [{**asdict(row), "misses": row.misses} for row in rows]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row.misses for row in rows))


if __name__ == "__main__":
    sys.exit(main())
