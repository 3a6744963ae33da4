"""Time and memory of capturing models of real depth on the meta device, each in a new process.

    python -m benchmarks.capture [--full] [--only llama] [--dynamic-sequence]

Seconds are of `capture` alone, first use of torch's tracer (a second of imports) included; building
the module and importing torch are not in them. CPU seconds tell how much of the wall time was the
machine's other work. The peak is of the whole process. `--full` adds unfolded captures, which take
as long as the model is deep.

Shapes: Llama-3 from arXiv:2407.21783, table 3; the GPT of a trillion parameters from
arXiv:2104.04473, table 1.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.capture import capture

from .models import GPT

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama3_8b.py"
TOKENS_PER_BATCH = 64 * 8192


@dataclass(frozen=True)
class Case:
    """One row: what to build and how to capture it."""

    name: str
    build: Callable[[], nn.Module]
    layers: int
    sequence: int
    fold: bool


def llama(**sizes: int) -> nn.Module:
    """The example's Llama with other sizes, in bfloat16."""
    spec = importlib.util.spec_from_file_location("llama3_8b", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["llama3_8b"] = example  # dataclasses look their module up
    spec.loader.exec_module(example)
    model: nn.Module = example.Llama(example.Config(**sizes))
    return model.to(torch.bfloat16)


def llama_8b(layers: int = 32) -> nn.Module:
    """Llama-3-8B, of any depth."""
    return llama(layers=layers)


def llama_70b() -> nn.Module:
    """Llama-3-70B."""
    return llama(layers=80, dim=8192, heads=64, kv_heads=8, hidden=28672)


def gpt_1t() -> nn.Module:
    """A GPT of a trillion parameters."""
    model = GPT(vocab=51200, dim=25600, layers=128, heads=160, context=2048)
    return model.to(torch.bfloat16)


CASES = (
    Case("Llama-3-8B", llama_8b, 32, 8192, fold=True),
    Case("Llama-3-70B", llama_70b, 80, 8192, fold=True),
    Case("GPT 1T", gpt_1t, 128, 2048, fold=True),
    *(
        Case(f"Llama-3-8B x{n}", lambda n=n: llama_8b(n), n, 8192, fold=True)  # type: ignore[misc]
        for n in (8, 16, 32, 64, 128)
    ),
    Case("Llama-3-8B, full", llama_8b, 32, 8192, fold=False),
)


def measure(case: Case, dynamic_sequence: bool) -> dict[str, Any]:
    """One capture in this process."""
    with torch.device("meta"):
        model = case.build()
        ids = torch.zeros(TOKENS_PER_BATCH // case.sequence, case.sequence, dtype=torch.int64)
        targets = torch.zeros_like(ids)
    wall, cpu = time.perf_counter(), time.process_time()
    captured = capture(model, (ids, targets), {}, fold=case.fold, dynamic_sequence=dynamic_sequence)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "nodes": len(captured.graph.fx.nodes),
        "symbols": ",".join(str(symbol) for symbol in captured.symbols),
        "folded": any("copied" in note for note in captured.notes),
    }


def main() -> None:
    """Measure each case in a process of its own, or the one that `--case` tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--dynamic-sequence", action="store_true")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(CASES[options.case], options.dynamic_sequence)))
        return
    extra = ["--dynamic-sequence"] if options.dynamic_sequence else []
    print("| Model | Layers | Captured | Symbols | Nodes | Seconds | CPU seconds | Peak GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for number, case in enumerate(CASES):
        if options.only.lower() not in case.name.lower() or (not case.fold and not options.full):
            continue
        command = [sys.executable, "-m", "benchmarks.capture", "--case", str(number), *extra]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        how = "folded" if row["folded"] else "whole"
        print(
            f"| {case.name} | {case.layers} | {how} | {row['symbols']} | {row['nodes']}"
            f" | {row['wall']:.1f} | {row['cpu']:.1f} | {row['peak']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
