"""A module in a run of one process, op by op and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from autopar.runtime.random import draw_seed, keep_mask, whole
from autopar.runtime.single import NotCompiledWarning, SingleProcess


class Small(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 1)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
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


def test_dropout_keeps_its_masks_when_compiled() -> None:
    losses(made(0.25), SingleProcess("aot_eager"))  # of another probability
    single = SingleProcess("aot_eager")
    counters.clear()
    found = losses(made(0.5), single)
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(losses(made(0.5), SingleProcess()))
    )
    assert single._drawing is not None
    assert counters["stats"]["unique_graphs"] == 1  # of four seeds
    assert not counters["graph_break"]


class Blocks(Small):
    """Every kind of random call, part of them in regions that are recomputed."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.drop = nn.Dropout(0.3)

    def attend(self, x: Tensor) -> Tensor:
        mask = self.drop(torch.ones_like(x))
        y = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)
        out: Tensor = self.attention(y * mask, y, y)[0]
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x[None] + self.drop(x[None])
        x = x + checkpoint(self.attend, x, use_reentrant=False)
        return super().forward(x)


def gradients(model: Small, single: SingleProcess) -> list[Tensor]:
    torch.manual_seed(1)
    for _ in range(3):
        loss = single.call(type(model).forward, model, (torch.randn(4, 8),), {})
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def blocks(dtype: torch.dtype) -> Blocks:
    torch.manual_seed(0)
    return Blocks().to(dtype)


def test_all_random_calls_have_their_numbers_when_compiled() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        single = SingleProcess("aot_eager")
        found = gradients(blocks(torch.float64), single)
        wanted = gradients(blocks(torch.float64), SingleProcess())
    finally:
        torch.set_default_dtype(default)
    assert single._random is not None and single._random.calls == 5
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Printing(Small):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def test_what_is_no_graph_runs_op_by_op_and_says_why() -> None:
    torch.manual_seed(0)
    model, single = Printing(0.5), SingleProcess("aot_eager")
    with pytest.warns(NotCompiledWarning, match=r"Printing .*graph_break"):
        found = gradients(model, single)
    torch.manual_seed(0)
    wanted = gradients(Printing(0.5), SingleProcess())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_draws_the_same_masks(dtype: torch.dtype) -> None:
    def step(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.gelu(x @ weight)
        return nn.functional.dropout(y, 0.1), y

    class Only(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return step(x, weight)

    torch.manual_seed(0)
    module, single = Only(), SingleProcess("inductor")
    counters.clear()
    for n in range(3):
        x, weight = torch.randn(33, 16).to(dtype), torch.randn(16, 65).to(dtype).requires_grad_()
        torch.manual_seed(n)
        dropped, y = single.call(Only.forward, module, (x, weight), {})
        torch.manual_seed(n)
        mask = keep_mask(0.1, draw_seed(), 0, whole((33, 65)))
        assert torch.equal(dropped != 0, mask & (y != 0))
        dropped.sum().backward()
        wanted = torch.autograd.grad((step_y(x, weight) * (mask / 0.9)).sum(), weight)[0]
        torch.testing.assert_close(weight.grad, wanted.to(dtype), rtol=0.02, atol=0.05)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def step_y(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.gelu(x @ weight)
