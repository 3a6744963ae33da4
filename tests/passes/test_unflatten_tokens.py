"""Flattened tokens stay batch and sequence where that is the same, and the sequence can be split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.capture import capture
from autopar.ir.interpret import run_graph
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice, ShardingRule
from autopar.ir.sharding import Sharding
from autopar.passes.families import batch_factors, sequence_factors
from autopar.passes.rules_of import rules_of
from autopar.passes.unflatten_tokens import unflatten_tokens
from tests.followed_plans import following
from tests.passes.test_sequence_split import planned
from tests.simulate import (
    Decisions,
    Subject,
    assert_equivalent,
    concrete,
    simulate,
    single_device,
    subject_of,
    zoo_subject,
)
from tests.zoo.language import LlamaBlock, language_batch

from .helpers import graph_of, show


class TestUnflattenTokens(expecttest.TestCase):
    def test_loss(self) -> None:
        graph = graph_of(
            """
            %h: input f32[b, 16, 32] grad "h"
            %t: input i64[b, 16] "t"
            %w: param f32[64, 32] grad "w"
            %logits: f32[b, 16, 64] = aten.linear(%h, %w)   # lm.py:3
            %flat: f32[16*b, 64] = aten.reshape(%logits, [16*b, 64])   # lm.py:4
            %wide: f64[16*b, 64] = aten.to.dtype(%flat, f64)   # lm.py:5
            %ids: i64[16*b] = aten.reshape(%t, [16*b])   # lm.py:6
            %loss: f64[] = aten.cross_entropy_loss(%wide, %ids, ignore_index=-1)   # lm.py:7
            return %loss, %logits
            """
        )
        self.assertExpectedInline(
            show(unflatten_tokens(graph)),
            """\
%h: input f32[b, 16, 32] grad "h"
%t: input i64[b, 16] "t"
%w: param f32[64, 32] grad "w"
%logits: f32[b, 16, 64] = aten.linear(%h, %w)   # lm.py:3
%wide: f64[b, 16, 64] = aten.to.dtype(%logits, f64)   # lm.py:5
%loss: f64[] = autopar.cross_entropy(%wide, %t, ignore_index=-1)   # lm.py:7
return %loss, %logits""",
        )

    def test_there_and_back(self) -> None:
        """The chain runs on [b, 16]; what reads it flat gets it flat."""
        graph = graph_of(
            """
            %x: input f32[b, 16, 8] grad "x"
            %w: param f32[8, 6] grad "w"
            %bias: param f32[6] grad "bias"
            %flat: f32[16*b, 8] = aten.reshape(%x, [16*b, 8])   # a.py:1
            %y: f32[16*b, 6] = aten.addmm(%bias, %flat, %w)   # a.py:2
            %p: f32[16*b, 6] = aten.softmax.int(%y, 1)   # a.py:3
            %back: f32[b, 16, 6] = aten.reshape(%p, [b, 16, 6])   # a.py:4
            %heads: f32[b, 16, 2, 3] = aten.reshape(%p, [b, 16, 2, 3])   # a.py:5
            %top: (f32[16*b, 2], i64[16*b, 2]) = aten.topk(%y, 2)   # a.py:6
            %best: f32[16*b, 2] = getitem(%top, 0)
            return %back, %heads, %best
            """
        )
        self.assertExpectedInline(
            show(unflatten_tokens(graph)),
            """\
%x: input f32[b, 16, 8] grad "x"
%w: param f32[8, 6] grad "w"
%bias: param f32[6] grad "bias"
%y: f32[b, 16, 6] = autopar.addmm(%bias, %x, %w)   # a.py:2
%reshape_default: f32[16*b, 6] = aten.reshape(%y, [16*b, 6])   # a.py:2
%p: f32[b, 16, 6] = aten.softmax.int(%y, -1)   # a.py:3
%heads: f32[b, 16, 2, 3] = aten.reshape(%p, [b, 16, 2, 3])   # a.py:5
%top: (f32[16*b, 2], i64[16*b, 2]) = aten.topk(%reshape_default, 2)   # a.py:6
%best: f32[16*b, 2] = getitem(%top, 0)
return %p, %heads, %best""",
        )

    def test_heads_are_merged_with_tokens(self) -> None:
        """As `nn.MultiheadAttention` does: one reshape for both becomes one for the heads."""
        graph = graph_of(
            """
            %x: input f32[17, b, 4, 8] grad "x"
            %w: param f32[32, 32] grad "w"
            %flat: f32[17*b, 32] = aten.reshape(%x, [17*b, 32])   # a.py:1
            %y: f32[17*b, 32] = aten.linear(%flat, %w)   # a.py:2
            %back: f32[17, b, 32] = aten.reshape(%y, [17, b, 32])   # a.py:3
            return %back
            """
        )
        self.assertExpectedInline(
            show(unflatten_tokens(graph)),
            """\
