"""Graphs cut into pieces: the chain of pieces computes what the graph does."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import expecttest
import pytest
import torch
from torch import Tensor, nn

from autopar.capture import Capture, capture
from autopar.errors import UserError
from autopar.ir.graph import Graph, Value
from autopar.ir.interpret import run_graph
from autopar.ir.mesh import Axis, Mesh
from autopar.ir.parse import parse_sharding
from autopar.ir.recomputed import MARK
from autopar.passes.columns import is_getitem
from autopar.passes.pieces import Boundary, Piece, cut_graph
from autopar.passes.prepare import prepare
from autopar.passes.specialise import specialise
from tests.capture_helpers import placeholder_tensors
from tests.zoo import ZOO

from .helpers import graph_of, show

SKIPPED = """
%w1: param f32[4, 4] grad "w1"
%w2: param f32[4, 4] grad "w2"
%x: input f32[8, 4] "x"
%mask: f32[8, 4] = aten.relu(%x)
%a: f32[8, 4] grad = aten.mm(%x, %w1)
%b: f32[8, 4] grad = aten.mul.Tensor(%a, %mask)
%c: f32[8, 4] grad = aten.mm(%b, %w2)
%d: f32[8, 4] grad = aten.mul.Tensor(%c, %mask)
%e: f32[8, 4] grad = aten.add.Tensor(%d, %a)
return %e
"""


class TestCutGraph(expecttest.TestCase):
    def test_skips_pass_and_what_inputs_give_is_computed_again(self) -> None:
        first, middle, last = cut_graph(graph_of(SKIPPED), ["c", "e"])
        assert [p.sends for p in (first, middle, last)] == [("a", "b"), ("a", "d"), ()]
        assert [p.receives for p in (first, middle, last)] == [(), ("a", "b"), ("a", "d")]
        self.assertExpectedInline(
            show(middle.graph),
            """\
%w2: param f32[4, 4] grad "w2"
%x: input f32[8, 4] "x"
%a: received f32[8, 4] grad "a"
%b: received f32[8, 4] grad "b"
%mask: f32[8, 4] = aten.relu(%x)
%c: f32[8, 4] = aten.mm(%b, %w2)
%d: f32[8, 4] = aten.mul.Tensor(%c, %mask)
return %a, %d""",
        )


def test_what_is_received_is_in_no_region_that_runs_again() -> None:
    graph = graph_of(SKIPPED)
    for node in graph.calls():
        node.meta[MARK] = "block"
    _, last = cut_graph(graph, ["c"])
    assert not any(MARK in node.meta for node in last.graph.placeholders())


def test_no_cut_is_the_whole_graph() -> None:
    graph = graph_of(SKIPPED)
    (whole,) = cut_graph(graph, [])
    assert show(whole.graph) == show(graph)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (["mask"], "leaves a stage of the pipeline empty"),
        (["e", "c"], "in the order of the model"),
        (["nothing"], "the model has no such op"),
    ],
)
def test_cuts_that_are_none(cuts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut_graph(graph_of(SKIPPED), cuts)


def crossing(given: str, boundary: Boundary, *shape: int, grad: bool = True) -> str:
    value = Value(shape, torch.float32, None, grad)
    return str(boundary.sharding(value, parse_sharding(given)))


def test_a_value_crosses_whole_or_split_and_partial_only_along_micro_batches() -> None:
    assert crossing("[mb&dp, -] +mb +tp", Boundary(), 8, 4) == "[mb&dp, -] +mb"


def test_what_is_whole_in_a_stage_crosses_to_another_host_in_parts() -> None:
    hosts = Boundary.of(Mesh((Axis("pp", 2, 1), Axis("dp", 2), Axis("tp", 4))))
    assert crossing("[mb&dp, -, -] +tp", hosts, 8, 12, 5) == "[mb&dp, tp, -]"
    assert crossing("[mb, -, -]", hosts, 8, 12, 8) == "[mb, dp, tp]"
    assert crossing("[mb&dp, -, tp]", hosts, 8, 12, 8) == "[mb&dp, -, tp]"
    assert crossing("[mb&dp, -, -]", hosts, 8, 3, 5) == "[mb&dp, -, -]"  # of no even parts
    assert crossing("[mb, -, -]", hosts, 8, 12, 8, grad=False) == "[mb, -, -]"
    for level in (0, 1):  # links in the stage that are not faster
        slow = Boundary.of(Mesh((Axis("pp", 2, level), Axis("tp", 4, level))))
        assert crossing("[mb, -, -]", slow, 8, 12, 8) == "[mb, -, -]"


class Tied(nn.Module):
    """Three parts of an op, random masks, a tied weight and a buffer that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.split = nn.Linear(8, 24)
        self.register_buffer("seen", torch.zeros(8))
        self.seen: Tensor

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.table(ids)
        q, k, v = self.split(h).chunk(3, dim=-1)
        h = h + torch.dropout(q.tanh() * k, 0.3, self.training)
        self.seen = self.seen + h.detach().mean((0, 1))
        return (h + v) @ self.table.weight.t(), q


