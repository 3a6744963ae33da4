"""Functions that enclose parts of a model enclose those of its copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.closures import copy_closures


def around_a_method(model: Any) -> Callable[[Tensor], Tensor]:
    old = model[0].forward
    return lambda x: old(x) * 2


def around_a_function(model: Any) -> Callable[[Tensor], Tensor]:
    inner = around_a_method(model)
    return lambda x: inner(x) + 1


def around_a_parameter(model: Any) -> Callable[[Tensor], Tensor]:
    weight, numbers = model[1].weight, [2.0]
    return lambda x: nn.functional.linear(x, weight) * numbers[0]


def around_the_model(model: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor, again: bool = True) -> Tensor:
        made: Tensor = forward(x, again=False) if again else model[1](x)
        return made

    return forward


@pytest.mark.parametrize(
    "make", [around_a_method, around_a_function, around_a_parameter, around_the_model]
)
def test_the_copy_runs_its_own_layers(make: Callable[[Any], Callable[[Tensor], Tensor]]) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].forward = make(model)
    x, memo = torch.ones(2, 3), {}
    wanted = model(x)
    copy_closures(model, memo)
    twin = copy.deepcopy(model, memo)
    assert torch.equal(twin(x), wanted)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(model(x), wanted)
    assert torch.equal(twin[0](x), torch.full((2, 3), float(make is around_a_function)))


def test_other_functions_are_taken_as_they_are() -> None:
    seen: list[Tensor] = []
    model: Any = nn.Sequential(nn.Linear(3, 3))
    model[0].note = lambda x: seen.append(x)
    memo: dict[int, Any] = {}
    copy_closures(model, memo)
    assert not memo and copy.deepcopy(model, memo)[0].note is model[0].note
