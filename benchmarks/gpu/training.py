"""Training steps on one GPU: a decorated model against `torch.compile` of the same one.

    python -m benchmarks.gpu.training
    python -m benchmarks.gpu.training --device cpu --tiny   # does the script work?

Both train in turns in one process, on the same batches; the ratio is the median over turns of their
step times, with an interval that holds the true one in 95 of 100 cases. Tokens per second and MFU
are of the decorated model: model FLOPs per token are 6 N + 12 L d T (Chowdhery et al., "PaLM",
2022, appendix B, the embedding table counted where it is also the head), over the device's dense
bfloat16 rate on its datasheet. Exits with 1 below `--goal`, or where the losses of a step differ by
more than `loss_limits`.
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
# How far the losses of one step may be apart. Both models round products to bfloat16, one part in
# 2^8 at most, but in different orders. In the first step they have the same parameters, and that is
# all that differs: of a float32 loss, a mean over thousands of tokens, a quarter of it (the tiny
# model on a CPU in eager mode and under Inductor, batch 8: 2 % of it at most in 43 steps). A
# bfloat16 loss is itself rounded: two of its own steps, each of one part in 2^7 at most (in that
# trial one).
ROUNDING = {"autocast": 2**-10, "bf16": 2 * 2**-7}
# Later on each has its own parameters. What updates have changed is known no better than they are,
# so a share of the way that the loss has gone is added: 1/32 (in that trial under 0.6 % from the
# fifth step on), and more of parameters in bfloat16, which round every update. A model that does
# not train is all of the way apart.
DRIFT = {"autocast": 2**-5, "bf16": 2**-3}
# Dense bfloat16 flop/s: NVIDIA's datasheets of A100, H100 SXM, H200 SXM and B200, AMD's of MI300X.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12}
LAYERS = {"gpt2-124m": (12, 768), "llama-1b": (16, 2048)}


@dataclass(frozen=True)
class Row:
    """One model's turns: seconds of a step, and speed of the decorated model over the compiled.

    The losses are those of the step that is nearest to its limit, or the farthest beyond.
    """

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
    loss_step: int
    loss_difference: float
    loss_limit: float


class Trainer:
    """One model with its optimizer; `turn` runs steps and gives their seconds."""

    def __init__(self, module: nn.Module, run: Any, device: torch.device, precise: bool) -> None:
        self.run, self.device, self.precise = run, device, precise
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=fused)
        self.losses: list[Tensor] = []  # of every step

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
            self.losses.append(loss.detach())
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
    decorated, compiled = ([x.item() for x in trainer.losses] for trainer in trainers)
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
        *worst_step(decorated, compiled, precision),
    )


def loss_limits(losses: Sequence[float], precision: str) -> list[float]:
    """How far the loss of every step may be from the reference's, which are given."""
    limits, way = [], 0.0
    for loss in losses:
        way = max(way, abs(loss - losses[0]))
        limits.append(ROUNDING[precision] * abs(loss) + DRIFT[precision] * way)
    return limits


def worst_step(
    losses: Sequence[float], reference: Sequence[float], precision: str
) -> tuple[int, float, float]:
    """The step whose losses are nearest to their limit or farthest beyond, how far, and the limit.

    The difference is infinite where one is not finite.
    """
    for step, pair in enumerate(zip(losses, reference, strict=True)):
        if not all(map(math.isfinite, pair)):
            return step, math.inf, 0.0
    apart = [abs(x - y) for x, y in zip(losses, reference, strict=True)]
    limits = loss_limits(reference, precision)
    worst = max(range(len(apart)), key=lambda step: apart[step] - limits[step])
    return worst, apart[worst], limits[worst]


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
            f"{row.tokens_per_s:,.0f} tokens/s{mfu}, losses of step {row.loss_step} differ by "
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
