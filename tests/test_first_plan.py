"""The plan of a parallel module's first call: what is said where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.errors import UserError
from autopar.first_plan import searched
from autopar.options import Options
from autopar.pipeline_options import pipelines_asked
from autopar.planning import capture_training
from tests.simulate import cpu


class Skips(nn.Module):
    """Every layer is read again at the end, so that few places are crossed by few values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            kept.append(x)
        for one in kept:
            x = x * torch.sigmoid(one)
        return x.square().mean()


def refusal(limit: float, schedule: str | None = None, stages: int | None = None) -> UserError:
    captured = capture_training(Skips(), (torch.zeros(8, 16),), {}, fold=True)
    strategy, counts = ("pipeline+data", (4,)) if stages else ("data", (1,))
    options = Options(
        strategy=strategy,
        cluster=cpu(4),
        memory_limit=limit,
        micro_batches=counts[0],
        pipelines=pipelines_asked(strategy, stages, schedule, counts),
    )
    with pytest.raises(UserError) as caught:
        searched(captured, options, ())
    return caught.value


def test_a_tenth_is_left_of_a_limit_that_is_not_enough() -> None:
    error = refusal(1024.0)
    assert "the model fits on no plan" in error.what
    assert error.what.endswith("a tenth of 1 KiB is left for what a prediction may be off by")


def test_what_has_nothing_to_do_with_the_limit_does_not_speak_of_it() -> None:
    error = refusal(2.0**30, "1f1b", 4)
    assert "cannot be cut into 4 stages" in error.what and "a tenth" not in error.what


def test_a_schedule_that_needs_more_pieces_is_named() -> None:
    error = refusal(2.0**30, "interleaved", 2)
    assert "no pipeline with the strategy 'pipeline+data' exists" in error.what
    assert "another schedule" in (error.fix or "")
