"""What a capture depends on beside tensors: what the code of a model reads, and nothing else."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.python_state import python_state

SCALE = 1.0
TABLE = {"deep": [1.0, {"rate": 2.0}]}
loss = 0.0  # of the loop; the model has an attribute of that name


@dataclass
class Settings:
    beta: float = 1.0
    path: tuple[int, ...] = (1, 2)


@dataclass
class Slotted:
    __slots__ = ("beta",)
    beta: float


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


def twice_scaled(x: Tensor) -> Tensor:
    return scaled(scaled(x)) * TABLE["deep"][0]


def halved(x: Tensor) -> Tensor:
    return x / 2


class Model(nn.Module):
    power = 1

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.weights = {"a": 1.0, "b": 2.0, "c": 3.0}
        self.nested = {"one": {"two": {"three": [1, 2, 3]}}}
        self.options = argparse.Namespace(beta=1.0, width=2)
        self.settings = Settings()
        self.slotted = Slotted(1.0)
        self.mask = torch.zeros(2)
        self.table = np.zeros(5000)
        self.kinds = {"x", "y"}
        self.rate: Any = functools.partial(torch.mul, other=2.0)
        self.loss = halved

    def forward(self, x: Tensor) -> Tensor:
        return self.helped(self.loss(self.inner(x)))

    def helped(self, x: Tensor) -> Tensor:
        total = sum(self.weights.values()) + self.nested["one"]["two"]["three"][0]
        total += self.options.beta + self.settings.beta + self.slotted.beta + len(self.kinds)
        x = self.rate(twice_scaled(x) ** self.power) + self.mask
        return x * total + torch.from_numpy(self.table).sum()


class Changeable(Model):
    """Names no attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.note = 0


def _set(path: str, value: Any) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        *parents, last = path.split(".")
        setattr(functools.reduce(getattr, parents, model), last, value)

    return change


CHANGES: dict[str, Callable[[Model], Any]] = {
    "first entry": lambda m: m.weights.update(a=5.0),
    "middle entry": lambda m: m.weights.update(b=5.0),
    "last entry": lambda m: m.weights.update(c=5.0),
    "new entry": lambda m: m.weights.update(d=5.0),
    "nested": lambda m: m.nested["one"]["two"]["three"].__setitem__(0, 9),
    "namespace": _set("options.beta", 2.0),
    "namespace's new": _set("options.more", 2.0),
    "dataclass": _set("settings.beta", 2.0),
    "slots": _set("slotted.beta", 2.0),
    "tensor": lambda m: m.mask.fill_(1.0),
    "other tensor": lambda m: setattr(m, "mask", torch.zeros(2)),
    "array": lambda m: m.table.__setitem__(slice(None), 1.0),
    "set": lambda m: m.kinds.add("z"),
    "partial": lambda m: setattr(m, "rate", functools.partial(torch.mul, other=3.0)),
    "function": _set("loss", torch.neg),
    "layer's own": _set("inner.note", 1),
    "structure": lambda m: setattr(m, "inner", nn.Linear(2, 2)),
    "hook": lambda m: m.inner.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("decorated", [False, True])
def test_a_change_of_what_code_reads_tells(change: Callable[[Model], Any], decorated: bool) -> None:
    model: Any = autopar.parallelize(Model()) if decorated else Model()
    before = python_state(model)
    assert python_state(model) == before
    assert hash(python_state(model)) == hash(before)
    change(model)
    assert python_state(model) != before


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (__name__, "SCALE", 2.0),
        (__name__, "TABLE", {"deep": [1.0, {"rate": 3.0}]}),
        (__name__, "scaled", halved),
        (f"{__name__}.Model", "power", 2),
        (f"{__name__}.Model", "helped", lambda self, x: x),
    ],
)
def test_globals_and_classes_count(
    monkeypatch: pytest.MonkeyPatch, where: str, name: str, value: object
) -> None:
    model = autopar.parallelize(Changeable())
    before = python_state(model)
    monkeypatch.setattr(f"{where}.{name}", value)
    assert python_state(model) != before


def test_what_code_does_not_read_is_the_loops_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = autopar.parallelize(Changeable())
    before = python_state(model)
    model.note = 1
    model.best = SimpleNamespace(epoch=3)
    monkeypatch.setattr(f"{__name__}.loss", 3.0)
    assert python_state(model) == before


def test_attributes_read_by_computed_names_count() -> None:
    class Computed(Model):
        def forward(self, x: Tensor) -> Tensor:
            return x * getattr(self, "no" + "te")

    model: Any = autopar.parallelize(Computed())
    model.note = 1
    before = python_state(model)
    model.note = 2
    assert python_state(model) != before


def test_attributes_of_bases_from_libraries_count() -> None:
    class Scaled(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = Scaled(0.1)
    before = python_state(model)
    model.p = 0.2
    assert python_state(model) != before


def test_what_forward_assigns_does_not_count() -> None:
    model = Model()
    before = python_state(model, {("", "options")})
    model.options = argparse.Namespace(beta=7.0)
    assert python_state(model, {("", "options")}) == before


def test_what_contains_itself() -> None:
    model: Any = Model()
    model.weights["self"] = model.weights
    model.options.parent = model.options
    before = python_state(model)
    assert python_state(model) == before
    model.weights["c"] = 4.0
    assert python_state(model) != before


def test_a_tensor_in_the_place_of_a_dead_one_is_another() -> None:
    model: Any = Model()
    model.mask = torch.zeros(2)
    seen = {python_state(model)}
    for _ in range(20):
        del model.mask
        model.mask = torch.zeros(2)
        assert python_state(model) not in seen
        seen.add(python_state(model))
