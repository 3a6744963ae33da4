"""Train the GPT of train_gpt.py on four ranks, then on one device, and compare the losses.

    python examples/run_demo.py [--steps 40] [--reference-steps 12] [--nproc 4]

Both runs start from the same seed, see the same batches and draw the same dropout masks, so that
their losses differ only by fp32 rounding: sums over ranks are in another order. The differences
feed back through AdamW, so the tolerance is 5e-5 for the first 20 steps and grows linearly with
the step after them. (Splitting this model's batch in four on one device moves the loss by 2e-7 in
60 steps.) Exits with 1 when the losses differ by more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("train_gpt.py")
TOLERANCE = 5e-5
STEPS_OF_CONSTANT_TOLERANCE = 20


def train(launcher: list[str], steps: int, losses_file: Path) -> dict[str, Any]:
    """Run the script for so many steps and return what it wrote."""
    command = [*launcher, "--steps", str(steps), "--losses-out", str(losses_file)]
    print(f"$ {' '.join(command)}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        sys.exit(status)
    record: dict[str, Any] = json.loads(losses_file.read_text())
    return record


def first_excess(parallel: list[float], single: list[float]) -> int | None:
    """The first step whose losses differ by more than the tolerance of that step."""
    for step, (a, b) in enumerate(zip(parallel, single, strict=False)):
        allowed = TOLERANCE * max(1.0, (step + 1) / STEPS_OF_CONSTANT_TOLERANCE)
        if not abs(a - b) <= allowed * abs(b):
            return step
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Parallel and single-device losses, compared.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--reference-steps", type=int, default=12)
    parser.add_argument("--nproc", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parallel_file, single_file = Path(folder, "parallel.json"), Path(folder, "single.json")
        ranks = [sys.executable, "-m", "autopar.cli", "run", str(SCRIPT)]
        ranks += ["--nproc", str(arguments.nproc), "--"]
        parallel = train(ranks, arguments.steps, parallel_file)
        reference_steps = min(arguments.reference_steps, arguments.steps)
        single = train([sys.executable, str(SCRIPT)], reference_steps, single_file)
    pairs = list(zip(parallel["losses"], single["losses"], strict=False))
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    excess = first_excess(parallel["losses"], single["losses"])
    print(
        f"{arguments.nproc} ranks: {statistics.median(parallel['step_s']):.2f} s per step; "
        f"one device: {statistics.median(single['step_s']):.2f} s per step"
    )
    verdict = "the same" if excess is None else f"DIFFERENT from step {excess + 1} on"
    print(
        f"losses of {arguments.nproc} ranks and of one device over {len(pairs)} steps: {verdict}, "
        f"largest relative difference {difference:.1e}"
    )
    return 0 if excess is None else 1


if __name__ == "__main__":
    sys.exit(main())
