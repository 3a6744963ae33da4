"""What a capture depends on beside tensors: what the code of a model reads, and nothing else."""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import sys
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.code_names import is_library
from autopar.python_state import python_state

SCALE = 1.0
TABLE = {"deep": [1.0, {"rate": 2.0}]}
logger = logging.getLogger("tests.of.python.state")
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


def test_what_other_methods_read_is_the_loops_own() -> None:
    class Stepping(Model):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.meter, self.scale = 0, Rates(), 1.0

        def training_step(self, x: Tensor) -> Tensor:
            self.count += 1
            self.meter.beta = float(self.count)
            return self(x)

        def helped(self, x: Tensor) -> Tensor:
            return super().helped(x) * self.scaled_by

        @property
        def scaled_by(self) -> float:
            return self.scale

    model: Any = autopar.parallelize(Stepping())
    before = python_state(model)
    model.count, model.meter.beta = 3, 7.0
    assert python_state(model) == before
    model.scale = 2.0
    assert python_state(model) != before
    model.inner.register_forward_hook(lambda module, inputs, made: None)
    hooked = python_state(model)  # it may call anything
    model.count = 4
    assert python_state(model) != hooked


def test_numbers_that_hooks_read_count(monkeypatch: pytest.MonkeyPatch) -> None:
    factor, calls, seen = 2.0, 0, []

    def hook(module: nn.Module, inputs: Any, made: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        seen.append(made)
        return made * factor * SCALE

    model = Model()
    model.inner.register_forward_hook(hook)
    before = python_state(model)
    calls, seen = 5, [torch.ones(1)]
    assert python_state(model) == before
    monkeypatch.setattr(f"{__name__}.SCALE", 2.0)
    after = python_state(model)
    assert after != before
    factor = 3.0
    assert python_state(model) != after


def test_names_that_are_written_are_not_computed() -> None:
    class Asking(Changeable):
        def forward(self, x: Tensor) -> Tensor:
            if hasattr(self, "scale") and hasattr(self.inner, "bias"):
                x = x * getattr(self, "scale", 1.0)
            return x

    model: Any = autopar.parallelize(Asking())
    model.scale = 1.0
    before = python_state(model)
    model.note = 5
    assert python_state(model) == before
    model.scale = 2.0
    assert python_state(model) != before


@pytest.mark.parametrize(
    "read",
    [
        lambda self, name: getattr(self, name),
        lambda self, name: getattr(self, "no" + name),
        lambda self, name: getattr(self, f"{name}e"),
        lambda self, name: getattr(getattr(self, "held"), name),  # noqa: B009
        lambda self, name: [getattr(self, part) for part in (name, name)],
        lambda self, name: map(functools.partial(getattr, self), [name]),
        lambda self, name: vars(self)[name],
        lambda self, name: self.__dict__[name],
    ],
)
def test_names_that_are_computed_count(read: Callable[[Any, str], Any]) -> None:
    model: Any = Holder(functools.partial(read, name="held"))
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


class Rates:
    """A namespace of plain numbers."""

    beta = 1.0


class Helper:
    @staticmethod
    def scaled(x: Tensor) -> Tensor:
        return x * Rates.beta

    def __call__(self, x: Tensor) -> Tensor:
        return self.scaled(x)


class Own:
    """An object with slots that are no dataclass's."""

    __slots__ = ("beta",)


class Holder(nn.Module):
    """Applies what it holds."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        logger.warning("forward")
        made: Tensor = self.held(x)
        return made


def closure() -> tuple[dict[str, float], Callable[[Tensor], Tensor]]:
    rates = {"beta": 1.0}

    def scaled_by_a_rate(x: Tensor) -> Tensor:
        return x * rates["beta"]

    return rates, scaled_by_a_rate


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def scaled_by_class(self: Any, x: Tensor) -> Tensor:
        return function(self, x) * Rates.beta

    return scaled_by_class


class Decorated(nn.Module):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return x


class Importing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        import tests.hinted_model as found

        return x * float(found.of_this_test)  # type: ignore[attr-defined]


def test_what_code_calls_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [Holder(Helper()), Holder(Helper.scaled), Holder([Helper.scaled]), Decorated()]
    before = list(map(python_state, models))
    assert list(map(python_state, models)) == before
    monkeypatch.setattr(Rates, "beta", 2.0)
    for model, state in zip(models, before, strict=True):
        assert python_state(model) != state


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial, functools.lru_cache])
def test_what_functions_enclose_counts(wrap: Any) -> None:
    rates, function = closure()
    model = Holder(wrap(function))
    before = python_state(model)
    assert python_state(model) == before
    rates["beta"] = 2.0
    assert python_state(model) != before or wrap is functools.lru_cache


def test_other_forwards_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Holder(Model())
    before = python_state(model)
    model.held.forward = halved
    after = python_state(model)
    assert after != before
    monkeypatch.setattr(Holder, "forward", lambda self, x: x)
    assert python_state(model) != after


def test_modules_in_modules_count(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, outer = types.ModuleType("own.inner"), types.ModuleType("own")
    vars(inner)["beta"], vars(outer)["inner"] = 1.0, inner
    monkeypatch.setitem(globals(), "own", outer)

    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(own.inner.beta)  # type: ignore[name-defined]  # noqa: F821

    models = [Reading(), Importing()]
    monkeypatch.setattr("tests.hinted_model.of_this_test", 1.0, raising=False)
    before = list(map(python_state, models))
    assert list(map(python_state, models)) == before
    vars(inner)["beta"] = 2.0
    monkeypatch.setattr("tests.hinted_model.of_this_test", 2.0, raising=False)
    for model, state in zip(models, before, strict=True):
        assert python_state(model) != state


def _put(model: Any, value: Any) -> None:
    model.held = value


LONG = list(range(1000))
NEAR = {"a": {"b": {"c": 1}}}
SLOTS = Own()
VALUES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "long list": (LONG, lambda m: m.held.__setitem__(900, 0)),
    "long list of lists": ([[0] for _ in LONG], lambda m: m.held[900].append(1)),
    "long array": (np.zeros(100_000), lambda m: m.held.__setitem__(77_777, 1.0)),
    "array of objects": (np.array([{}, 1], dtype=object), lambda m: m.held[0].update(a=1)),
    "deque": (deque([1, 2]), lambda m: m.held.append(3)),
    "number": (Decimal("1"), lambda m: _put(m, Decimal("2"))),
    "slots": (SLOTS, lambda m: setattr(m.held, "beta", 2.0)),
    "distribution": (
        torch.distributions.Normal(0.0, 1.0),
        lambda m: _put(m, torch.distributions.Normal(0.0, 2.0)),
    ),
    "deep": ([[[[[[[[LONG, [1]]]]]]]]], lambda m: m.held[0][0][0][0][0][0][0][1].append(2)),
    "far and near": ([[[[[NEAR]]]], NEAR], lambda m: m.held[1]["a"]["b"].update(c=2)),
}


@pytest.mark.parametrize(("value", "change"), VALUES.values(), ids=VALUES)
def test_changes_in_values(value: Any, change: Callable[[Any], Any]) -> None:
    model = Holder(value)
    before = python_state(model)
    assert python_state(model) == before
    change(model)
    assert python_state(model) != before


def test_parameters_are_not_held() -> None:
    model = nn.LSTM(2, 2)  # which has weak references to its weights
    state = python_state(model)
    del model._flat_weight_refs
    assert not any(weakref.getweakrefcount(p) for p in model.parameters())
    assert state


def test_the_order_of_layers_counts() -> None:
    model = Holder(None)
    model.held = [model.first, model.second]
    before = python_state(model)
    model.held.reverse()
    assert python_state(model) != before


def test_logging_changes_nothing() -> None:
    model = Holder(None)
    before = python_state(model)
    logger.warning("as in forward")
    assert python_state(model) == before


def test_more_than_is_looked_at_is_told() -> None:
    with pytest.warns(UserWarning, match="more than 8192 Python values"):
        python_state(Holder([[i] for i in range(10_000)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        python_state(Holder(list(range(10_000))))


def enclosed() -> weakref.ref[nn.Module]:
    layer = nn.Linear(2, 2)

    class Enclosing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = layer(x)
            return made

    python_state(Enclosing())
    return weakref.ref(layer)


def test_a_class_and_what_it_encloses_is_not_kept_alive() -> None:
    dead = enclosed()
    gc.collect()
    assert dead() is None


def test_a_module_of_the_users_with_a_name_of_the_standard_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = types.ModuleType("code.model")
    mine.__file__ = "/home/someone/code/model.py"
    monkeypatch.setitem(sys.modules, "code.model", mine)
    assert not is_library("code.model")
    assert is_library("logging.handlers")
    assert is_library("sys")
    assert not is_library("__main__")
