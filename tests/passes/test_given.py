"""Every device has the whole batch and all buffers: they are in what a plan says that it needs."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor, nn

from autopar.cost.cluster import parse_cluster
from autopar.cost.step import GIVEN
from autopar.errors import UserError
from autopar.passes.case import make_case
from autopar.passes.given import given_bytes
from autopar.passes.pipeline_search import Wanted
from autopar.passes.search import search
from autopar.passes.timeline_of import timeline_of
from autopar.plan import Plan
from tests.simulate import Subject, subject_of

ROWS, WIDTH, TABLE = 64, 128, 1000
BATCH_BYTES = 4 * ROWS * 3 * WIDTH + 8 * ROWS
BUFFER_BYTES = 8 * TABLE
LAYERS = 4


class Net(nn.Module):
    """Its images are larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3 * WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.register_buffer("table", torch.zeros(TABLE, dtype=torch.float64))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return nn.functional.cross_entropy(x + self.table.sum().to(x.dtype), labels)


@pytest.fixture(scope="module")
def made() -> Subject:
    torch.manual_seed(0)
    return subject_of(Net(), (torch.randn(ROWS, 3, WIDTH), torch.zeros(ROWS).long()), {})


def planned(made: Subject, limit: float | None = None, **how: object) -> Plan:
    found: Plan = search(
        made.graph,
        made.capture.fingerprint,
        made.capture.symbols,
        parse_cluster("cpu:4"),
        memory_limit=limit,
        **how,  # type: ignore[arg-type]
    )
    return found


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_whole_batch_counts(made: Subject, micro_batches: int) -> None:
    symbols = made.capture.symbols
    (batch,) = (s for s in symbols if str(s) == "b")
    small = {**symbols, batch: symbols[batch] // micro_batches}
    assert given_bytes(made.graph, small, micro_batches) == BATCH_BYTES + BUFFER_BYTES
    plan = planned(made, micro_batches=(micro_batches,))
    assert plan.predicted.memory_parts[GIVEN] == BATCH_BYTES + BUFFER_BYTES
    assert plan.predicted.memory_bytes == pytest.approx(
        sum(plan.predicted.memory_parts.values()), abs=8
    )
    case = make_case(made.graph, symbols, plan, parse_cluster("cpu:4"))
    assert timeline_of(case).peak_bytes == pytest.approx(plan.predicted.memory_bytes, abs=8)
    assert case.evaluate(case.settings())[1][0] == pytest.approx(case.memory_bytes)
    assert case.memory_bytes == case.paid.memory_bytes + BATCH_BYTES + BUFFER_BYTES
    formula = case.step.memory
    assert isinstance(formula, sympy.Expr) and batch in formula.free_symbols


def test_every_stage_has_it(made: Subject) -> None:
    plan = planned(made, pipelines=Wanted(stages=(2,)))
    assert plan.pipeline is not None
    assert plan.predicted.memory_parts[GIVEN] == BATCH_BYTES + BUFFER_BYTES
    case = make_case(made.graph, made.capture.symbols, plan, parse_cluster("cpu:4"))
    for stage in timeline_of(case).stages:
        assert stage.peak_bytes > BATCH_BYTES + BUFFER_BYTES


@pytest.mark.parametrize("strategy", ["auto", "zero"])
def test_a_limit_is_for_it_too(made: Subject, strategy: str) -> None:
    modes = {"micro_batches": (1, 2, 4), "recompute": ("none", "full"), "strategy": strategy}
    with pytest.raises(UserError, match="fits on no plan") as raised:
        planned(made, limit=BATCH_BYTES + BUFFER_BYTES + 1000, **modes)
    assert "MiB short" in str(raised.value) or "KiB short" in str(raised.value)
    free = planned(made, **modes).predicted.memory_bytes
    assert planned(made, limit=1.01 * free, **modes).predicted.memory_bytes <= 1.01 * free
    if strategy == "auto":
        assert planned(made, limit=0.97 * free, **modes).predicted.memory_bytes <= 0.97 * free
