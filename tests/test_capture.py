"""Captured graphs compute what the modules do, and say what they cannot capture."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from autopar.capture import Capture, CaptureMismatchError, capture
from autopar.compat import fake_process_group
from autopar.errors import UserError
from autopar.ir.graph import value_of
from autopar.ir.interpret import run_graph

from .capture_helpers import assert_equals_eager, placeholder_tensors, sum_of
from .zoo import ZOO


def targets(captured: Capture) -> list[str]:
    return [str(node.target) for node in captured.graph.calls()]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Apply(nn.Module):
    """A linear layer and a function of (module, hidden, *inputs)."""

    def __init__(self, function: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).double()
        self.function = function
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, self.linear(x), *args, **kwargs)


def check(
    function: Callable[..., Any], *args: Any, train: bool = True, **buffers: Tensor
) -> tuple[Capture, nn.Module]:
    """Capture `Apply(function)` on a batch of 6 and compare it there."""
    torch.manual_seed(1)
    module = Apply(function, **buffers).train(train)
    x = rand(6, 8)
    captured = capture(module, (x, *args), {})
    assert_equals_eager(captured, module, (x, *args))
    return captured, module


# The zoo


@pytest.mark.parametrize("name", list(ZOO))
def test_zoo_equals_eager_and_fits_other_batches(name: str) -> None:
    entry = ZOO[name]
    torch.manual_seed(0)
    module = entry.double(entry.build().double()).train()
    args, kwargs = entry.inputs(0, torch.float64)
    state = copy.deepcopy(module.state_dict())
    random_state = torch.get_rng_state()

    captured = capture(module, args, kwargs)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    for batch_size in (entry.batch_size, entry.batch_size // 2 + 1):
        args, kwargs = entry.inputs(1, torch.float64, batch_size)
        target = None if entry.target is None else entry.target(1, batch_size)

        def loss(output: Any, target: Tensor | None = target) -> Tensor:
            return entry.loss(output) if target is None else entry.loss(output, target)

        assert_equals_eager(captured, module, args, kwargs, loss)


def test_zoo_in_evaluation_mode_without_gradients() -> None:
    for name in ("gpt", "resnet"):
        entry = ZOO[name]
        module = entry.build().double().eval()
        args, kwargs = entry.inputs(0, torch.float64)
        with torch.no_grad():
            captured = capture(module, args, kwargs)
            assert_equals_eager(captured, module, args, kwargs)
        assert "aten.dropout.default" not in targets(captured)
        assert not any(value_of(n).requires_grad for n in captured.graph.placeholders())
        assert captured.graph.mutated == ()


def test_graph_is_typed_named_and_sourced() -> None:
    entry = ZOO["gpt"]
    args, kwargs = entry.inputs(0)
    captured = capture(entry.build().train(), args, kwargs)
    params = captured.graph.placeholders("param")
    tied = [node for node in params if len(node.meta["fqns"]) == 2]
    assert len(tied) == 1 and tied[0].name == tied[0].meta["fqns"][0].replace(".", "_")
    roles = [node.meta["role"] for node in captured.graph.placeholders()]
    assert roles == sorted(roles, key=["param", "buffer", "constant", "input"].index)
    attention = next(n for n in captured.graph.calls() if "scaled_dot" in str(n.target))
    assert attention.meta["source"].startswith("language.py:")
    assert attention.meta["module"].endswith(".attention")
    assert [str(symbol) for symbol in captured.symbols] == ["b"]
    assert "sym_size" not in str(captured.graph.fx)


# Inputs and outputs


@dataclass
class Batch:
    x: Tensor
    labels: Tensor
    note: str = "a"


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Result:
    loss: Tensor
    parts: dict[str, Any]
    count: int


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(
        self, batch: Batch, extra: dict[str, Any], *, scale: float = 1.0, unused: Any = None
    ) -> Result:
        logits = self.linear(batch.x) * scale + extra["bias"][0]
        loss = F.cross_entropy(logits, batch.labels)
        pair = Pair(logits, logits.exp())
        return Result(loss, {"pair": pair, "x": batch.x, "list": [loss, None]}, 3)


def structured_inputs(batch_size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    batch = Batch(rand(batch_size, 4), torch.randint(3, (batch_size,)))
    return (batch, {"bias": [rand(3)], "other": (1, "z")}), {"scale": 2.0}


def test_dataclasses_dicts_keywords_and_constants() -> None:
    module = Structured()
    args, kwargs = structured_inputs(6)
    captured = capture(module, args, kwargs)
    for batch_size in (6, 4):
        args, kwargs = structured_inputs(batch_size)
        result = assert_equals_eager(
            captured, module, args, kwargs, lambda result: result.loss + sum_of(result.parts)
        )
        assert result.count == 3
        assert result.parts["x"] is args[0].x
        assert isinstance(result.parts["pair"], Pair)
        assert result.parts["list"][0] is result.loss and result.parts["list"][1] is None
    names = [node.meta["fqns"][0] for node in captured.graph.placeholders("input")]
    assert names == ["batch.x", "batch.labels", "extra.bias.0"]
    captured.flatten((), {"batch": args[0], "extra": args[1], "scale": 2.0, "unused": None})
    with pytest.raises(CaptureMismatchError):
        captured.flatten(args, {"scale": 3.0})
    inputs = captured.flatten(args, kwargs)
    assert captured.bind([inputs[0].float(), *inputs[1:]]) is None
    assert captured.bind([inputs[0][:3], *inputs[1:]]) is None
    assert captured.bind([tensor[:1] for tensor in inputs[:2]] + inputs[2:]) is None


def test_unused_inputs_parameters_and_passed_through_tensors() -> None:
    def function(self: Any, h: Tensor, mask: Tensor) -> Any:
        return h, mask, self.linear.weight

    captured, module = check(function, rand(6))
    assert len(captured.graph.placeholders("input")) == 2
    assert_equals_eager(captured, module, (rand(3, 8), rand(3)))


def test_input_that_requires_grad() -> None:
    module = nn.Linear(4, 4).double()
    x = rand(5, 4).requires_grad_()
    captured = capture(module, (x,), {})
    assert value_of(captured.graph.placeholders("input")[0]).requires_grad
    assert captured.bind([x.detach()]) is None


def test_sizes_that_the_code_depends_on_are_guarded_or_fixed() -> None:
    def even(self: Any, h: Tensor) -> Tensor:
        return h * 2 if h.shape[0] % 2 == 0 else h

    captured, _ = check(even)
    assert captured.bind([rand(4, 8)]) is not None
    assert captured.bind([rand(5, 8)]) is None

    def fixed(self: Any, h: Tensor) -> Tensor:
        return h.view(2, 3, 8).sum(1)

    captured, _ = check(fixed)
    assert captured.symbols == {} and captured.bind([rand(4, 8)]) is None

    captured, _ = check(lambda self, h: (h / h.shape[0] ** 0.5, h.shape[0]))
    assert captured.symbols == {}


# What forward may do


def test_in_place_operations() -> None:
    def function(self: Any, h: Tensor) -> Tensor:
        h = h.clone()
        h[:, 0] = 1.0
        h[:, 1:3] += h[:, 3:5]
        h.view(-1)[0].mul_(2)
        h.masked_fill_(h > 1, 0.5)
        h[torch.tensor([0, 2])] = h[1:3] * 2
        h.index_put_((torch.tensor([1]),), torch.ones(1, 8, dtype=h.dtype), accumulate=True)
        y = F.dropout(h + 1, 0.3, self.training, inplace=True)
        y += F.relu(h, inplace=True)
        return y

    captured, _ = check(function)
    assert targets(captured).count("aten.dropout.default") == 1
    assert not any(str(target).split(".")[1].endswith("_") for target in targets(captured))


def test_batch_norm_variants_return_their_statistics() -> None:
    class Net(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 4), norm

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.linear(x)), inplace=True)

    for norm, mutated in (
        (nn.BatchNorm1d(4), 3),
        (nn.BatchNorm1d(4, momentum=None), 3),
        (nn.BatchNorm1d(4, track_running_stats=False), 0),
        (nn.BatchNorm1d(4, affine=False), 3),
    ):
        module = Net(norm).double()
        module(rand(5, 8))
        captured = capture(module, (rand(6, 8),), {})
        assert len(captured.graph.mutated) == mutated
        assert targets(captured).count("autopar.batch_norm.default") == 1
        assert_equals_eager(captured, module, (rand(7, 8),))
        module.eval()
        captured = capture(module, (rand(6, 8),), {})
        assert captured.graph.mutated == ()
        assert_equals_eager(captured, module, (rand(7, 8),))


def test_buffers_are_mutated_without_gradients() -> None:
    def function(self: Any, h: Tensor) -> Tensor:
        self.steps += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
            self.table.view(-1)[:8].copy_(h[0])
            center = h.sum(0)
        self.seen.copy_(h[0])
        return h * self.mean + center + self.table[0]

    captured, _ = check(
        function,
        mean=rand(8),
        table=rand(2, 8),
        steps=torch.zeros((), dtype=torch.long),
        seen=rand(8),
    )
    assert set(captured.graph.mutated) == {"mean", "table", "steps", "seen"}
    assert "aten.detach.default" in targets(captured)


class Assigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).double()
        self.sub = nn.Linear(8, 8).double()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("unread", torch.zeros(8, dtype=torch.float64))
        self.calls = 0
        self.losses: list[Tensor] = []
        self.aux: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.unread = h.detach()[0]
        self.aux = h.sum()
        self.sub.hidden = {"h": h}  # type: ignore[assignment]
        self.calls += 1
        self.losses.append(self.aux)
        return h + self.mean


def test_assigned_buffers_and_attributes() -> None:
    module = Assigns()
    before = dict(vars(module))
    with pytest.warns(UserWarning, match=r"changes self\.calls, self\.losses"):
        captured = capture(module, (rand(6, 8),), {})
    assert captured.graph.mutated == ("mean", "unread")
    assert dict(vars(module)) == before and module.losses == []
    assert not hasattr(module.sub, "hidden")
    x = rand(4, 8)
    assert_equals_eager(captured, module, (x,), loss=lambda h: h.sum())
    results = run_graph(captured.graph, placeholder_tensors(captured, module, [x]))
    captured.assign(module, results)
    assert isinstance(module.aux, Tensor) and module.aux.requires_grad
    assert torch.equal(module.aux, module.sub.hidden["h"].sum())  # type: ignore[index]


class ScaledSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.factor = factor
        index = x.argmax(-1)
        ctx.mark_non_differentiable(index)
        return x * x * factor, index

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x * gradients[0] * ctx.factor, None  # not the true gradient


def test_autograd_function_is_one_op_with_its_backward() -> None:
    def function(self: Any, h: Tensor) -> Tensor:
        y, index = ScaledSquare.apply(h, 2.0)  # type: ignore[no-untyped-call]
        z, _ = ScaledSquare.apply(y, 3.0)  # type: ignore[no-untyped-call]
        return z * index.unsqueeze(-1)

    captured, module = check(function)
    assert sum("autograd_function" in target for target in targets(captured)) == 2
    assert_equals_eager(captured, module, (rand(4, 8),))


def test_checkpointed_regions_are_marked() -> None:
    def inner(x: Tensor) -> Tensor:
        return F.dropout(x.sin(), 0.5, True)

    def outer(x: Tensor) -> Tensor:
        return checkpoint(inner, x, use_reentrant=False).cos()  # type: ignore[no-any-return]

    def function(self: Any, h: Tensor) -> Tensor:
        for _ in range(2):
            h = checkpoint(outer, h, use_reentrant=False) + 1
        return h

    captured, _ = check(function)
    regions = {
        (str(node.target).split(".")[1], node.meta["region"]) for node in captured.graph.calls()
    }
    expected = {(op, region) for op in ("sin", "dropout", "cos") for region in (0, 1)}
    assert regions == {*expected, ("linear", None), ("add", None)}


def test_autocast_becomes_casts() -> None:
    def function(self: Any, h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(h, self.w)
            with torch.autocast("cpu", enabled=False):
                z = F.linear(h, self.w)
            loss = F.mse_loss(y, z.bfloat16())
        return loss + torch.cat([y.float(), z]).sum()

    torch.manual_seed(1)
    module = Apply(function, w=torch.randn(4, 8)).float()
    x = torch.randn(6, 8)
    captured = capture(module, (x,), {})
    assert_equals_eager(captured, module, (x,), tolerance=1e-6)
    assert "aten._to_copy.default" in targets(captured)
    with torch.autocast("cpu", torch.bfloat16):
        captured = capture(nn.Linear(8, 8), (x,), {})
    linear = next(n for n in captured.graph.calls() if "linear" in str(n.target))
    assert value_of(linear.args[0]).dtype == torch.bfloat16  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_eager(captured, module.linear, (x,), tolerance=1e-6)  # type: ignore[arg-type]


def test_constants_are_placeholders() -> None:
    table = rand(8)

    def function(self: Any, h: Tensor) -> Tensor:
        return h * torch.tensor([1.0, 2.0] * 4, dtype=h.dtype) + self.plain + table

    module = Apply(function)
    module.plain = rand(8)
    captured = capture(module, (rand(6, 8),), {})
    assert len(captured.graph.placeholders("constant")) == 3
    assert_equals_eager(captured, module, (rand(4, 8),))


def test_parametrizations_and_hooks() -> None:
    parametrized = nn.Sequential(
        weight_norm(nn.Linear(8, 8).double()), spectral_norm(nn.Linear(8, 8).double())
    )
    parametrized.register_forward_hook(lambda module, args, output: output * 2)
    captured = capture(parametrized, (rand(4, 8),), {})
    assert len(captured.graph.mutated) == 2
    assert_equals_eager(captured, parametrized, (rand(4, 8),))


def test_sharded_parameters_are_captured_whole() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(4, 8)
    whole = capture(module, (x,), {}).fingerprint
    with fake_process_group(4):
        mesh = DeviceMesh("cpu", list(range(4)))
        for layer in (module[0], module[2]):
            sharded = distribute_tensor(layer.weight.detach(), mesh, [Shard(0)])  # type: ignore[arg-type]
            layer.weight = nn.Parameter(sharded)
        assert capture(module, (x,), {}).fingerprint == whole
        assert isinstance(module[0].weight, DTensor)


def test_recurrent_and_attention_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 8, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h, _ = self.rnn(x)
            h, _ = self.attention(h, h, h)
            return self.layer(h)  # type: ignore[no-any-return]

    module = Net().double()
    captured = capture(module, (rand(3, 5, 8),), {})
    assert_equals_eager(captured, module, (rand(3, 5, 8),))


def test_masks_of_a_transformer() -> None:
    """Torch compares a mask's values with those of the causal one, to which a graph has no answer."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(4).to(x.dtype)
            return self.both(x, y, tgt_mask=mask)  # type: ignore[no-any-return]

    module, args = Net().double(), (rand(3, 5, 8), rand(3, 4, 8))
    assert_equals_eager(capture(module, args, {}), module, args)


