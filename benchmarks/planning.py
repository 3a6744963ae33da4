"""Time and memory of planning Llama-3-8B's shape for 64 H100, cold, capture included.

    python -m benchmarks.planning [--cluster 8x8xH100]

Runs `autopar plan` in a new process and reads its wall time and peak memory.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

MODEL = Path(__file__).parent.parent / "examples" / "llama3_8b.py"
GOAL_S, GOAL_GIB = 30.0, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", default="8x8xH100")
    options = parser.parse_args()
    command = [sys.executable, "-m", "autopar.cli", "plan", f"{MODEL}:llama3_8b"]
    start = time.perf_counter()
    done = subprocess.run([*command, "--cluster", options.cluster], check=False)
    seconds = time.perf_counter() - start
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    goals = f"goals {GOAL_S:.0f} s, {GOAL_GIB:.0f} GiB"
    print(f"planned in {seconds:.1f} s, peak {gib:.2f} GiB ({goals})")
    sys.exit(done.returncode or int(seconds > GOAL_S or gib > GOAL_GIB))


if __name__ == "__main__":
    main()
