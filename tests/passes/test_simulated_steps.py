"""Zoo models in micro-batches on simulated ranks equal one device."""

from __future__ import annotations

import pytest
import torch

from autopar.passes.lower_step import why_not_micro_batched
from tests.simulate import (
    assert_equivalent,
    decisions_of,
    plan_of,
    single_device,
    zoo_loss,
    zoo_subject,
)
from tests.simulate_step import simulate_step
from tests.zoo import ZOO

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