# Meta tensors and fingerprints


def test_meta_parameters_and_inputs() -> None:
    entry = ZOO["resnet"]
    with torch.device("meta"):
        module = entry.build().train()
        args = tuple(a.to("meta") for a in entry.inputs(0)[0])
    captured = capture(module, args, {})
    assert len(captured.graph.mutated) > 0
    real = entry.build().train()
    args, kwargs = entry.inputs(0)
    assert_equals_eager(captured, real, args, kwargs, tolerance=1e-6)


def test_fingerprint_is_of_the_computation() -> None:
    script = (
        "import torch; from autopar.capture import capture; from tests.zoo import ZOO\n"
        "e = ZOO['gpt']; args, kwargs = e.inputs(0)\n"
        "print(capture(e.build().train(), args, kwargs).fingerprint)"
    )
    entry = ZOO["gpt"]
    args, kwargs = entry.inputs(1)
    here = capture(entry.build().train(), args, kwargs).fingerprint
    there = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert here == there
    assert here != capture(entry.build().eval(), args, kwargs).fingerprint


# What forward may not do


def _item(self: Any, h: Tensor) -> Tensor:
    return h * h.sum().item()


def _branch(self: Any, h: Tensor) -> Tensor:
    if h.sum() > 0:
        return h
    return -h


