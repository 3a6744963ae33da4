"""Plans with a pipeline give one device's numbers in loops written for one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.capture import capture
from autopar.passes.blocks import find_blocks
from autopar.passes.prepare import prepare
from autopar.passes.specialise import specialise
from autopar.plan import Plan, Recompute
from tests.e2e.loops import batch, differences
from tests.e2e.micro_loops import gpt, single
from tests.e2e.piped_loops import PIPED_LOOPS, Outside, refused_outside, run_piped_loop
from tests.e2e.piped_loops import skipping_module as skipping
from tests.e2e.piped_plans import piped_case, piped_plan, zoo_capture
from tests.e2e.pool import RankPool
from tests.e2e.training import make_reference, train_and_compare
from tests.e2e.verify import LIMIT_FLOAT64, LIMIT_LOSS_FLOAT32

pytestmark = pytest.mark.multiprocess
TOLERANCE = {"autocast": 2e-2, "scaled": 5e-3}
DROPOUT = {"dropout": 0.3, "evaluated": 0.2}
# Stages, what is done inside of them, schedule.
SHAPES = {
    "1f1b": (2, "data", "1f1b"),
    "zero_bubble": (2, "tensor", "zero_bubble"),
    "interleaved": (2, "zero", "interleaved"),
    "deep": (4, "data", "1f1b"),
}
FAST = {("overflowing", "1f1b")}
MORE = {
    "dropout": ("zero_bubble", "interleaved"),
    "skipping": tuple(SHAPES),
    "overflowing": ("1f1b", "interleaved"),
    "clipped": ("interleaved", "deep"),
}
CASES = [
    pytest.param(name, shape, marks=[] if (name, shape) in FAST else [pytest.mark.slow])
    for name in PIPED_LOOPS
    for shape in MORE.get(name, ("zero_bubble",))
]


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def planned(module: nn.Module, shape: str, args: tuple[Any, ...]) -> Plan:
    stages, family, schedule = SHAPES[shape]
    return piped_plan(capture(module, args, {}), stages, 4, family, schedule)


@cache
def plan_for(name: str, shape: str) -> str:
    dtype = {"autocast": torch.bfloat16, "scaled": torch.float16}.get(name)
    if name in ("skipping", "overflowing"):
        module: nn.Module = skipping()
    else:
        module = gpt(DROPOUT.get(name, 0.0)) if dtype is None else single()
    with torch.autocast("cpu", dtype) if dtype is not None else nullcontext():
        return planned(module, shape, batch(0)).to_json()


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_loop_is_unchanged(name: str, shape: str, four_ranks: RankPool) -> None:
    torch.set_num_threads(1)
    reference = run_piped_loop(name, None)
    results = four_ranks.run(run_piped_loop, name, plan_for(name, shape), timeout_s=300)
    for rank, result in enumerate(results):
        wrong = list(differences(result, reference, TOLERANCE.get(name, 1e-9)))
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize(
    ("model", "case"),
    [
        ("llama", "pipeline+tensor/zero_bubble"),
        pytest.param("hf_gpt2", "pipeline+tensor/zero_bubble", marks=pytest.mark.slow),
        pytest.param("gpt", "pipeline/1f1b", marks=pytest.mark.slow),
        pytest.param("hf_t5", "pipeline+data/interleaved", marks=pytest.mark.slow),
        pytest.param("moe", "pipeline+tensor/1f1b", marks=pytest.mark.slow),
    ],
)
def test_models_of_the_zoo_equal_one_device(
    model: str, case: str, four_ranks: RankPool, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    for dtype in ("float64", "float32"):
        make_reference(model, dtype, 4, tmp_path / dtype)
        plan = piped_case(model, case, dtype).to_json()
        arguments = (model, "auto", dtype, 4, str(tmp_path / dtype), plan)
        outcome = four_ranks.run(train_and_compare, *arguments)[0]
        assert outcome.loss <= (LIMIT_FLOAT64 if dtype == "float64" else LIMIT_LOSS_FLOAT32)
        if dtype == "float64":
            assert outcome.gradient <= LIMIT_FLOAT64, outcome.worst
            assert outcome.parameter <= LIMIT_FLOAT64, outcome.worst


@pytest.mark.parametrize(
    ("model", "case"),
    [
        ("gpt_attention_dropout", "pipeline+tensor/1f1b"),
        pytest.param("hf_t5", "pipeline+tensor/zero_bubble", marks=pytest.mark.slow),
        pytest.param("moe", "pipeline+zero/1f1b", marks=pytest.mark.slow),
    ],
)
def test_what_crosses_in_parts_equals_one_device(
    model: str, case: str, four_ranks: RankPool, tmp_path: Path
) -> None:
    """On two hosts, values that are whole on every rank of a stage go in parts to the next one."""
    torch.set_num_threads(1)
    make_reference(model, "float64", 2, tmp_path / "reference")
    plan = piped_case(model, case, "float64").to_json()
    arguments = (model, "auto", "float64", 2, str(tmp_path / "reference"), plan, None, "2xcpu:2")
    outcome = four_ranks.run(train_and_compare, *arguments)[0]
    assert outcome.crossing and set(outcome.crossing) <= {"tp", "dp"}
    assert outcome.loss <= LIMIT_FLOAT64
    assert outcome.gradient <= LIMIT_FLOAT64, outcome.worst
    assert outcome.parameter <= LIMIT_FLOAT64, outcome.worst


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pipeline+data/interleaved", "pipeline+tensor/zero_bubble"])
def test_blocks_that_run_again_in_the_backward(
    case: str, four_ranks: RankPool, tmp_path: Path
) -> None:
    captured = zoo_capture("llama", "float64")
    blocks = find_blocks(specialise(prepare(captured.graph), captured.symbols))
    first, _, copies = blocks.regions[0]
    again = (Recompute(first.name, copies, full=1, selective=copies - 1),)
    plan = replace(piped_case("llama", case, "float64"), recompute=again)
    make_reference("llama", "float64", 4, tmp_path / "reference")
    arguments = ("llama", "auto", "float64", 4, str(tmp_path / "reference"), plan.to_json())
    outcome = four_ranks.run(train_and_compare, *arguments)[0]
    assert max(outcome.loss, outcome.gradient, outcome.parameter) <= LIMIT_FLOAT64


def test_a_loss_outside_of_the_module_is_refused(four_ranks: RankPool) -> None:
    plan = planned(Outside(), "1f1b", (batch(0)[0],)).to_json()
    for text in four_ranks.run(refused_outside, plan):
        assert "what it returns is no loss" in text
        assert "return the loss from forward" in text
