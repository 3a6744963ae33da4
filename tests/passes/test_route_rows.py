"""Routed ops in programs: how they are lowered, and that all ranks together equal one device."""

from __future__ import annotations

from random import Random

import expecttest
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autopar.errors import PassError
from autopar.ir.lowered import ROUTED_GATHER, ROUTED_SCATTER, Route
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice, choices, factor_sizes, parse_rule, place
from autopar.passes.localise_shapes import localise_shapes
from autopar.passes.rules_of import rules_of
from tests.random_plans import MESHES, random_decisions
from tests.routed_plans import routed_choices, routing
from tests.simulate import (
    Subject,
    assert_equivalent,
    concrete,
    lower_all,
    simulate,
    single_device,
    subject_of,
)

from .helpers import lowered, show

TABLE = """
mesh tp=3
%w: param f32[8, 4] grad "w"
%ids: input i64[6, 2] "ids"
%y: f32[6, 2, 4] = aten.embedding(%w, %ids, 5)
%out: f32[6, 2, 4] = aten.relu(%y)
return %out
"""


class TestProgram(expecttest.TestCase):
    def test_a_table_by_rows(self) -> None:
        mesh, graph = lowered(TABLE, {"y": {"tp": "c>a"}, "out": {"tp": "a"}}, {"w": "[tp, -]"})
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 1)),
            """\
%w: param f32[3, 4] @ [tp, -] grad "w"
%ids: input i64[6, 2] @ [-, -] "ids"
%collective: i64[2, 2] @ [tp, -] = exchange(slice_inv, [ShardSpec(0, (2, 2, 2))], <tp>, %ids)
%y: f32[2, 2, 4] @ [tp, -, -] = routed_gather(%w, [%collective], Route(0, (8,), ((0, 3), (3, 6), (6, 8)), wraps=False), <tp>, 5)
%out: f32[2, 2, 4] @ [tp, -, -] = aten.relu(%y)
%collective_1: f32[6, 2, 4] @ [-, -, -] = exchange(gather_inv, [ShardSpec(0, (2, 2, 2))], <tp>, %out)
return %collective_1""",
        )


class TestRule(expecttest.TestCase):
    def test_a_route_splits_two_dims_of_one_axis(self) -> None:
        rule = parse_rule("ab,cd->cdb; route(c>a,d>a)")
        assert str(rule) == "ab,cd->cdb; route(c>a,d>a)"
        assert [str(c) for c in choices(rule)] == ["-", "a", "b", "c", "d", "c>a", "d>a"]
        assert Choice.parse("c>a") == Choice(factor="c>a")
        sizes = factor_sizes(rule, [(8, 4), (6, 2), (6, 2, 4)])
        placed = place(rule, sizes, Mesh.of(x=2, y=2), {"x": Choice("c>a"), "y": Choice("a")})
        assert placed is not None
        assert [str(s) for s in placed.inputs] == ["[x&y, -]", "[x, -]"]
        assert [str(s) for s in placed.outputs] == ["[x, -, -] +y"]
        # Two ids per bag, three devices.
        assert place(rule, sizes, Mesh.of(x=3), {"x": Choice("d>a")}) is None

    def test_a_dim_that_is_whole_may_be_owned(self) -> None:
        rule = parse_rule("[a]b,c,cb->[a]b; linear(0,2) once(0) route(c>a)")
        sizes = factor_sizes(rule, [(8, 4), (6,), (6, 4), (8, 4)])
        placed = place(rule, sizes, Mesh.of(x=2), {"x": Choice("c>a")})
        assert placed is not None
        shown = [str(s) for s in (*placed.inputs, *placed.outputs)]
        assert shown == ["[x, -]", "[x]", "[x, -]", "[x, -]"]


class Lookups(nn.Module):
    """Every op that may route, with gradients into every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 6, padding_idx=3)
        self.inner = nn.Parameter(torch.randn(4, 6, 6))
        self.base = nn.Parameter(torch.randn(5, 7, 6))

    def forward(self, ids: Tensor, expert: Tensor) -> Tensor:
        x, expert = self.table(ids).flatten(0, 1), expert.flatten()
        choice = F.one_hot(expert, 4)
        place = (choice.cumsum(0) * choice).sum(1) - 1
        kept, place = (place < 8)[:, None], place.clamp(max=7)
        slots = x.new_zeros(32, 6).index_add(0, expert * 8 + place, x * kept, alpha=0.5)
        y = torch.bmm(slots.view(4, 8, 6), self.inner).view(32, 6)[expert * 8 + place]
        grid = torch.zeros(4, 8, 6, dtype=x.dtype).index_put((expert, place), x, accumulate=True)
        z = grid.cumsum(1)[expert, place - 8]
        turned = x.new_zeros(6, 32).index_add(1, place, x.t())
        z = z + turned.index_select(1, place).t() + x.cumsum(0)
        three = self.base[ids[:, 0] % 5, ids[:, 1] % 7]
        once = self.base.index_put((ids[:1, 2] % 5,), x.mean()).index_copy(
            1, ids[:1, 3] % 7, x[:5, None]
        )
        return ((y * kept + z) ** 2).mean() + three.square().mean() + once.square().mean()


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    return subject_of(Lookups().double(), batch(), {})


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(13, (6, 4), generator=draw), torch.randint(4, (6, 4), generator=draw)


def identity(loss: Tensor) -> Tensor:
    return loss


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sampled_from(MESHES), st.integers(0, 2**32 - 1))
def test_random_plans(subject: Subject, mesh: Mesh, seed: int) -> None:
    graph = concrete(subject)
    decisions = random_decisions(graph, rules_of(graph), mesh, Random(seed), 0.1)
    expected = single_device(subject.module, batch(), {}, identity)
    got = simulate(subject, batch(), {}, identity, decisions)
    assert_equivalent(got, expected, f"{mesh} {seed}")


@pytest.mark.parametrize("mesh", [Mesh.of(dp=2), Mesh.of(dp=3), Mesh.of(dp=4)], ids=str)
def test_everything_routed(subject: Subject, mesh: Mesh) -> None:
    """Rows and tokens that the mesh divides or does not, on the one axis that splits both."""
    graph = concrete(subject)
    decisions = routing(graph, rules_of(graph), mesh, "dp")
    assert len(routed_choices(decisions)) >= 8
    (first, *_) = lower_all(subject.graph, subject.capture.symbols, decisions)
    targets = [node.target for node in first.calls()]
    assert targets.count(ROUTED_GATHER) >= 4
    assert targets.count(ROUTED_SCATTER) >= 4
    expected = single_device(subject.module, batch(), {}, identity)
    assert_equivalent(simulate(subject, batch(), {}, identity, decisions), expected, str(mesh))


def test_a_strided_dim_is_refused() -> None:
    text = TABLE.replace("tp=3", "tp=2").replace('grad "w"', '@ [2:tp, -] grad "w"')
    text = text.replace('"ids"', '@ [tp, -] "ids"').replace("4] =", "4] @ [tp, -, -] =")
    from .helpers import program

    mesh, graph = program(text)
    with pytest.raises(PassError, match="%w is strided along dim 0"):
        localise_shapes(graph, mesh, 0)


def test_routes_print_and_parse() -> None:
    from autopar.ir.parse import parse_argument
    from autopar.ir.text import print_argument

    route = Route(0, (8, 3), ((0, 4), (4, 8)))
    assert print_argument(route) == "Route(0, (8, 3), ((0, 4), (4, 8)))"
    assert parse_argument(print_argument(route), {}) == route
