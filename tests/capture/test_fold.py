"""Folded captures equal whole ones, and models that do not repeat themselves are not folded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autopar.capture import capture
from autopar.capture.repeats import find_runs, shortened

from .deep import DEEP, assert_identical, deep, folded_and_whole, is_folded

WIDTH = 8


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH, index: int = 0, **attributes: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.index = index
        vars(self).update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.linear(x))


class Stack(nn.Module):
    """Layers, a head tied to the stem, and a function of (module, hidden) between them."""

    def __init__(
        self, function: Callable[[Any, Tensor], Any], layers: nn.Module | None = None, n: int = 6
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = layers or nn.ModuleList(Layer(index=i) for i in range(n))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.stem.weight
        self.function = function

    def forward(self, x: Tensor) -> Any:
        result = self.function(self, self.stem(x))
        return self.head(result) if isinstance(result, Tensor) else result


QUICK = ("gpt", "vit", "moe_index")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DEEP],
)
def test_folded_zoo_is_the_whole_capture(name: str) -> None:
    folded, whole = folded_and_whole(*deep(name, 5))
    assert is_folded(folded) and not whole.notes
    assert_identical(folded, whole)


@pytest.mark.slow
def test_encoder_and_decoder_fold_beside_each_other() -> None:
    folded, whole = folded_and_whole(*deep("hf_t5", 5))
    (note,) = folded.notes
    # The first layers of both have the position table, which the others share.
    assert "encoder.block.1 to encoder.block.4" in note
    assert "decoder.block.1 to decoder.block.4" in note
    assert_identical(folded, whole)


# What folds


def through(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = layer(x)
    return x


def enumerated(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        assert layer.index == i
        x = layer(x)
    return x


def with_loss_of_each(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    loss = x.new_zeros(())
    for layer in self.layers:
        x = layer(x)
        loss = loss + x.square().mean()
    return x, loss


def with_memory_of_first(self: Any, x: Tensor) -> Tensor:
    first = None
    for layer in self.layers:
        x = layer(x) if first is None else layer(x) + first
        first = x if first is None else first
    return x


def checkpointed(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    out: Tensor = checkpoint(torch.relu, x, use_reentrant=False)
    return out


def in_place(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x += layer(x)
        x[:, 0] = 0
    return x


def partly_without_gradients(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        with torch.no_grad():
            scale: Tensor = layer(x).abs().amax()
        x = layer(x) / (1 + scale)
    return x


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2 + x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return grad * (2 + x.cos())


def double(x: Tensor) -> Tensor:
    return Doubled.apply(x)  # type: ignore[no-untyped-call,no-any-return]


def with_functions(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = double(layer(x))
    return double(x)


def with_constants(self: Any, x: Tensor) -> Tensor:
    x = x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    return through(self, x)


@pytest.mark.parametrize(
    "function",
    [
        through, enumerated, with_loss_of_each, with_memory_of_first, checkpointed, in_place,
        partly_without_gradients, with_functions, with_constants,
    ],
)  # fmt: skip
def test_folds(function: Callable[[Any, Tensor], Any]) -> None:
    folded, whole = folded_and_whole(Stack(function), (torch.randn(4, WIDTH),), {})
    assert is_folded(folded), folded.notes
    assert_identical(folded, whole)


class Normed(nn.Module):
    """A layer with buffers that forward updates."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.norm(self.linear(x)) + x  # type: ignore[no-any-return]


