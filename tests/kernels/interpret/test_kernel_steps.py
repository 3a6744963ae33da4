"""Optimizer steps through the kernel: torch's numbers and torch's state, on DTensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.compat import fake_process_group, local_of
from autopar.errors import KernelWarning
from autopar.runtime import kernel_steps
from autopar.runtime.kernels import support
from autopar.runtime.kernels.adamw import adamw
from autopar.runtime.optimizer import local_steps
from tests.runtime.test_optimizer import SHAPES, piece, placed, whole

MAKERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "fused": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.0}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "foreach": (torch.optim.Adam, {"foreach": True}),
    "lr": (torch.optim.AdamW, {"lr": torch.tensor(0.1), "fused": True}),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of tensors that the kernel was given, step by step."""
    found: list[int] = []

    def counted(params: Any, *rest: Any, **options: Any) -> None:
        found.append(len(params))
        adamw(params, *rest, **options)

    monkeypatch.setattr(kernel_steps, "adamw", counted)
    with fake_process_group(2):
        yield found


def parameters(dtype: torch.dtype = torch.float64) -> nn.ParameterDict:
    return with_kernel({name: placed(whole(name, 0).to(dtype), name) for name in SHAPES})


def with_kernel(values: dict[str, Tensor]) -> nn.ParameterDict:
    module = nn.ParameterDict((name, nn.Parameter(value)) for name, value in values.items())
    local_steps().use_kernel(module, True)
    return module


def give(own: Mapping[str, nn.Parameter], seed: int, dtype: torch.dtype = torch.float64) -> None:
    for name, parameter in own.items():
        gradient = whole(name, seed).to(dtype)
        is_placed = isinstance(parameter, DTensor)
        parameter.grad = placed(gradient, name) if is_placed else gradient


def groups(own: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    first, *rest = own.values()
    return [{"params": [first]}, {"params": rest, "betas": (0.5, 0.9), "eps": 1e-4}]


def run(
    own: Mapping[str, nn.Parameter], make: type[Any], options: dict[str, Any], dtype: torch.dtype
) -> Any:
    optimizer = make(groups(own), **{"lr": 0.1, **copy.deepcopy(options)})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for step in (1, 2, 3):
        give(own, step, dtype)
        if step == 2:
            own["bias"].grad = None
        optimizer.step()
        scheduler.step()
    return optimizer


def flat(state: dict[str, Any]) -> dict[Any, Any]:
    return {(i, k): v for i, entry in state["state"].items() for k, v in entry.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MAKERS)
def test_steps_and_state_are_torchs(name: str, dtype: torch.dtype, launches: list[int]) -> None:
    make, options = MAKERS[name]
    own = parameters(dtype)
    optimizer = run(own, make, options, dtype)
    assert launches == [1, 2, 1, 1, 1, 2]
    plain = {name: nn.Parameter(whole(name, 0).to(dtype)) for name in SHAPES}
    wanted = run(plain, make, options, dtype)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-13
    for key, parameter in own.items():
        assert isinstance(parameter, DTensor)
        expected = piece(plain[key].detach(), key)
        torch.testing.assert_close(local_of(parameter), expected, rtol=tolerance, atol=tolerance)
    got, expected_state = flat(optimizer.state_dict()), flat(wanted.state_dict())
    assert list(got) == list(expected_state)
    for key, value in got.items():
        want = expected_state[key]
        assert (value.dtype, value.shape, value.device) == (want.dtype, want.shape, want.device)
        assert isinstance(value, DTensor) or not value.dim()
        if key[1] == "step":
            assert torch.equal(value, want)
    plain_options = [{**g, "params": 0} for g in wanted.state_dict()["param_groups"]]
    assert [{**g, "params": 0} for g in optimizer.state_dict()["param_groups"]] == plain_options


@pytest.mark.parametrize("inf", [0.0, 1.0])
def test_what_a_grad_scaler_passes(inf: float, launches: list[int]) -> None:
    def stepped(own: Mapping[str, nn.Parameter]) -> Any:
        optimizer = torch.optim.AdamW(list(own.values()), lr=0.1, fused=True)
        for step, found in ((1, 0.0), (2, inf), (3, 0.0)):
            give(own, step, torch.float32)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        return optimizer

    own = parameters(torch.float32)
    optimizer = stepped(own)
    assert launches == [3, 3, 3]
    plain = {name: nn.Parameter(whole(name, 0).float()) for name in SHAPES}
    wanted = stepped(plain)
    for key, parameter in own.items():
        for got, want in ((parameter, plain[key]), (parameter.grad, plain[key].grad)):
            torch.testing.assert_close(local_of(got), piece(want.detach(), key))
        assert optimizer.state[parameter]["step"] == wanted.state[plain[key]]["step"] == 3 - inf


def test_a_saved_state_goes_on_with_and_without_kernels(launches: list[int]) -> None:
    own = parameters()
    saved = run(own, torch.optim.AdamW, {}, torch.float64).state_dict()
    launches.clear()
    mine = with_kernel({name: p.detach().clone() for name, p in own.items()})
    plain = {name: nn.Parameter(local_of(p).detach().clone()) for name, p in own.items()}
    for kept in (mine, plain):
        optimizer = torch.optim.AdamW(groups(kept), lr=0.1)
        optimizer.load_state_dict(copy.deepcopy(saved))
        for entry in optimizer.state.values() if kept is plain else ():
            entry.update({k: local_of(v) for k, v in entry.items() if isinstance(v, DTensor)})
        give(mine, 4)
        for name, parameter in plain.items():
            parameter.grad = local_of(mine[name].grad)
        optimizer.step()
    assert launches == [1, 2]
    for name, parameter in mine.items():
        torch.testing.assert_close(local_of(parameter), plain[name], rtol=1e-13, atol=1e-13)


def test_what_the_kernel_cannot_take_is_torchs(launches: list[int]) -> None:
    support.fall_back.cache_clear()
    own = parameters()
    make = torch.optim.AdamW
    optimizer = make(list(own.values()), lr=0.1, betas=(torch.tensor(0.9), torch.tensor(0.99)))
    give(own, 1)
    with pytest.warns(KernelWarning, match="kernel adamw: of a group's numbers, it takes"):
        optimizer.step()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        give(own, 2)
        optimizer.step()
    assert launches == []
    plain = {name: nn.Parameter(whole(name, 0)) for name in SHAPES}
    wanted = make(list(plain.values()), lr=0.1, betas=(0.9, 0.99))
    for step in (1, 2):
        give(plain, step)
        wanted.step()
    for key, parameter in own.items():
        # float32 betas, as tensors are
        torch.testing.assert_close(
            local_of(parameter), piece(plain[key].detach(), key), rtol=1e-6, atol=1e-6
        )


def test_other_optimizers(launches: list[int]) -> None:
    own = parameters()
    optimizer = torch.optim.SGD(list(own.values()), lr=0.1)
    give(own, 1)
    optimizer.step()
    assert launches == []


def test_the_kernel_is_for_the_modules_that_want_it(launches: list[int]) -> None:
    mine, others = parameters(), parameters()
    local_steps().use_kernel(others, False)
    for own, wanted in ((others, []), (mine, [3])):
        give(own, 1)
        torch.optim.AdamW(list(own.values()), lr=0.1).step()
        assert launches == wanted
