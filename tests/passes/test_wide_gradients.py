"""Memory counts float32 sums of 16-bit gradients, where there are any."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.cost.simulate import simulate
from autopar.passes.case import Case, make_case
from autopar.passes.step_of import step_of
from autopar.passes.widening import widening
from autopar.plan import Plan
from autopar.runtime.live_memory import peak_bytes
from autopar.runtime.step import LocalEngine, Step, load_part
from autopar.runtime.thread_world import ThreadWorld
from tests.e2e.piped_plans import whole_plan
from tests.simulate import Subject, cpu, decisions_of, plan_of, subject_of
from tests.simulate_step import groups_of, step_graphs

LAYERS, WIDTH, ROWS, MICRO_BATCHES = 6, 256, 32, 4
WEIGHTS = LAYERS * WIDTH * WIDTH


class Layers(nn.Module):
    """Weights are most of what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        out: Tensor = x.square().sum()
        return out


@cache
def subject(dtype: torch.dtype) -> Subject:
    torch.manual_seed(0)
    return subject_of(Layers().to(dtype), (torch.randn(ROWS, WIDTH).to(dtype),), {})


@cache
def plan(dtype: torch.dtype, ranks: int, strategy: str) -> Plan:
    if ranks == 1:
        return whole_plan(subject(dtype).capture, subject(dtype).graph)
    return plan_of(subject(dtype), ranks, strategy, optimizer="sgd")


def case_of(dtype: torch.dtype, ranks: int, strategy: str, micro_batches: int, **how: Any) -> Case:
    made, given = subject(dtype), plan(dtype, ranks, strategy)
    if how:
        stored = {name: replace(s, **how) for name, s in given.params.items()}
        given = replace(given, params=stored)
    given = replace(given, micro_batches=micro_batches)
    return make_case(made.graph, made.capture.symbols, given, cpu(ranks), "sgd")


def peak(case: Case, micro_batches: int) -> float:
    """Bytes of one rank, by the timeline."""
    step = step_of(case.concrete, case.blocks, case.option, case.pricer, micro_batches)
    return simulate(step, case.pricer.cluster).peak_bytes


def test_how_much_wider() -> None:
    assert [widening(d) for d in (torch.bfloat16, torch.float16)] == [1, 1]
    assert not any(map(widening, (torch.float32, torch.float64, torch.int16, torch.bool)))


CASES = [
    (1, "data", None, 1),
    (4, "data", None, 1),
    (4, "tensor", None, 4),
    (4, "zero", False, 1),
    (4, "zero", True, 4),
]


@pytest.mark.parametrize(("ranks", "strategy", "regather", "shards"), CASES)
def test_a_sum_takes_as_much_again(
    ranks: int, strategy: str, regather: bool | None, shards: int
) -> None:
    """Of what is summed: stored shards, or what is gathered once for all micro-batches.

    All else takes half of what it does in float32: in the search's account, in its formula, and
    over time.
    """
    how = {} if regather is None else {"regather": regather}
    for micro_batches, more in ((1, 0), (MICRO_BATCHES, 2 * WEIGHTS // shards)):
        narrow, wide = (
            case_of(dtype, ranks, strategy, micro_batches, **how)
            for dtype in (torch.bfloat16, torch.float32)
        )
        half = wide.paid.memory_bytes / 2
        assert narrow.paid.memory_bytes == half + more
        assert wide.memory_bytes == wide.paid.memory_bytes + wide.given_bytes
        evaluated = narrow.evaluate(narrow.settings())[1][0] - narrow.given_bytes
        assert evaluated == pytest.approx(half + more, rel=1e-9)
        assert peak(narrow, micro_batches) == pytest.approx(peak(wide, micro_batches) / 2 + more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prediction_next_to_what_a_step_takes(dtype: torch.dtype) -> None:
    """Of one rank, until its gradients are handed out."""
    made, case = subject(dtype), case_of(dtype, 1, "data", MICRO_BATCHES)
    decisions = decisions_of(made, plan(dtype, 1, "data"))
    (graphs,) = step_graphs(made, dict(made.capture.symbols), decisions, MICRO_BATCHES)
    groups = groups_of(graphs, decisions.mesh, ThreadWorld(1), 0)
    step = Step([load_part(graphs, groups)], LocalEngine(), MICRO_BATCHES)
    parameters = dict(made.module.named_parameters())
    x = torch.randn(ROWS, WIDTH).to(dtype)
    (read,) = (n.meta["fqns"][0] for n in made.graph.placeholders("input"))
    given = {("input", read): x, ("seed", "rng_seed"): 0}
    known = [x, *parameters.values()]
    measured = peak_bytes(lambda: step.run(parameters, given), torch.device("cpu"), known)
    assert peak(case, MICRO_BATCHES) == pytest.approx(measured, rel=0.1)
