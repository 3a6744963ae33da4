"""A step on micro-batches: what comes before them, one of them, what comes after them."""

from __future__ import annotations

import expecttest
import pytest
import sympy

from autopar.errors import UserError
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_sharding
from autopar.ir.rule import Choice
from autopar.ir.step import Combine, StepGraphs
from autopar.ir.verify import INVARIANTS
from autopar.passes.follow_micro_batches import largest_count
from autopar.passes.insert_reshards import insert_reshards
from autopar.passes.lower_collectives import lower_collectives
from autopar.passes.lower_step import micro_batched, why_not_micro_batched
from autopar.passes.pieces import Boundary
from autopar.passes.propagate import propagate
from autopar.passes.rules_of import rules_of
from autopar.passes.split_step import split_step

from .helpers import graph_of, program, show

B = sympy.Symbol("b", positive=True, integer=True)

MODEL = """
%w: param f32[6, 4] grad "w"
%v: param f32[5, 6] grad "v"
%x: input f32[b, 4] "x"
%t: input i64[b] "t"
%c: f32[4, 6] = aten.t(%w)
%h: f32[b, 6] = aten.mm(%x, %c)
%d: f32[b, 6] = aten.dropout(%h, 0.5, True)
%y: f32[b, 5] = aten.linear(%d, %v)
%loss: f32[] = aten.cross_entropy_loss(%y, %t)
return %loss, %y
"""
CHOICES = {
    "h": {"dp": Choice("b")},
    "d": {"dp": Choice("a")},
    "y": {"dp": Choice("b")},
    "loss": {"dp": Choice("b")},
}


def steps_of(
    text: str, regather: str = "", batch: int = 8, count: int = 2, sends: bool = False
) -> StepGraphs:
    """The three programs of all ranks, on two devices that split the batch."""
    graph, mesh = graph_of(text), Mesh.of(dp=2)
    storage = {"v": parse_sharding("[-, dp]")} if regather else {}
    dropped = frozenset(regather.split())
    made = micro_batched(graph, mesh, count, {B: batch}, rules_of, CHOICES, storage, dropped)
    how = Boundary() if sends else None
    typed = propagate(made.graph, made.mesh, made.rules, made.choices, storage, dropped, how)
    lowered = lower_collectives(insert_reshards(typed), made.mesh)
    found = INVARIANTS["types_follow"](lowered, made.mesh)
    assert found is None, found
    return split_step(lowered, made.mesh, sends)


class TestSplitStep(expecttest.TestCase):
    def test_prologue(self) -> None:
        """What parameters become, once; and the count of all targets."""
        self.assertExpectedInline(
            show(steps_of(MODEL).prologue),
            """\
%t: input i64[8] @ [-] "t"
%w: param f32[6, 4] @ [-, -] grad "w"
%v: param f32[5, 6] @ [-, -] grad "v"
%c: f32[4, 6] @ [-, -] = aten.t(%w)
%collective_2: f32[4, 6] @ [-, -] ~dp = collective(pvary, "dp", %c)
%collective_4: f32[5, 6] @ [-, -] ~dp = collective(pvary, "dp", %v)
%ne_scalar_1: bool[8] @ [-] = aten.ne.Scalar(%t, -100)
%sum_default_1: f32[] @ [] = aten.sum(%ne_scalar_1, dtype=f32)
return %collective_2, %collective_4, %sum_default_1""",
        )

    def test_body(self) -> None:
        self.assertExpectedInline(
            show(steps_of(MODEL).body),
            """\
%mb: micro_batch "mb"
%x: input f32[8, 4] @ [-, -] "x"
%t: input i64[8] @ [-] "t"
%collective_2: prepared f32[4, 6] @ [-, -] ~dp grad "collective_2"
%collective_4: prepared f32[5, 6] @ [-, -] ~dp grad "collective_4"
%sum_default_1: prepared f32[] @ [] "sum_default_1"
%collective: f32[8, 4] @ [mb, -] = micro_slice(%x, %mb)
%collective_1: f32[8, 4] @ [mb&dp, -] = collective(slice_inv, "dp", %collective)
%h: f32[8, 6] @ [mb&dp, -] = aten.mm(%collective_1, %collective_2)
%d: f32[8, 6] @ [mb&dp, -] = aten.dropout(%h, 0.5, True)
%y: f32[8, 5] @ [mb&dp, -] = aten.linear(%d, %collective_4)
%collective_6: i64[8] @ [mb] = micro_slice(%t, %mb)
%collective_7: i64[8] @ [mb&dp] = collective(slice_inv, "dp", %collective_6)
%loss: f32[] @ [] +dp +mb = aten.cross_entropy_loss(%y, %collective_7, None, 2, -100, 0.0)
%div_tensor: f32[] @ [] +dp +mb = aten.div.Tensor(%loss, %sum_default_1)
%collective_9: f32[8, 5] @ [mb, -] = collective(gather_inv, "dp", %y)
return %div_tensor, %collective_9""",
        )

    def test_tail(self) -> None:
        """Devices add up their losses once, of all micro-batches."""
        made = steps_of(MODEL)
        self.assertExpectedInline(
            show(made.tail),
            """\
%div_tensor: combined f32[] @ [] +dp grad "div_tensor"
%collective_9: combined f32[8, 5] @ [-, -] grad "collective_9"
%collective_8: f32[] @ [] = collective(psum, "dp", %div_tensor)
return %collective_8, %collective_9""",
        )
        self.assertExpectedInline(
            f"{made.combine} {made.prepared} {made.objective} {made.loss}",
            """(Combine(kind='sum', dim=0, outer=1), Combine(kind='cat', dim=0, outer=1)) ('collective_2', 'collective_4', 'sum_default_1') 0 0""",
        )

    def test_the_loss_is_made_of_its_terms(self) -> None:
        """Of several scalars the one that the others go into has the backward."""
        total = "%n: f32[] = aten.mean(%y)\n%all: f32[] = aten.add.Tensor(%loss, %n)\n"
        for results, place in (("%loss, %n, %all", 2), ("%all, %loss, %n", 0), ("%loss, %n", 0)):
            text = MODEL.replace("return %loss, %y", f"{total}return {results}")
            assert steps_of(text).loss == place, results

    def test_dropped_parameters_are_gathered_in_every_micro_batch(self) -> None:
        made = steps_of(MODEL, "v")
        assert "gather_vary" in show(made.body) and "gather_vary" not in show(made.prologue)


