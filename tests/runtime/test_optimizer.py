"""Optimizer steps on local tensors: the same numbers, and an optimizer that stays the user's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.compat import fake_process_group, local_of
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_sharding
from autopar.runtime import world
from autopar.runtime.optimizer import ELEMENTWISE, LocalSteps
from autopar.runtime.placements import shard

SHAPES = {"matrix": (6, 4), "bias": (5,), "scale": ()}
STORED = {"matrix": "[dp, -]", "bias": "[dp]", "scale": "[]"}
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


def whole(name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def placed(value: Tensor, name: str) -> DTensor:
    mesh = Mesh.of(dp=2)
    live = world.device_mesh(mesh, "cpu")
    return shard(value, parse_sharding(STORED[name]), mesh, live, rank=0)


def piece(value: Tensor, name: str) -> Tensor:
    """What rank 0 has."""
    return local_of(placed(value, name))


@pytest.fixture
def parameters() -> Iterator[dict[str, nn.Parameter]]:
    with fake_process_group(2):
        steps = LocalSteps()
        yield {name: nn.Parameter(placed(whole(name, 0), name)) for name in SHAPES}
        steps.close()


def give(parameters: dict[str, nn.Parameter], seed: int) -> None:
    for name, parameter in parameters.items():
        parameter.grad = placed(whole(name, seed), name)


def reference(make: Callable[[Any], torch.optim.Optimizer], steps: int) -> dict[str, Tensor]:
    own = {name: nn.Parameter(whole(name, 0)) for name in SHAPES}
    optimizer = make(list(own.values()))
    for step in range(1, steps + 1):
        for name, parameter in own.items():
            parameter.grad = whole(name, step)
        optimizer.step()
    return {name: piece(value.detach(), name) for name, value in own.items()}


def same(parameters: dict[str, nn.Parameter], wanted: dict[str, Tensor]) -> bool:
    return all(
        isinstance(p, DTensor) and torch.equal(local_of(p), wanted[name])
        for name, p in parameters.items()
    )


@pytest.mark.parametrize("name", MAKERS)
def test_pieces_get_what_the_whole_gets(name: str, parameters: dict[str, nn.Parameter]) -> None:
    optimizer = MAKERS[name](list(parameters.values()))
    assert type(optimizer) in ELEMENTWISE
    for step in (1, 2, 3):
        give(parameters, step)
        optimizer.step()
    assert same(parameters, reference(MAKERS[name], 3))
    for parameter in parameters.values():
        for value in optimizer.state[parameter].values():
            is_placed = isinstance(value, Tensor) and value.shape == parameter.shape and value.dim()
            assert isinstance(value, DTensor) or not is_placed


@pytest.mark.parametrize("before", [0, 1])
def test_a_step_that_raises_leaves_the_optimizer(
    before: int, parameters: dict[str, nn.Parameter], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = MAKERS["sgd"](list(parameters.values()))
    for step in range(1, before + 1):
        give(parameters, step)
        optimizer.step()
    give(parameters, before + 1)
    kept = [p.grad for p in parameters.values()]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[torch.optim.SGD.__module__], "sgd", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            optimizer.step()
    held = optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(held, parameters.values(), strict=True))
    assert all(a is b.grad for a, b in zip(kept, parameters.values(), strict=True))
    assert set(optimizer.state) <= set(parameters.values())
    optimizer.step()
    assert same(parameters, reference(MAKERS["sgd"], before + 1))
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters.values())


def test_hooks_see_whole_parameters_and_may_set_gradients(
    parameters: dict[str, nn.Parameter],
) -> None:
    optimizer = MAKERS["adamw"](list(parameters.values()))
    seen = []

    def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            seen.append(isinstance(parameter, DTensor))
            parameter.grad = parameter.grad / 2

    optimizer.register_step_pre_hook(halve)
    give(parameters, 1)
    optimizer.step()
    assert seen == [True] * len(SHAPES)
    for name, parameter in parameters.items():
        if parameter.dim():
            average = local_of(optimizer.state[parameter]["exp_avg"])
            assert torch.allclose(average, 0.1 * piece(whole(name, 1), name) / 2)


def test_two_sessions_and_schedulers(parameters: dict[str, nn.Parameter]) -> None:
    """Hooks of a second parallel module, and a scheduler that has wrapped the step before."""
    optimizer = MAKERS["sgd"](list(parameters.values()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=1.0)
    second = LocalSteps()
    for step in (1, 2):
        give(parameters, step)
        optimizer.step()
        scheduler.step()
    second.close()
    assert same(parameters, reference(MAKERS["sgd"], 2))
