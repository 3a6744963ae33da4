"""A module in a run of one process, op by op and compiled."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from autopar.runtime import compiled_dropout
from autopar.runtime.random import draw_seed, keep_mask, whole
from autopar.runtime.single import NotCompiledWarning, SingleProcess, switched_on


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
        found.append(loss.item())
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
    assert False in single._compiled


def test_dropout_keeps_its_masks_when_compiled() -> None:
    losses(made(0.25), SingleProcess("aot_eager"))  # of another probability
    single = SingleProcess("aot_eager")
    counters.clear()
    found = losses(made(0.5), single)
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(losses(made(0.5), SingleProcess()))
    )
    assert True in single._compiled
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
    assert True in single._compiled
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def outputs(model: nn.Module, single: SingleProcess, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of calls in training, one after another; an error counts as NaN."""
    torch.manual_seed(1)
    found = []
    for x in inputs:
        try:
            found.append(single.call(type(model).forward, model, (x,), {}).detach())
        except (RuntimeError, ValueError):
            found.append(torch.tensor(math.nan))
    return found


def check_same(made: Callable[[], nn.Module], inputs: Sequence[Tensor]) -> SingleProcess:
    """Compiled or not, calls give the same; returns what compiled them."""
    single = SingleProcess("aot_eager")
    torch.manual_seed(0)
    found = outputs(made(), single, inputs)
    torch.manual_seed(0)
    wanted = outputs(made(), SingleProcess(), inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    return single


class Breaking(Small):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x) + torch.rand(())


def test_what_is_no_graph_runs_op_by_op_and_says_why_where_and_what_to_do() -> None:
    with pytest.warns(NotCompiledWarning) as warned:
        check_same(lambda: Breaking(0.5), [torch.ones(4, 8)] * 3)
    line = Breaking.forward.__code__.co_firstlineno + 1
    assert str(warned[0].message) == (
        "Breaking.forward draws dropout masks and runs op by op, not compiled by aot_eager: "
        "forward calls a function that is excluded from capture\n"
        f"  at:  test_single.py:{line}\n"
        "  fix: remove the torch.compiler.disable or graph_break, or move the call out of forward"
    )


class Picky(Small):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise ValueError("not three")
        return super().forward(x)


