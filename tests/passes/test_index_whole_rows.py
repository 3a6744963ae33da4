"""Element-wise lookups of whole rows, bags and prototypes are written plainly; others stay."""

from __future__ import annotations

import expecttest
import pytest
import torch
from torch import Tensor, nn

from autopar.ir.graph import Graph
from autopar.ir.interpret import run_graph
from autopar.passes.free_factories import free_factories
from autopar.passes.index_whole_rows import index_whole_rows
from tests.simulate import subject_of

from .helpers import graph_of, show


class TestRewrites(expecttest.TestCase):
    def test_a_column_that_is_expanded(self) -> None:
        graph = graph_of(
            """
            %x: input f32[9, 4] grad "x"
            %i: input i64[6] "i"
            %u: i64[6, 1] = aten.unsqueeze(%i, 1)
            %e: i64[6, 4] = aten.expand(%u, [6, 4])
            %y: f32[6, 4] = aten.gather(%x, 0, %e)   # net.py:3
            %z: f32[9, 4] = aten.scatter_add(%x, 0, %e, %y)
            return %z
            """
        )
        self.assertExpectedInline(
            show(index_whole_rows(graph)),
            """\
%x: input f32[9, 4] grad "x"
%i: input i64[6] "i"
%u: i64[6, 1] = aten.unsqueeze(%i, 1)
%reshape_default: i64[6] = aten.reshape(%u, [6])   # net.py:3
%index_select_default: f32[6, 4] = aten.index_select(%x, 0, %reshape_default)   # net.py:3
%reshape_default_1: i64[6] = aten.reshape(%u, [6])
%index_add_default: f32[9, 4] = aten.index_add(%x, 0, %reshape_default_1, %index_select_default)
return %index_add_default""",
        )

    def test_bags_of_one_size(self) -> None:
        graph = graph_of(
            """
            %w: param f32[9, 4] grad "w"
            %i: input i64[6, 3] "i"
            %o: i64[6] = aten.arange.start_step(0, 18, 3, dtype=i64)
            %f: i64[18] = aten.reshape(%i, [18])
            %b: (f32[6, 4], i64[18], i64[6], i64[6]) = aten.embedding_bag.padding_idx(%w, %f, %o, False, 1, False, None, False, None)
            %y: f32[6, 4] = getitem(%b, 0)
            return %y
            """
        )
        self.assertExpectedInline(
            show(index_whole_rows(graph)),
            """\
%w: param f32[9, 4] grad "w"
%i: input i64[6, 3] "i"
%f: i64[18] = aten.reshape(%i, [18])
%reshape_default: i64[6, 3] = aten.reshape(%f, [6, 3])
%embedding_default: f32[6, 3, 4] = aten.embedding(%w, %reshape_default)
%mean_dim: f32[6, 4] = aten.mean.dim(%embedding_default, [1])
return %mean_dim""",
        )

    def test_prototypes(self) -> None:
        graph = graph_of(
            """
            %x: input f32[9, 4] grad "x"
            %z: f32[3, 4] = aten.new_zeros(%x, [3, 4])
            %o: i64[3] = aten.new_full(%x, [3], 7, dtype=i64)
            %y: f32[3, 4] = aten.index_select(%x, 0, %o)
            %s: f32[3, 4] = aten.add.Tensor(%y, %z)
            return %s
            """
        )
        self.assertExpectedInline(
            show(free_factories(graph)),
            """\
%x: input f32[9, 4] grad "x"
%zeros_default: f32[3, 4] = aten.zeros([3, 4], dtype=f32)
%full_default: i64[3] = aten.full([3], 7, dtype=i64)
%y: f32[3, 4] = aten.index_select(%x, 0, %full_default)
%s: f32[3, 4] = aten.add.Tensor(%y, %zeros_default)
return %s""",
        )


OTHERS = {
    "an index that is no column": """
%x: input f32[9, 4] grad "x"
%i: input i64[6, 4] "i"
%y: f32[6, 4] = aten.gather(%x, 0, %i)
return %y""",
    "part of the other dims": """
%x: input f32[9, 4] grad "x"
%i: input i64[6, 1] "i"
%y: f32[6, 1] = aten.gather(%x, 0, %i)
return %y""",
    "a row of indices": """
%x: input f32[6, 4] grad "x"
%i: input i64[4] "i"
%e: i64[6, 4] = aten.expand(%i, [6, 4])
%y: f32[6, 4] = aten.gather(%x, 0, %e)
return %y""",
    "bags of any size": """
%w: param f32[9, 4] grad "w"
%i: input i64[18] "i"
%o: input i64[6] "o"
%b: (f32[6, 4], i64[18], i64[6], i64[6]) = aten.embedding_bag(%w, %i, %o)
%y: f32[6, 4] = getitem(%b, 0)
return %y""",
    "bags with padding": """
%w: param f32[9, 4] grad "w"
%i: input i64[18] "i"
%o: i64[6] = aten.arange.start_step(0, 18, 3, dtype=i64)
%b: (f32[6, 4], i64[18], i64[6], i64[6]) = aten.embedding_bag.padding_idx(%w, %i, %o, False, 0, \
False, None, False, 2)
%y: f32[6, 4] = getitem(%b, 0)
return %y""",
}


@pytest.mark.parametrize("text", OTHERS.values(), ids=list(OTHERS))
def test_others_stay(text: str) -> None:
    before = graph_of(text)
    assert show(index_whole_rows(before)) == show(before)


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sums = nn.EmbeddingBag(20, 6, mode="sum")
        self.means = nn.EmbeddingBag(20, 6, mode="mean")

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        column = (ids[:, :1] * 7) % 11
        x = self.sums(ids, per_sample_weights=scale) + self.means(ids)
        table = x.new_ones(11, 6).scatter_add(0, column.expand(-1, 6), x)
        picked = table.gather(0, column.repeat(1, 6)) * torch.take_along_dim(table, column, 0)
        turned = x.t().gather(1, torch.arange(5).view(1, 5).expand(6, 5))
        put = torch.zeros_like(table).scatter(0, torch.arange(5)[:, None].expand(5, 6), turned.t())
        return picked.square().mean() + put.square().sum()


def test_results_and_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    module = Rows().double()
    ids, scale = torch.randint(20, (8, 3)), torch.rand(8, 3, dtype=torch.float64)
    subject = subject_of(module, (ids, scale), {})  # prepared: both passes have run
    text = show(subject.graph)
    for name in ("gather", "scatter", "take_along_dim", "embedding_bag", "new_ones"):
        assert f"aten.{name}" not in text, text
    expected = module(ids, scale)
    weights = list(module.parameters())
    got = run(subject.graph, [*weights, ids, scale])
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(a, b)


def run(graph: Graph, tensors: list[Tensor]) -> Tensor:
    """The graph on the module's parameters and inputs, in the order of its placeholders."""
    constants = [n.meta["tensor"] for n in graph.placeholders("constant")]
    assert not constants
    return run_graph(graph, tensors)[0]
