"""Interleaved step times of autopar against what a user would write by hand.

    python -m benchmarks.speed [--models gpt mlp] [--rounds 5] [--steps 5] [--json out.json]

The contenders take turns of a few whole training steps (forward, backward, optimizer, zero_grad),
one at a time, on 4 gloo ranks of one thread each; "one process" has 4 threads. Single launches
differ by 10 to 40 %, so only the ratio of medians over the rounds is worth reading.
"""

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from .baselines import contenders_of
from .models import MODELS
from .workers import RANKS, Block, ContenderError, Pool

BYTES_PER_PARAMETER_BYTE = 4  # parameter, gradient and AdamW's two moments
REPLICAS = {"one process": 1.0, "DDP": RANKS, "FSDP2": 1.5, "hand TP": 1.0, "autopar": 1.5}
LOSS_TOLERANCE = 5e-5

Times = dict[str, list[float]]
Losses = dict[str, list[float]]


def memory_bytes(model: str, contender: str) -> float:
    """A rough need: state per replica, and a sixth more for activations and buffers."""
    state = MODELS[model].parameters_bytes * BYTES_PER_PARAMETER_BYTE
    ranks = 1 if contender == "one process" else RANKS
    return REPLICAS[contender] * state * 1.15 + ranks * 0.35 * 2**30


class Race:
    """The rounds of one model; a contender that fails is left out and says why."""

    def __init__(self, model: str, contenders: list[str], console: Console) -> None:
        self.model, self.console = model, console
        self.contenders = list(contenders)
        self.times: Times = {name: [] for name in contenders}
        self.losses: Losses = {}
        self.failures: dict[str, str] = {}
        needs = sum(memory_bytes(model, name) for name in contenders)
        self.resident = needs < psutil.virtual_memory().available

    def run(self, rounds: int, steps: int) -> None:
        with ExitStack() as stack:
            pools: dict[str, Pool] = {}
            if self.resident:
                for name in list(self.contenders):
                    self._try(name, lambda n=name: pools.update({n: stack.enter_context(self._pool(n))}))
            for number in range(rounds):
                for name in list(self.contenders):
                    self._try(name, lambda n=name: self._turn(n, pools.get(n), steps))
                self.console.print(f"[dim]{self.model}: round {number + 1} of {rounds}[/dim]")

    def _try(self, name: str, action: "Callable[[], None]") -> None:
        try:
            action()
        except ContenderError as error:
            self.failures[name] = str(error)
            self.contenders.remove(name)

    def _pool(self, name: str) -> Pool:
        available = psutil.virtual_memory().available
        needs = memory_bytes(self.model, name)
        if needs > available:
            raise ContenderError(
                f"needs about {needs / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free"
            )
        return Pool(self.model, name)

    def _turn(self, name: str, pool: Pool | None, steps: int) -> None:
        if pool is None:
            with self._pool(name) as launched:
                block = launched.run(steps, untimed=2)
        else:
            block = pool.run(steps, untimed=1 if name in self.losses else 2)
        self.times[name] += block.step_s
        self.losses.setdefault(name, block.losses)