@pytest.mark.parametrize("shape", [(3, 8), (4, 7)])  # its own error, and one of a shape
def test_an_error_of_the_forward_is_its_own_and_ends_nothing(
    shape: tuple[int, int], recwarn: pytest.WarningsRecorder
) -> None:
    good, bad = torch.ones(4, 8), torch.ones(shape)
    single = check_same(lambda: Picky(0.5), [good, good, bad, good, bad, good])
    assert single._compiles and not [w for w in recwarn if w.category is NotCompiledWarning]
    torch._dynamo.reset()
    with pytest.raises((ValueError, RuntimeError)) as compiled:
        single.call(Picky.forward, Picky(0.5), (bad,), {})
    with pytest.raises(compiled.type, match=re.escape(str(compiled.value))):
        Picky.forward(Picky(0.5), bad)


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Let it be what is around, and not that which other tests have made."""
    monkeypatch.setattr(compiled_dropout, "compile_backend", lambda name: backend)
    monkeypatch.setattr("autopar.runtime.single.compiled_dropout", compiled_dropout.CompiledDropout)


@pytest.mark.parametrize("kind", [IndexError, ValueError])
def test_a_backend_that_fails_is_done_without(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fails(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        torch.rand(3)
        raise kind

    use_backend(monkeypatch, fails)
    line = Small.forward.__code__.co_firstlineno
    with pytest.warns(NotCompiledWarning) as warned:
        check_same(lambda: Small(0.5), [torch.ones(4, 8)] * 3)
    said = f"fails with {kind.__name__}\n  at:  test_single.py:{line}\n  fix: pass backend="
    assert said in str(warned[0].message)


def test_a_backend_that_fails_in_the_backward_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise ValueError("no backward")

    made = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=fails)
    use_backend(monkeypatch, made)
    torch._dynamo.reset()
    model, single = Small(0.5), SingleProcess("inductor")
    with pytest.warns(NotCompiledWarning, match="no backward"):
        gradients(model, single)


def test_a_backend_that_fails_without_dropout_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise ValueError("no")

    use_backend(monkeypatch, fails)
    model, single = Small(), SingleProcess("inductor")
    single.call(Small.forward, model, (torch.ones(4, 8),), {})
    with pytest.raises(BackendCompilerFailed) as raised:
        single.call(Small.forward, model, (torch.ones(4, 8),), {})
    assert 'backend="eager"' in raised.value.__notes__[0]


def test_an_error_while_the_graph_runs_is_raised_as_it_is() -> None:
    class Looking(Small):
        def forward(self, x: Tensor) -> Tensor:
            ids = x[:, 0].long()
            return nn.functional.dropout(nn.functional.embedding(ids, self.up.weight), 0.5).mean()

    model, single = Looking(), SingleProcess("aot_eager")
    good = torch.ones(4, 8)
    for x in (good, good):
        single.call(Looking.forward, model, (x,), {})
    with pytest.raises(IndexError, match="index out of range"):
        single.call(Looking.forward, model, (good * 99,), {})
    assert single._compiles


def test_batches_of_other_sizes_draw_their_masks() -> None:
    sizes = [4, 4, 6, 5, 1, 9, 4]
    torch._dynamo.reset()
    counters.clear()
    single = check_same(lambda: Small(0.5), [torch.ones(n, 8) for n in sizes])
    assert single._compiles
    assert counters["stats"]["unique_graphs"] <= 3  # of 4, of any, of 1


def test_shapes_that_change_too_often_end_compilation_with_a_warning() -> None:
    torch._dynamo.reset()
    never_dynamic = torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=2)
    with never_dynamic, pytest.warns(NotCompiledWarning, match="anew too often") as warned:
        check_same(lambda: Small(0.5), [torch.ones(n, 8) for n in range(1, 7)])
    assert "torch._dynamo.config.recompile_limit" in str(warned[0].message)
    assert sum(w.category is NotCompiledWarning for w in warned) == 1


def test_two_calls_before_a_backward_keep_their_masks() -> None:
    def run(single: SingleProcess) -> list[Tensor]:
        model = made(0.5)
        torch.manual_seed(1)
        for _ in range(2):
            losses = [single.call(Small.forward, model, (torch.ones(4, 8),), {}) for _ in "ab"]
            assert not torch.equal(*losses)
            sum(losses).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(run(SingleProcess("aot_eager")), run(SingleProcess()))


def test_no_grad_draws_masks_and_evaluation_draws_none() -> None:
    def run(single: SingleProcess) -> list[Tensor]:
        model, x = made(0.5), torch.ones(4, 8)
        torch.manual_seed(1)

        def call() -> Tensor:
            out: Tensor = single.call(Small.forward, model, (x,), {})
            return out

        found = [call(), call()]
        with torch.no_grad():
            found += [call(), call()]
            before = torch.get_rng_state()
            model.eval()
            found += [call(), call()]
            assert torch.equal(before, torch.get_rng_state())
        model.train()
        return [*found, call()]

    found = run(SingleProcess("aot_eager"))
    torch.testing.assert_close(found, run(SingleProcess()))
    assert not torch.equal(found[2], found[3]) and torch.equal(found[4], found[5])


class Noisy(nn.Module):
    """Draws numbers of its own."""

    def __init__(self, p: float | None) -> None:
        super().__init__()
        self.drop = nn.Identity() if p is None else nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x + torch.rand(x.shape)).sum()


@pytest.mark.parametrize("p", [None, 0.0])
@pytest.mark.parametrize("training", [True, False])
def test_a_module_without_masks_draws_the_numbers_of_one_device(
    p: float | None, training: bool
) -> None:
    model, x = Noisy(p).train(training), torch.ones(5)
    torch.manual_seed(1)
    wanted = [model(x) for _ in range(3)]
    after = torch.get_rng_state()
    for backend in (None, "aot_eager"):
        assert outputs(model, SingleProcess(backend), [x] * 3) == wanted
        assert torch.equal(torch.get_rng_state(), after)


def test_masks_and_numbers_of_its_own_are_the_same_compiled() -> None:
    check_same(lambda: Noisy(0.5), [torch.ones(5)] * 4)


class Always(nn.Module):
    """Drops in evaluation, too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_dropout_that_is_on_in_evaluation_draws_masks_of_ours(backend: str | None) -> None:
    x = torch.ones(3, 4)

    def check(model: nn.Module, single: SingleProcess) -> None:
        found = outputs(model, single, [x] * 3)
        torch.manual_seed(1)
        for each in found:
            mask = keep_mask(0.5, draw_seed(), 0, whole((3, 4)))
            torch.testing.assert_close(each, mask * 2.0)

    check(Always().eval(), SingleProcess(backend))
    some = nn.Sequential(nn.Dropout(0.5)).eval()
    single = SingleProcess(backend)
    assert all(torch.equal(each, x) for each in outputs(some, single, [x] * 2))
    some[0].train()  # Monte Carlo dropout
    check(some, single)


