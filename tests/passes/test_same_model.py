"""A plan is refused for another model, with what differs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from autopar.errors import UserError
from autopar.passes.same_model import check_model, parts_of
from autopar.plan import Plan
from tests import hinted_model
from tests.hinted_model import Model, batch, captured, plain
from tests.simulate import plan_of, subject_of


@cache
def plan() -> Plan:
    return plan_of(plain(), 2, "data")


class Doubled(Model):
    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return super().forward(ids, targets) * 2


class Weighed(Model):
    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return super().forward(targets, ids)


class Silu(Model):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.forward = lambda x, b=block: x + b.down(nn.functional.silu(b.up(b.norm(x))))


def extended() -> nn.Module:
    model = Model()
    model.extra = nn.Linear(2, 3, bias=False)
    return model


def unbiased() -> nn.Module:
    model = Model()
    model.head = nn.Linear(16, 32, bias=False)
    return model


def wider() -> nn.Module:
    model = Model()
    for block in model.blocks:
        block.up, block.down = nn.Linear(16, 80), nn.Linear(80, 16)
    return model


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Model(layers=5), ["the model has 5 blocks.* blocks, the plan 4"]),
        (
            wider,
            [
                "parameter blocks.{0..3}.up.weight is f64[80, 16], the plan has f64[64, 16]",
                "parameter blocks.{0..3}.up.bias is f64[80], the plan has f64[64]",
                "parameter blocks.{0..3}.down.weight is f64[16, 80], the plan has f64[16, 64]",
            ],
        ),
        (extended, ["the plan knows no parameter extra.weight (f64[3, 2])"]),
        (
            unbiased,
            [
                "the model has no parameter head.bias, which the plan stores",
                "op linear(%, %) at hinted_model.py:",
                " is linear(%, %, %) at hinted_model.py:",
            ],
        ),
        (Doubled, ["op mul(%, 2) at test_same_model.py:", "is not in the plan"]),
        (Silu, ["op silu(%) at test_same_model.py:", "in blocks.{0..3} is gelu(%) at"]),
        (Weighed, ["connected otherwise"]),
    ],
    ids=["layers", "width", "parameter", "bias", "op", "activation", "edges"],
)
def test_what_changed_is_said(make: type[nn.Module], expected: list[str]) -> None:
    other = captured(make())
    with pytest.raises(UserError, match="made for another model") as caught:
        check_model(plan(), other.graph, other.capture.fingerprint)
    for message in expected:
        assert message in caught.value.what
    assert len(caught.value.what.splitlines()) <= 10


def test_inputs_are_told() -> None:
    ids, _ = batch()
    other = subject_of(Model().double(), (ids, ids), {})  # one tensor, twice
    with pytest.raises(UserError, match=r"input targets .* of the plan is not in the model"):
        check_model(plan(), other.graph, other.capture.fingerprint)


def test_the_same_model_at_another_batch_is_the_same() -> None:
    other = subject_of(Model().double(), batch(6), {})
    check_model(plan(), other.graph, other.capture.fingerprint, 2)
    with pytest.raises(UserError, match="for 2 devices"):
        check_model(plan(), other.graph, other.capture.fingerprint, 4)


def test_blocks_that_do_the_same_are_one_part() -> None:
    parts = parts_of(plain().graph)
    assert plan().model == parts
    (blocks,) = [part for part in parts if part.module.startswith("blocks")]
    assert blocks.module == "blocks.{0..3}" and blocks.copies == 4 and len(blocks.ops) == 5
    assert hinted_model.LAYERS == 4 and torch.get_default_dtype() is torch.float32
