"""Training steps on one GPU: a decorated model against `torch.compile` of the same one.

    python -m benchmarks.gpu.training
    python -m benchmarks.gpu.training --device cpu --tiny   # does the script work?

Both train in turns in one process, on the same batches; the ratio is the median over turns of their
step times, with an interval that holds the true one in 95 of 100 cases. Tokens per second and MFU
are of the decorated model: model FLOPs per token are 6 N + 12 L d T (Chowdhery et al., "PaLM",
2022, appendix B, the embedding table counted where it is also the head), over the device's dense
bfloat16 rate on its datasheet. Exits with 1 below `--goal`, or where the losses differ by more than
`LOSS_TOLERANCE`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autopar
from autopar.runtime.phase_clock import PhaseClock
from benchmarks.paired import paired_ratio

from .models import SUBJECTS, TINY, Subject

GOAL = 0.99  # speed of the decorated model over the compiled one
# (precision, batch): autocast of float32 parameters as GPT-2 is trained, bfloat16 ones for Llama,
# of which two copies with their optimizer states must fit.
SETTINGS = {"gpt2-124m": ("autocast", 32), "llama-1b": ("bf16", 4)}
# Of the largest loss, how far those of the two may be apart. Both round products to bfloat16, one
# part in 2^8, in different orders: twice that. Where parameters and the loss are bfloat16, updates
# are rounded as well, and a loss is itself a number of 8 bits: four times as much.
LOSS_TOLERANCE = {"autocast": 2 * 2**-8, "bf16": 8 * 2**-8}
# Dense bfloat16 flop/s: NVIDIA's datasheets of A100, H100 SXM, H200 SXM and B200, AMD's of MI300X.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12}
LAYERS = {"gpt2-124m": (12, 768), "llama-1b": (16, 2048)}


@dataclass(frozen=True)
class Row:
    """One model's turns: seconds of a step, and speed of the decorated model over the compiled."""

    model: str
    precision: str
    tokens: int
    decorated_s: float
    compiled_s: float
    speed: float
    speed_low: float
    speed_high: float
    tokens_per_s: float
    mfu: float | None
    loss_difference: float
    loss_limit: float


class Trainer:
    """One model with its optimizer; `turn` runs steps and gives their seconds."""

    def __init__(self, module: nn.Module, run: Any, device: torch.device, precise: bool) -> None:
        self.run, self.device, self.precise = run, device, precise
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=fused)
        self.losses: list[float] = []

    def turn(self, batch: tuple[Tensor, Tensor], steps: int) -> list[float]:
        """Seconds of each of some steps."""
        found, clock = [], PhaseClock(self.device)
        for _ in range(steps):
            with clock.phase("step"):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precise):
                    loss = self.run(*batch)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            found.append(clock.take()["step"])
        self.losses.append(loss.item())
        return found


def measure(name: str, subject: Subject, options: argparse.Namespace) -> Row:
    """Train both in turns."""
    device = torch.device(options.device)
    precision, batch_size = SETTINGS[name]
    if options.tiny:
        batch_size = subject.batch
    batch_size = options.batch or batch_size
    shape = (batch_size, subject.sequence)
    torch.manual_seed(0)
    batch = tuple(torch.randint(0, subject.vocab, shape, device=device) for _ in range(2))
    backend = "aot_eager" if options.tiny else "inductor"
    decorate: Callable[[nn.Module], Any] = autopar.parallelize
    trainers = []
    for wrap in (decorate, lambda m: torch.compile(m, backend=backend)):
        torch.manual_seed(0)
        with device:
            module = subject.build()
        module = module.to(torch.bfloat16) if precision == "bf16" else module
        parameters = sum(p.numel() for p in module.parameters())
        trainers.append(Trainer(module, wrap(module), device, precision == "autocast"))
        trainers[-1].turn((batch[0], batch[1]), 3)  # compiles, and makes the optimizer's state
    times: tuple[list[list[float]], list[list[float]]] = ([], [])
    for turn in range(options.turns):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        for which in order:
            times[which].append(trainers[which].turn((batch[0], batch[1]), options.steps))
    ratio = paired_ratio(times[1], times[0])
    step_s = statistics.median(s for turn in times[0] for s in turn)
    tokens = batch_size * subject.sequence
    return Row(
        name,
        precision,
        tokens,
        step_s,
        statistics.median(s for turn in times[1] for s in turn),
        ratio.median,
        ratio.low,
        ratio.high,
        tokens / step_s,
        _mfu(name, parameters, subject.sequence, tokens / step_s, device),
        loss_difference(trainers[0].losses, trainers[1].losses),
        LOSS_TOLERANCE[precision] * max(map(abs, trainers[1].losses)),
    )


def loss_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """How far losses of the same steps are apart at most; infinite where one is not finite."""
    if not all(map(math.isfinite, (*a, *b))):
        return math.inf
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def failed(row: Row, goal: float) -> bool:
    """Whether a model is slower than the goal, or does not train as the compiled one."""
    # Not `>`: a limit that is no number is no limit.
    return row.speed < goal or not row.loss_difference <= row.loss_limit


def _mfu(
    name: str, parameters: int, sequence: int, tokens_per_s: float, device: torch.device
) -> float | None:
    if device.type != "cuda":
        return None
    layers, width = LAYERS[name]
    flops = 6 * parameters + 12 * layers * width * sequence
    known = [peak for part, peak in PEAKS.items() if part in torch.cuda.get_device_name(device)]
    return flops * tokens_per_s / known[0] if known else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", action="append", choices=tuple(SUBJECTS))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=5, help="per turn")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--goal", type=float, default=GOAL)
    parser.add_argument("--tiny", action="store_true", help="small models: tries the script only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 2
    rows = []
    for name, subject in (TINY if options.tiny else SUBJECTS).items():
        if options.model and name not in options.model:
            continue
        rows.append(row := measure(name, subject, options))
        mfu = f", MFU {row.mfu:.1%}" if row.mfu is not None else ""
        print(
            f"{row.model} ({row.precision}, {row.tokens} tokens): decorated "
            f"{row.decorated_s * 1e3:.2f} ms, compiled {row.compiled_s * 1e3:.2f} ms, speed "
            f"{row.speed:.3f} ({row.speed_low:.3f} to {row.speed_high:.3f}), "
            f"{row.tokens_per_s:,.0f} tokens/s{mfu}, losses differ by "
            f"{row.loss_difference:.1e} (limit {row.loss_limit:.1e})"
        )
        if options.device == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(failed(row, options.goal) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
