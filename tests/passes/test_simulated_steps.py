"""Zoo models in micro-batches on simulated ranks equal one device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.passes.lower_step import why_not_micro_batched
from tests.simulate import (
    assert_equivalent,
    decisions_of,
    plan_of,
    single_device,
    subject_of,
    zoo_loss,
    zoo_subject,
)
from tests.simulate_step import simulate_step
from tests.zoo import ZOO
from tests.zoo.entry import model_output_is_loss

FAST = {("gpt_attention_dropout", "zero"), ("vit", "data+tensor"), ("rec", "tensor")}
CASES = [
    pytest.param(name, strategy, marks=[] if (name, strategy) in FAST else [pytest.mark.slow])
    for name in ("rec", "gpt_attention_dropout", "llama", "vit", "hf_bert", "hf_t5")
    for strategy in ("data", "zero", "tensor", "data+tensor")
]


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_zoo(name: str, strategy: str) -> None:
    torch.set_num_threads(1)
    subject, entry = zoo_subject(name), ZOO[name]
    plan = plan_of(subject, 4, strategy)
    args, kwargs = entry.inputs(0, torch.float64)
    loss = zoo_loss(entry)
    expected = single_device(subject.module, args, kwargs, loss)
    got = simulate_step(subject, args, kwargs, loss, decisions_of(subject, plan), 4)
    assert_equivalent(got, expected, f"{name} in 4 micro-batches on {plan.mesh}")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("resnet", "batch normalisation in training"),
        ("gpt_outside", "what it returns is no loss"),
        ("moe", "combines samples of the whole batch"),
    ],
)
def test_what_depends_on_the_batch_is_left_out(name: str, why: str) -> None:
    subject = zoo_subject(name)
    said = why_not_micro_batched(subject.graph, subject.capture.symbols)
    assert said is not None and why in said and ".py:" in said


class Spectral(nn.Module):
    """Two buffers of each weight take one step of the power method in every forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.utils.parametrizations.spectral_norm
        self.layers = nn.Sequential(norm(nn.Linear(12, 16)), nn.ELU(), norm(nn.Linear(16, 4)))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.layers(x).square().mean()
        return loss


class Attention(nn.Module):
    """torch's attention flattens [sequence, batch], in this order, and the heads at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        loss: Tensor = self.layer(tokens)[:, 0].square().mean()
        return loss


@pytest.mark.parametrize("strategy", ["data", "zero"])
@pytest.mark.parametrize(
    ("model", "shape"),
    # Of six samples in two micro-batches, four ranks have one, one, one and none.
    [(Spectral, (8, 12)), (Attention, (8, 4, 16)), (Attention, (6, 4, 16))],
)
def test_models_of_torch(model: type[nn.Module], shape: tuple[int, ...], strategy: str) -> None:
    args = (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)
    subject = subject_of(model().double(), args, {})
    expected = single_device(subject.module, args, {}, model_output_is_loss)
    decisions = decisions_of(subject, plan_of(subject, 4, strategy))
    got = simulate_step(subject, args, {}, model_output_is_loss, decisions, 2)
    assert_equivalent(got, expected, f"{model.__name__} in 2 micro-batches, {strategy}")