%x: input f32[17, b, 4, 8] grad "x"
%w: param f32[32, 32] grad "w"
%reshape_default: f32[17, b, 32] = aten.reshape(%x, [17, b, 32])   # a.py:1
%y: f32[17, b, 32] = aten.linear(%reshape_default, %w)   # a.py:2
return %y""",
        )

    def test_what_leads_nowhere_is_not_touched(self) -> None:
        text = """
            %x: input f32[4, 16, 8] grad "x"
            %w: param f32[6, 8] grad "w"
            %flat: f32[64, 8] = aten.reshape(%x, [64, 8])
            %y: f32[64, 6] = aten.linear(%flat, %w)
            %first: f32[64, 6] = aten.cumsum(%y, 0)
            %back: f32[4, 16, 6] = aten.reshape(%first, [4, 16, 6])
            return %back
        """
        graph = graph_of(text)
        assert show(unflatten_tokens(graph)) == show(graph)


def flat_loss(**options: object) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten(), **options)  # type: ignore[arg-type]


def masked_mean(x: Tensor, t: Tensor) -> Tensor:
    losses = F.cross_entropy(x.view(-1, x.shape[-1]), t.view(-1), reduction="none", ignore_index=3)
    mask = (t != 3).view(-1).double()
    return (losses * mask).sum() / mask.sum()


def losses_by_row(x: Tensor, t: Tensor) -> Tensor:
    losses = F.cross_entropy(x.view(-1, x.shape[-1]), t.view(-1), reduction="none")
    return losses.view(t.shape).mean(1).exp().sum() + losses.max()


def of_probabilities(x: Tensor, t: Tensor) -> Tensor:
    wanted = F.one_hot(t, x.shape[-1]).double()
    return F.cross_entropy(x.flatten(0, 1), wanted.flatten(0, 1), label_smoothing=0.1)


def normalised_rows(x: Tensor, t: Tensor) -> Tensor:
    y = F.layer_norm(x.reshape(-1, x.shape[-1]), [x.shape[-1]])
    y = (y * y.pow(2).mean(1, keepdim=True).rsqrt()).unsqueeze(1).squeeze(1) + y.new_ones(1, 5)
    return F.cross_entropy(y, t.reshape(-1), weight=torch.arange(1.0, 6.0).double())


LOSSES = {
    "mean": flat_loss(ignore_index=3),
    "sum": flat_loss(reduction="sum", label_smoothing=0.2, ignore_index=3),
    "masked": masked_mean,
    "rows": losses_by_row,
    "probabilities": of_probabilities,
    "normalised": normalised_rows,
}


class Loss(nn.Module):
    """A loss of [b, s, d] features with ids [b, s]; its head is a parameter."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)
        self.name = name

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return LOSSES[self.name](self.head(x), t)