def _nonzero(self: Any, h: Tensor) -> Tensor:
    return h[h > 0].sum()


def _two_shapes(self: Any, h: Tensor) -> Tensor:
    return F.mse_loss(h[h[:, 0] > 0], h.detach()[h[:, 0] > 0])


def _ctc(self: Any, h: Tensor) -> Tensor:
    lengths = torch.full((6,), 2)
    return F.ctc_loss(
        h.log_softmax(-1)[:, None].expand(6, 6, 8), lengths[:, None], lengths, lengths
    )


def _checked(self: Any, h: Tensor) -> Tensor:
    return F.gaussian_nll_loss(h, h, h.exp())


def _print(self: Any, h: Tensor) -> Tensor:
    print("hidden", h)
    return h


def _break(self: Any, h: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return h


def _raise(self: Any, h: Tensor) -> Tensor:
    raise ValueError("no such mode: 7")


def _shapes(self: Any, h: Tensor) -> Tensor:
    return h @ h


def _write_input(self: Any, h: Tensor, x: Tensor) -> Tensor:
    x.add_(1)
    return h + x


def _write_parameter(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.linear.weight.mul_(0.5)
    return h


def _channels(self: Any, h: Tensor) -> Tensor:
    return F.dropout2d(h.view(-1, 2, 2, 2), 0.5, self.training)


def _layer_drop(self: Any, h: Tensor) -> Tensor:
    return h if random.random() < 0.5 else h * 2


def _random_scale(self: Any, h: Tensor) -> Tensor:
    return h * random.uniform(0.5, 1.5)


def _numpy(self: Any, h: Tensor) -> Tensor:
    return h + torch.from_numpy(h.detach().numpy().copy())


@pytest.mark.parametrize(
    ("function", "what", "fix", "inputs"),
    [
        (_item, "Python number", "keep it a tensor", 0),
        (_branch, "branches on a tensor's value", "torch.where", 0),
        (_nonzero, "shape depends", "mask", 0),
        (_two_shapes, "shape depends", "mask", 0),
        (_ctc, "CTC loss", "outside", 0),
        (_checked, "function of torch that looks at", "outside", 0),
        (_print, "prints", "move the print out", 0),
        (_break, "excluded from capture|one graph", "forward", 0),
        (_raise, "no such mode: 7", "without autopar", 0),
        (_shapes, "reduction dim", "without autopar", 0),
        (_write_input, "writes into its input", "clone", 1),
        (_write_parameter, "in place", "", 0),
        (_layer_drop, "Python's random module", "torch.rand", 0),
        (_random_scale, "Python's random module", "torch.rand", 0),
        (_channels, "whole features", "nn.Dropout", 0),
    ],
)
def test_user_errors_name_the_line_and_the_way_out(
    function: Callable[..., Any], what: str, fix: str, inputs: int
) -> None:
    module = Apply(function).train()
    with pytest.raises(UserError, match=what) as caught:
        capture(module, (rand(6, 8), *(rand(6, 8) for _ in range(inputs))), {})
    error = caught.value
    first = function.__code__.co_firstlineno
    if function is not _write_input:
        assert error.where is not None
        file, line = error.where.split(":")
        assert file == "test_capture.py" and first < int(line) <= first + 3
    assert fix in (error.fix or "")
    assert len(str(error).splitlines()) <= 3


def test_wrong_arguments_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"Linear\.forward"):
        capture(nn.Linear(2, 2), (), {})
