"""Numbers that compiled code hands on without being compiled for each of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from autopar.runtime.unseen import left_alone, with_unseen

STEPS = 2 * torch._dynamo.config.recompile_limit


def test_no_number_compiles_anything_again() -> None:
    scaled = left_alone(lambda x, number, offset=0: x * number + offset)

    def run(x: Tensor, seed: int, y: Tensor, micro_batch: int) -> Tensor:
        z: Tensor = scaled(x.relu() + y, seed)
        once_more: Tensor = scaled(z.exp(), number=micro_batch, offset=1)
        return once_more.sin()

    roles = ("input", "seed", "input", "micro_batch")
    compiled = with_unseen(torch.compile(run, backend="aot_eager", dynamic=False), roles)
    x, y = torch.randn(5), torch.randn(5)
    compiled(x, 1, y, 2)
    counters.clear()
    for n in range(STEPS):
        torch.testing.assert_close(compiled(x, n, y, n + 1), run(x, n, y, n + 1))
    assert not counters["stats"]["unique_graphs"]


def test_what_has_no_numbers_runs_as_it_is() -> None:
    def run(x: Tensor) -> Tensor:
        return x

    assert with_unseen(run, ("input",)) is run