def batch(rows: int = 4, length: int = 7) -> tuple[Tensor, Tensor]:
    """Features and ids of which the first positions are ignored more often than the last."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (rows, length), generator=generator)
    ids[:, :3] = 3
    ids[0, 3] = 3
    return torch.randn(rows, length, 6, generator=generator, dtype=torch.float64), ids


@cache
def loss_subject(name: str) -> Subject:
    torch.manual_seed(0)
    return subject_of(Loss(name).double(), batch(), {})


@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_of_flat_tokens(name: str) -> None:
    module = Loss(name).double()
    made = capture(module, batch(), {})
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    inputs = iter(batch())
    tensors = [
        values[n.meta["fqns"][0]]
        if n.meta["role"] in ("param", "buffer")
        else n.meta["tensor"]
        if n.meta["role"] == "constant"
        else next(inputs)
        for n in made.graph.placeholders()
    ]
    rewritten = unflatten_tokens(made.graph)
    assert "autopar.cross_entropy" in show(rewritten)
    (expected,), (found,) = run_graph(made.graph, tensors), run_graph(rewritten, tensors)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    first, second = (torch.autograd.grad(y, module.head.weight)[0] for y in (expected, found))
    torch.testing.assert_close(second, first, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mesh", [Mesh.of(sp=4), Mesh.of(dp=2, sp=2)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_split_sequence(name: str, mesh: Mesh) -> None:
    """The loss follows the sequence, uneven and with ignored ids on some ranks alone."""
    subject = loss_subject(name)
    graph = concrete(subject)
    dims = {axis: {"dp": 0, "sp": 1}[axis] for axis in mesh.names}
    decisions = following(graph, rules_of(graph), mesh, dims)
    (loss,) = (n for n in graph.calls() if "cross_entropy" in n.name)
    assert set(decisions.choices[loss.name]) == set(mesh.names)
    check(subject, decisions)


@pytest.mark.parametrize("mesh", [Mesh.of(tp=4), Mesh.of(sp=2, tp=2), Mesh.of(tp=2, sp=2)], ids=str)
@pytest.mark.parametrize("name", ["mean", "sum", "masked"])
def test_split_vocabulary(name: str, mesh: Mesh) -> None:
    """The classes on one axis, the sequence on the other: logits are split along both."""
    subject = loss_subject(name)
    graph = concrete(subject)
    rules = rules_of(graph)
    chosen = following(graph, rules, mesh, {"sp": 1} if "sp" in mesh.names else {})
    choices = {node: dict(found) for node, found in chosen.choices.items()}
    for node in graph.calls():
        if node.name.startswith(("linear", "cross_entropy")):
            rule = rules[node.name]
            factor = rule.inputs[0][-1][0] if "cross" in node.name else rule.outputs[0][-1][0]
            choices[node.name]["tp"] = Choice(factor=factor)
    storage = {n.name: Sharding.replicated(len(n.meta["value"].shape)) for n in params(subject)}
    check(subject, Decisions(mesh, choices, storage))


def params(subject: Subject) -> list[torch.fx.Node]:
    return subject.graph.placeholders("param")


def check(subject: Subject, decisions: Decisions) -> None:
    def loss(y: Tensor) -> Tensor:
        return y

    found = simulate(subject, batch(), {}, loss, decisions)
    assert_equivalent(found, single_device(subject.module, batch(), {}, loss))


class LongLlama(nn.Module):
    """Returns the loss alone: nobody wants whole logits."""

    cos: Tensor
    sin: Tensor

    def __init__(self, vocab: int, dim: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(LlamaBlock(dim, 4 * dim, 4, 2) for _ in range(2))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        half = dim // 8
        angles = torch.outer(torch.arange(float(length)), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


@pytest.mark.parametrize("name", ["llama", "hf_gpt2", "hf_llama", "gpt"])
def test_the_sequence_is_followed_to_the_loss(name: str) -> None:
    """Through GPT-2's flattened products, too: what a sequence axis may split is found."""
    subject = zoo_subject(name)
    graph = concrete(subject)
    rules = rules_of(graph)
    sequence = sequence_factors(graph, rules, subject.graph)
    batched = batch_factors(graph, rules, subject.graph)
    products = [n for n in graph.calls() if n.name.startswith(("linear", "addmm"))]
    for node in products:
        assert (batched[node], sequence[node]) == (
            {names_of(node, rules)[0]},
            {names_of(node, rules)[1]},
        )
    (loss,) = (n for n in graph.calls() if n.name.startswith("cross_entropy"))
    lead = [dim[0] for dim in rules[loss.name].inputs[0][:2]]
    assert (batched[loss], sequence[loss]) == ({lead[0]}, {lead[1]})


def names_of(node: torch.fx.Node, rules: Mapping[str, ShardingRule]) -> list[str]:
    return [dim[0] for dim in rules[node.name].outputs[0]]


@pytest.mark.parametrize(
    ("rows", "cluster", "axes"), [(1, "2x4xH100", 1), (1, "1x8xH100", 2), (2, "1x4xH100", 2)]
)
def test_a_long_sequence_is_split_through_the_loss(rows: int, cluster: str, axes: int) -> None:
    """No logits and no hidden states but attention's keys and values are gathered."""
    vocab, length = 512, 4096
    subject = subject_of(LongLlama(vocab, 64, length), *language_batch(vocab, length, 0, rows))
    plan = planned(subject.capture, cluster)
    assert len(plan.mesh.names) == axes
    graph = subject.graph
    rules = rules_of(graph)
    (loss,) = (n for n in graph.calls() if n.name.startswith("cross_entropy"))
    names = rules[loss.name].inputs[0]
    by = {str(choice) for choice in plan.choices[loss.name].values()}
    assert names[1][0] in by, "the sequence is not split"
    assert set(plan.choices[loss.name]) == set(plan.mesh.names)
    assert by <= {names[0][0] if names[0] else "", names[1][0]}
    moved = [t for t in plan.traffic if t.collective in ("all_gather", "all_to_all")]
    elsewhere = [t for t in moved if t.purpose != "parameters" and "attention" not in t.purpose]
    assert moved
    assert not elsewhere