COUNTED = """
%w: param f32[4, 4] grad "w"
%seen: buffer f32[4] "seen"
%x: input f32[b, 4] "x"
%h: f32[b, 4] grad = aten.mm(%x, %w)
%some: f32[4] = aten.sum.dim_IntList(%h, [0])
%new: f32[4] = aten.add.Tensor(%seen, %some)
return %h; update %seen <- %new
"""


def test_buffers_of_a_piece_before_the_last_are_of_all_micro_batches() -> None:
    """What they are made of follows what is sent."""
    made = steps_of(COUNTED, sends=True)
    assert made.combine == (Combine("sum"),)
    assert show(made.body).endswith("return %h, %new")
    assert "%new: combined f32[4] @ [-]" in show(made.tail)


REFUSED = {
    "no_loss": ("%loss: f32[] = aten.cross_entropy_loss(%y, %t)\nreturn %loss, %y", "return %y"),
    "root": ("return %loss, %y", "%root: f32[] = aten.sqrt(%loss)\nreturn %root"),
    "centred": (
        "%loss: f32[]",
        "%m: f32[1, 5] = aten.mean.dim(%y, [0], True)\n%z: f32[b, 5] = aten.sub.Tensor(%y, %m)\n"
        "%loss: f32[]",
    ),
}
SENTENCES = {
    "no_loss": "what it returns is no loss",
    "root": "the loss is not a sum of theirs, because of sqrt",
    "centred": "sub combines samples of the whole batch",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    old, new = REFUSED[name]
    text = MODEL.replace(old, new)
    if name == "centred":
        text = text.replace("(%y, %t)", "(%z, %t)")
    with pytest.raises(UserError) as caught:
        steps_of(text)
    assert SENTENCES[name] in caught.value.what and caught.value.fix
    why = why_not_micro_batched(graph_of(text), {B: 8})
    assert why is not None and SENTENCES[name] in why


def test_accepted() -> None:
    assert why_not_micro_batched(graph_of(MODEL), {B: 8}) is None
    assert why_not_micro_batched(graph_of(MODEL), {B: 1}) is not None
    assert why_not_micro_batched(graph_of(MODEL.replace("[b", "[8")), {}) is not None


def test_counts_divide_the_batch() -> None:
    assert [largest_count(4, batch) for batch in (8, 6, 7, 1, None)] == [4, 3, 1, 1, 1]


def test_invariant_names_what_communicates() -> None:
    mesh, graph = program(
        """
        mesh mb=2 x dp=2
        %x: input f32[4] @ [-] "x"
        %y: f32[4] @ [mb] = collective(slice_inv, "mb", %x)
        return %y
        """
    )
    said = INVARIANTS["no_micro_batch_axis"](graph, mesh)
    assert said == "%y communicates on 'mb', along which there are no devices"