def chained(pieces: Sequence[Piece], graph: Graph, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of the last piece, everything before run in order."""
    given = dict(zip((n.name for n in graph.placeholders()), tensors, strict=True))
    received: Mapping[str, Tensor] = {}
    results: list[Tensor] = []
    written: dict[str, Tensor] = {}
    for piece in pieces:
        placeholders = piece.graph.placeholders()
        inputs = [
            received[n.name] if n.meta["role"] == "received" else given[n.name]
            for n in placeholders
        ]
        assert tuple(n.name for n in placeholders if n.meta["role"] == "received") == piece.receives
        made = run_graph(piece.graph, inputs)
        results, new = made[: piece.graph.outputs], made[piece.graph.outputs :]
        written.update(zip(piece.graph.mutated, new, strict=True))
        received = dict(zip(piece.sends, results, strict=True)) if piece.sends else {}
    return [*results, *(written[name] for name in graph.mutated)]


def check_random_cuts(captured: Capture, module: nn.Module, args: object, seeds: int) -> None:
    graph = specialise(prepare(captured.graph), captured.symbols)
    tensors = placeholder_tensors(captured, module, args)  # type: ignore[arg-type]
    names = {n.name: t for n, t in zip(captured.graph.placeholders(), tensors, strict=True)}
    tensors = [names[n.name] for n in graph.placeholders()]
    torch.manual_seed(5)
    with torch.no_grad():
        expected = run_graph(graph, tensors)
    calls = [n.name for n in list(graph.calls())[1:] if not is_getitem(n)]
    for seed in range(seeds):
        chosen = random.Random(seed).sample(range(len(calls)), min(1 + seed, len(calls)))
        pieces = cut_graph(graph, [calls[i] for i in sorted(chosen)])
        owned = [n.name for p in pieces for n in p.graph.calls()]
        assert {n.name for n in graph.calls() if n.users} <= set(owned)
        torch.manual_seed(5)
        with torch.no_grad():
            found = chained(pieces, graph, tensors)
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)


def test_random_cuts_of_a_model_with_everything() -> None:
    torch.manual_seed(0)
    module = Tied()
    ids = torch.randint(0, 16, (4, 6))
    captured = capture(module, (ids,), {})
    check_random_cuts(captured, module, captured.flatten((ids,), {}), 12)


FEW = ("gpt", "resnet")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FEW else pytest.mark.slow) for n in ZOO]
)
def test_random_cuts_of_the_zoo(name: str) -> None:
    entry = ZOO[name]
    torch.manual_seed(0)
    module = entry.build()
    args, kwargs = entry.inputs(0)
    captured = capture(module, args, kwargs)
    check_random_cuts(captured, module, captured.flatten(args, kwargs), 4)
