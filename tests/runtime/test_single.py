"""A module in a run of one process, op by op and compiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopar.runtime.single import SingleProcess


class Small(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 1)
        self.p = p
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        y = torch.relu(self.up(x))
        if self.p:
            y = nn.functional.dropout(y, self.p, self.training)
        out: Tensor = self.down(y)
        return out.mean()


def losses(model: Small, single: SingleProcess) -> list[float]:
    torch.manual_seed(1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(4):
        loss = single.call(Small.forward, model, (torch.randn(4, 8),), {})
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        found.append(float(loss))
    return found


def made(p: float = 0.0) -> Small:
    torch.manual_seed(0)
    return Small(p)


def test_compiled_forward_gives_the_same_losses() -> None:
    wanted = losses(made(), SingleProcess())
    found = losses(made(), SingleProcess("aot_eager"))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted))


def test_a_model_without_dropout_is_compiled_after_its_first_step() -> None:
    single = SingleProcess("aot_eager")
    losses(made(), single)
    assert single._compiled is not None


def test_dropout_keeps_its_masks_and_runs_op_by_op() -> None:
    single = SingleProcess("aot_eager")
    assert losses(made(0.5), single) == losses(made(0.5), SingleProcess())
    assert single._compiled is None
