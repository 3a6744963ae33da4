"""Several ranks on one GPU over gloo: do all plans give one device's losses there, too?

    python -m benchmarks.gpu.sharing                       # 2 ranks
    python -m benchmarks.gpu.sharing --device cpu --tiny   # does the script work?

A GPT with dropout, float32 without TF32, trained by AdamW under every strategy; exits with 1 where
a loss differs from the single process's by more than `LIMIT` of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rank_jobs import run_ranks

from .sharing_worker import train

LIMIT = 5e-5  # as the zoo's float32 equivalence
STRATEGIES = ("data", "zero", "tensor", "auto")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--strategy", nargs="+", default=STRATEGIES)
    parser.add_argument("--kernels", default="auto", help="as parallelize's")
    parser.add_argument("--tiny", action="store_true", help="a small model: tries the script only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is compared", file=sys.stderr)
        return 2
    job: dict[str, Any] = {
        "device": options.device,
        "steps": options.steps,
        "tiny": options.tiny,
        "kernels": options.kernels,
    }
    single = train({**job, "strategy": "auto", "nproc": 1})
    rows = []
    for strategy in options.strategy:
        with tempfile.TemporaryDirectory() as folder:
            asked = {**job, "strategy": strategy}
            found = run_ranks("benchmarks.gpu.sharing_worker", options.ranks, asked, Path(folder))
        pairs = zip(found["losses"], single["losses"], strict=True)
        worst = max(abs(a - b) / abs(b) for a, b in pairs)
        rows.append({"strategy": strategy, "mesh": found["mesh"], "worst": worst})
        mark = "" if worst <= LIMIT else " <- above the limit"
        print(f"{strategy:<8} {found['mesh']:<16} losses differ by {worst:.1e}{mark}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["worst"] > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
