"""More to choose from never makes a plan slower: memory, numbers of micro-batches, recomputation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from autopar.cost.cluster import parse_cluster
from autopar.errors import UserError
from autopar.passes.prepare import prepare
from autopar.passes.propose import WORTH, Frames
from autopar.passes.search import MODES, search
from autopar.planning import capture_training
from tests.autocast import Autocast

from .test_propose import needed, problem, stack

SPEC = "cpu:4"
SHARES = (math.inf, 0.6, 0.4, 0.3, 0.1)  # of what the fastest plan keeps


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


@cache
def frames() -> Frames:
    return Frames(problem(SPEC))


@cache
def planned(
    share: float, micro_batches: Sequence[int], modes: Sequence[str]
) -> tuple[float, float]:
    """(seconds, the gap) of the plan within a share of the memory; infinite where none fits."""
    (symbol,) = stack().capture.symbols
    limit = share * needed(SPEC) + problem(SPEC).given_bytes(1)
    try:
        made = search(
            stack().graph,
            stack().capture.fingerprint,
            {symbol: 64},
            parse_cluster(SPEC),
            memory_limit=limit,
            micro_batches=micro_batches,
            recompute=modes,
            frames=frames(),
        )
    except UserError as error:
        if "fits on no plan" not in str(error):
            raise
        return math.inf, 0.0
    assert made.predicted.memory_bytes <= limit
    return made.predicted.time_s, made.gap


def check(less: tuple[float, float], more: tuple[float, float]) -> None:
    """What has more to choose from is not slower, but for the gap that it admits."""
    if math.isinf(less[0]):
        return
    assert more[0] * (1 - more[1]) <= less[0] * (1 + WORTH)
    assert more[0] <= less[0] * 1.02


def test_memory() -> None:
    found = [planned(share, (1, 2, 4), MODES) for share in SHARES]
    for more, less in itertools.pairwise(found):
        check(less, more)
    times = [time_s for time_s, _ in found]
    assert math.isfinite(times[0]) and math.isinf(times[-1]) and len(set(times)) > 3


def test_micro_batches_and_modes() -> None:
    share = 0.4
    counts = [planned(share, ks, MODES) for ks in ((1,), (1, 2), (1, 2, 4))]
    modes = [planned(share, (1, 2, 4), ms) for ms in (("none",), ("none", "full"), MODES)]
    for found in (counts, modes):
        for less, more in itertools.pairwise(found):
            check(less, more)


def test_named_strategies_with_several_micro_batches() -> None:
    """Where one micro-batch may not be, plans of named strategies are compared with as many."""
    layers = (nn.Linear(1024, 1024) for _ in range(8))
    model = Autocast(nn.Sequential(*layers, Squares()))
    capture = capture_training(model, (torch.zeros(64, 1024),), {}, fold=True)
    times = {
        strategy: search(
            prepare(capture.graph),
            capture.fingerprint,
            capture.symbols,
            parse_cluster("2x4xH100"),
            strategy=strategy,
            micro_batches=(4,),
        ).predicted.time_s
        for strategy in ("auto", "data", "zero", "tensor")
    }
    assert times["auto"] <= min(times.values()) * (1 + 1e-9)