def containers() -> Iterator[tuple[str, nn.Module, Callable[[Any, Tensor], Any]]]:
    yield "sequential", nn.Sequential(*map(Layer, [WIDTH] * 5)), lambda m, x: m.layers(x)
    named = nn.ModuleDict({f"layer{i}": Layer() for i in range(5)})

    def by_name(self: Any, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x

    yield "by name", named, by_name
    yield "buffers", nn.ModuleList(Normed() for _ in range(5)), through
    in_turn = [Layer() if i % 2 else nn.Linear(WIDTH, WIDTH) for i in range(9)]
    yield "in turn", nn.ModuleList(in_turn), through
    odd = [nn.Linear(WIDTH, WIDTH), *(Layer() for _ in range(5)), nn.LayerNorm(WIDTH)]
    yield "odd ends", nn.ModuleList(odd), through
    yield "buffers at the end", nn.ModuleList([*(Layer() for _ in range(5)), Normed()]), through
    common = nn.LayerNorm(WIDTH)
    shared = [nn.Sequential(common, nn.Linear(WIDTH, WIDTH)) for _ in range(5)]
    yield "shared part", nn.ModuleList(shared), through
    stages = [nn.Sequential(*(Layer(index=j) for j in range(5))) for _ in range(2)]
    yield "stages", nn.Sequential(*stages), lambda m, x: m.layers(x)


@pytest.mark.parametrize(
    ("layers", "function"), [pytest.param(m, f, id=name) for name, m, f in containers()]
)
def test_folds_containers(layers: nn.Module, function: Callable[[Any, Tensor], Any]) -> None:
    folded, whole = folded_and_whole(Stack(function, layers), (torch.randn(4, WIDTH),), {})
    assert is_folded(folded), folded.notes
    assert_identical(folded, whole)


# What does not


def scaled_by_index(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        x = layer(x) / math.sqrt(i + 1)
    return x


def scaled_by_depth(self: Any, x: Tensor) -> Tensor:
    return through(self, x) / len(self.layers)


def special_late_layer(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        x = layer(x)
        if i == 4:
            x = x.sin()
    return x


def skips_across(self: Any, x: Tensor) -> Tensor:
    half = len(self.layers) // 2
    kept = []
    for layer in self.layers[:half]:
        x = layer(x)
        kept.append(x)
    for layer in self.layers[half:]:
        x = layer(x + kept.pop())
    return x


def all_hidden_states(self: Any, x: Tensor) -> Tensor:
    states = [x]
    for layer in self.layers:
        states.append(layer(states[-1]))
    return torch.stack(states).mean(0)


def dense_connections(self: Any, x: Tensor) -> Tensor:
    states = [x]
    for layer in self.layers:
        states.append(layer(sum(states)))
    return states[-1]


def returned_states(self: Any, x: Tensor) -> list[Tensor]:
    states = []
    for layer in self.layers:
        x = layer(x)
        states.append(x)
    return states


def backwards(self: Any, x: Tensor) -> Tensor:
    for i in (0, 1, 2, 4, 3, 5):
        x = self.layers[i](x)
    return x


def every_other_checkpointed(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        x = layer(x) if i in (1, 2, 3) else checkpoint(layer, x, use_reentrant=False)
    return x


def last_without_gradient(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        with torch.set_grad_enabled(i != 4):
            x = layer(x)
    return x


def late_autocast(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        with torch.autocast("cpu", torch.bfloat16, enabled=i == 4):
            x = layer(x)
    return x


def kept_on_modules(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = layer(x)
        layer.seen = x.mean()
    return x


@pytest.mark.parametrize(
    "function",
    [
        scaled_by_index, scaled_by_depth, special_late_layer, skips_across, all_hidden_states,
        dense_connections, returned_states, backwards, every_other_checkpointed,
        last_without_gradient, late_autocast, kept_on_modules,
    ],
)  # fmt: skip
def test_does_not_fold(function: Callable[[Any, Tensor], Any]) -> None:
    module = Stack(function)
    folded, whole = folded_and_whole(module, (torch.randn(4, WIDTH),), {})
    assert not is_folded(folded)
    assert len(folded.notes) == 1 and folded.notes[0].startswith("every layer was captured: ")
    assert_identical(folded, whole)
    assert len(module.layers) == 6  # type: ignore[arg-type]


def unlike() -> Iterator[tuple[str, nn.Module]]:
    yield "rates", nn.ModuleList(nn.Sequential(Layer(), nn.Dropout(i / 9)) for i in range(6))
    yield "one layer", nn.ModuleList([Layer()] * 6)
    tied = nn.ModuleList(Layer() for _ in range(6))
    tied[4].linear.weight = tied[1].linear.weight  # type: ignore[union-attr]
    yield "tied layers", tied
    frozen = nn.ModuleList(Layer() for _ in range(6))
    frozen[2].requires_grad_(False)
    yield "frozen layer", frozen
    mixed = nn.ModuleList(Layer() for _ in range(6))
    mixed[3].eval()
    yield "mode of one", mixed
    hooked = nn.ModuleList(Layer() for _ in range(6))
    hooked[3].register_forward_hook(lambda *_: None)
    yield "hook on one", hooked
    dilated = [nn.Conv1d(4, 4, 3, dilation=2**i, padding=2**i) for i in range(5)]
    yield "dilations", nn.ModuleList(dilated)
    tables = nn.ModuleList(Layer(table=torch.randn(WIDTH)) for _ in range(6))
    yield "plain tensors", tables
    yield "few", nn.ModuleList(Layer() for _ in range(3))


@pytest.mark.parametrize("layers", [pytest.param(m, id=name) for name, m in unlike()])
def test_does_not_fold_unlike_layers(layers: nn.Module) -> None:
    folded, whole = folded_and_whole(Stack(through, layers), (torch.randn(4, WIDTH),), {})
    assert not is_folded(folded)
    assert_identical(folded, whole)


# Parts


def test_module_is_as_before_even_where_forward_fails() -> None:
    module = Stack(lambda self, x: self.layers[5](x))
    layers = list(module.layers)  # type: ignore[call-overload]
    with shortened(module, find_runs(module)):
        assert len(module.layers) == 3  # type: ignore[arg-type]
    with pytest.raises(IndexError), shortened(module, find_runs(module)):
        module(torch.randn(4, WIDTH))
    x = torch.randn(4, WIDTH)
    state = {name: dict(vars(child)) for name, child in module.named_modules()}
    random_state = torch.get_rng_state()
    captured = capture(module, (x,), {}, fold=True)
    assert not is_folded(captured)
    assert list(module.layers) == layers  # type: ignore[call-overload]
    assert {name: dict(vars(child)) for name, child in module.named_modules()} == state
    assert torch.equal(torch.get_rng_state(), random_state)


def test_runs_are_found_where_layers_are_alike() -> None:
    layers = [Layer(), *(Layer(4) for _ in range(5)), Layer()]
    (run,) = find_runs(nn.ModuleDict({"a": nn.ModuleList(layers)}))
    assert (run.container, run.children, run.period) == ("a", ("1", "2", "3", "4", "5"), 1)
    assert str(run) == "a.1 to a.5" and run.units == 5


def test_shared_tensors_and_tied_weights_on_meta() -> None:
    class Rotated(Layer):
        table: Tensor

        def __init__(self, table: Tensor) -> None:
            super().__init__()
            self.register_buffer("table", table)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.table)

    with torch.device("meta"):
        table = torch.empty(WIDTH)
        module = Stack(through, nn.ModuleList(Rotated(table) for _ in range(5)))
        x = torch.empty(4, WIDTH)
    folded, whole = folded_and_whole(module, (x,), {})
    assert is_folded(folded)
    assert_identical(folded, whole)
    (buffer,) = folded.graph.placeholders("buffer")
    assert len(buffer.meta["fqns"]) == 5
    tied = [node for node in folded.graph.placeholders("param") if len(node.meta["fqns"]) > 1]
    assert [node.meta["fqns"] for node in tied] == [("stem.weight", "head.weight")]
    assert all(p.is_meta and type(p) is nn.Parameter for p in module.parameters())


def test_many_layers_on_meta() -> None:
    with torch.device("meta"):
        module = Stack(through, n=64)
        x = torch.empty(4, WIDTH)
    captured = capture(module, (x,), {}, fold=True)
    assert is_folded(captured)
    assert sum("linear" in str(n.target) for n in captured.graph.calls()) == 66
    names = [node.meta["fqns"][0] for node in captured.graph.placeholders("param")]
    assert names == [name for name, _ in module.named_parameters()]
