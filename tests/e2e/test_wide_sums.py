"""Pipelines add up 16-bit gradients of many micro-batches in float32, whoever makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from autopar.capture import capture
from autopar.runtime import step_piece
from tests.e2e.loops import batch, whole
from tests.e2e.micro_loops import made, single
from tests.e2e.piped_plans import piped_plan
from tests.e2e.pool import RankPool

pytestmark = pytest.mark.multiprocess
MICRO_BATCHES = 64
UNIT = 2.0**-8  # of one rounding to bfloat16


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as made:
        yield made


def gradients(plan: str, wide: bool) -> dict[str, Tensor]:
    """Of one step on this rank, by parameter; sums in bfloat16 unless `wide`."""
    model = made(single(), plan)
    narrow = patch.object(step_piece, "needs_wide_sum", return_value=False)
    with torch.autocast("cpu", torch.bfloat16), nullcontext() if wide else narrow:
        loss = model(*batch(0, MICRO_BATCHES))
    loss.backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


@cache
def summed() -> dict[str, Tensor]:
    """Gradients of micro-batches on one device, added up in float64."""
    model = single()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for ids, targets in zip(*(x.split(1) for x in batch(0, MICRO_BATCHES)), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, targets) / MICRO_BATCHES
        made = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, made, strict=True):
            total[name] += gradient
    return total


def error(got: dict[str, Tensor]) -> float:
    """The largest over weights of products of the error's norm over the gradient's."""
    wanted = {n: g for n, g in summed().items() if "blocks" in n and g.dim() == 2}
    return max(float((got[n] - g).norm() / g.norm()) for n, g in wanted.items())


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_sums_are_rounded_once(schedule: str, pool: RankPool) -> None:
    """On every stage; the sums of the deferred gradients of zero bubble, too."""
    with torch.autocast("cpu", torch.bfloat16):
        captured = capture(single(), batch(0, MICRO_BATCHES), {})
    plan = piped_plan(captured, 2, 2, "data", schedule, MICRO_BATCHES).to_json()
    for got in pool.run(gradients, plan, True):
        assert error(got) < 0.8 * UNIT
    for got in pool.run(gradients, plan, False):
        assert error(got) > 2 * UNIT