class Elsewhere(nn.Module):
    """Computes on another device than that of its inputs, one without values."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        here = torch.dropout(x, p=0.5, train=True)
        return nn.functional.dropout(x.to("meta"), 0.5).sum(1), here


@pytest.mark.filterwarnings("error::autopar.runtime.single.NotCompiledWarning")
def test_masks_are_made_where_they_are_used() -> None:
    model, single = Elsewhere(), SingleProcess("aot_eager")
    torch.manual_seed(0)
    found = [single.call(Elsewhere.forward, model, (torch.ones(3, 4),), {}) for _ in range(3)]
    torch.manual_seed(0)
    for meta, here in found:
        assert meta.device.type == "meta" and meta.shape == (3,)
        mask = keep_mask(0.5, draw_seed(), 0, whole((3, 4)))
        torch.testing.assert_close(here, mask * 2.0)


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


class Attending(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        own = torch.rand(3)
        return self.attention(x, x, x, need_weights=False)[0].sum() + own.sum()


class Functional(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self.training) + torch.rand(8)


class Configured(nn.Module):
    """Its rates are no `p`; that is what it trains."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(8))
        self.drop_rate, self.settings = rate, SimpleNamespace(p=rate)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        if skip:
            return x
        dropped = nn.functional.dropout(x * self.p, self.drop_rate, self.training)
        return nn.functional.dropout(dropped, self.settings.p, self.training)


@pytest.mark.parametrize("kind", [Attending, Functional])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_first_call_draws_what_later_ones_draw(kind: type[Attending], backend: str) -> None:
    torch.manual_seed(0)
    module, x, single = kind(), torch.ones(2, 3, 8), SingleProcess(backend)
    states, found = [], []
    for _ in range(3):
        torch.manual_seed(3)
        found.append(single.call(kind.forward, module, (x,), {}))
        states.append(torch.get_rng_state())
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_rate_of_zero_and_a_dropout_that_is_not_reached_draw_nothing(backend: str | None) -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.skipped = nn.Dropout(0.0), nn.Dropout(0.5)

        def forward(self, x: Tensor, skip: bool = True) -> Tensor:
            x = self.none(x) + torch.rand(8)
            return x if skip else self.skipped(x)

    single, module, x = SingleProcess(backend), Skipping(), torch.ones(8)
    for _ in range(3):
        torch.manual_seed(1)
        plain = torch.ones(8) + torch.rand(8)
        after = torch.get_rng_state()
        torch.manual_seed(1)
        assert torch.equal(single.call(Skipping.forward, module, (x,), {}), plain)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_masks_that_come_later_are_those_of_any_plan(backend: str | None) -> None:
    def calls(early: bool, change: Any, module: Any) -> list[Tensor]:
        single, x = SingleProcess(backend), torch.ones(2, 3, 8)
        if early:
            for _ in range(2):
                single.call(type(module).forward, module, (x,), {})
        change(module)
        torch.manual_seed(1)
        return [single.call(type(module).forward, module, (x,), {}) for _ in range(3)]

    def frozen() -> Attending:
        torch.manual_seed(0)
        made = Attending()
        made.attention.eval()
        return made

    for change, make in (
        (lambda m: m.attention.train(), frozen),
        (lambda m: setattr(m, "p", 0.25), lambda: Functional(0.0)),
        (lambda m: setattr(m, "drop_rate", 0.25), lambda: Configured(0.0)),
        (lambda m: setattr(m.settings, "p", 0.25), lambda: Configured(0.0)),
    ):
        late, early = calls(True, change, make()), calls(False, change, make())
        assert all(torch.equal(a, b) for a, b in zip(late, early, strict=True))


def test_masks_behind_a_flag_are_those_of_any_plan() -> None:
    found = []
    for flags in ((True, False), (False,)):
        module, single = Configured(0.5), SingleProcess()
        for skip in flags:
            torch.manual_seed(1)
            made = single.call(Configured.forward, module, (torch.ones(4, 8), skip), {})
        found.append(made)
    assert torch.equal(*found) and not torch.equal(found[0], torch.ones(4, 8))


def test_a_rate_that_changes_is_found_out_once() -> None:
    module, found = nn.Sequential(nn.Dropout(0.1)), set()
    for step in range(20):
        module[0].p = 0.1 + 0.01 * step  # type: ignore[assignment]
        found.add(switched_on(module, (torch.ones(4),), {}))
    module[0].p = 0  # type: ignore[assignment]
    assert len(found) == 1 and switched_on(module, (), {}) not in found


def test_many_models_of_a_class_stay_compiled() -> None:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotCompiledWarning)
        for _ in range(10):
            model, single = Small(0.5), SingleProcess("aot_eager")
            for _ in range(2):
                single.call(Small.forward, model, (torch.ones(4, 8),), {}).backward()


def test_a_module_within_another_draws_as_a_part_of_it() -> None:
    class Part(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = inner.call(nn.Dropout.forward, self, (x,), {})
            return out

    inner, x = SingleProcess(), torch.ones(64)
    found = []
    for first in (Part(0.5), nn.Dropout(0.5)):
        outer, module = SingleProcess(), nn.Sequential(first, nn.Dropout(0.5))
        torch.manual_seed(1)
        found.append([outer.call(nn.Sequential.forward, module, (x,), {}) for _ in range(2)])
    for mine, wanted in zip(*found, strict=True):
        assert torch.equal(mine, wanted)
