"""Parameters under autocast are cast where they are stored, and gathered after it."""

from __future__ import annotations

import expecttest
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autopar.ir.graph import Graph
from autopar.ir.lowered import EXCHANGE, GATHER_INV, GATHER_VARY, OPEN, PVARY, Collective
from autopar.passes import pipeline
from autopar.passes.bucket_collectives import bucket_collectives
from autopar.passes.cast_before_gather import cast_before_gather
from autopar.passes.insert_reshards import insert_reshards
from autopar.passes.lower_collectives import lower_collectives
from autopar.plan import Plan
from autopar.runtime.program import load_program
from autopar.runtime.thread_world import ThreadWorld
from tests.simulate import (
    Subject,
    decisions_of,
    groups_of,
    lower_all,
    plan_of,
    simulate,
    subject_of,
)

from .helpers import propagated, show

LINEAR = """
mesh dp=2
%w: param f32[8, 4] grad "w"
%n: param f32[4] grad "n"
%x: input f32[2, 4] "x"
%m: f32[2, 4] = aten.mul.Tensor(%x, %n)
%c: bf16[8, 4] = aten._to_copy(%w, dtype=bf16)
%d: bf16[2, 4] = aten._to_copy(%m, dtype=bf16)
%y: bf16[2, 8] = aten.linear(%d, %c)
return %y
"""
TWICE = """
mesh dp=2
%w: param f32[8, 8] grad "w"
%x: input bf16[2, 8] "x"
%c: bf16[8, 8] = aten._to_copy(%w, dtype=bf16)
%y: bf16[2, 8] = aten.linear(%x, %c)
%z: bf16[8, 8] = aten.relu(%c)
return %y, %z
"""
ON_BATCH = {"m": {"dp": "a"}, "d": {"dp": "a"}, "y": {"dp": "b"}}


def moved(text: str, storage: str = "[dp, -]", regather: str = "") -> str:
    stored = {"w": storage, "n": "[dp]"}
    known = {name: s for name, s in stored.items() if f"%{name}: param" in text}
    choices = {name: chosen for name, chosen in ON_BATCH.items() if f"%{name}:" in text}
    mesh, graph = propagated(text, choices, known, regather)
    made = insert_reshards(cast_before_gather(graph, mesh))
    return show(bucket_collectives(lower_collectives(made, mesh), mesh))


class TestCastBeforeGather(expecttest.TestCase):
    def test_the_shard_is_cast(self) -> None:
        self.assertExpectedInline(
            moved(LINEAR),
            """\
%w: param f32[8, 4] @ [dp, -] grad "w"
%n: param f32[4] @ [dp] grad "n"
%x: input f32[2, 4] @ [-, -] "x"
%c: bf16[8, 4] @ [dp, -] = aten._to_copy(%w, dtype=bf16)
%collective: f32[2, 4] @ [dp, -] = collective(slice_inv, "dp", %x)
%collective_1: f32[4] @ [-] ~dp = collective(gather_vary, "dp", %n)
%m: f32[2, 4] @ [dp, -] = aten.mul.Tensor(%collective, %collective_1)
%d: bf16[2, 4] @ [dp, -] = aten._to_copy(%m, dtype=bf16)
%collective_2: bf16[8, 4] @ [-, -] ~dp = collective(gather_vary, "dp", %c)
%y: bf16[2, 8] @ [dp, -] = aten.linear(%d, %collective_2)
%collective_3: bf16[2, 8] @ [-, -] = collective(gather_inv, "dp", %y)
return %collective_3""",
        )

    def test_a_cast_that_is_read_in_two_shardings_stays(self) -> None:
        self.assertExpectedInline(
            moved(TWICE),
            """\
%w: param f32[8, 8] @ [dp, -] grad "w"
%x: input bf16[2, 8] @ [-, -] "x"
%collective: f32[8, 8] @ [-, -] = collective(gather_inv, "dp", %w)
%c: bf16[8, 8] @ [-, -] = aten._to_copy(%collective, dtype=bf16)
%collective_1: bf16[2, 8] @ [dp, -] = collective(slice_inv, "dp", %x)
%collective_2: bf16[8, 8] @ [-, -] ~dp = collective(pvary, "dp", %c)
%y: bf16[2, 8] @ [dp, -] = aten.linear(%collective_1, %collective_2)
%z: bf16[8, 8] @ [-, -] = aten.relu(%c)
%collective_3: bf16[2, 8] @ [-, -] = collective(gather_inv, "dp", %y)
return %collective_3, %z""",
        )

    def test_a_whole_parameter_is_cast_as_before(self) -> None:
        self.assertExpectedInline(
            moved(LINEAR, "[-, -]"),
            """\
%w: param f32[8, 4] @ [-, -] grad "w"
%n: param f32[4] @ [dp] grad "n"
%x: input f32[2, 4] @ [-, -] "x"
%collective: f32[2, 4] @ [dp, -] = collective(slice_inv, "dp", %x)
%collective_1: f32[4] @ [-] ~dp = collective(gather_vary, "dp", %n)
%m: f32[2, 4] @ [dp, -] = aten.mul.Tensor(%collective, %collective_1)
%c: bf16[8, 4] @ [-, -] = aten._to_copy(%w, dtype=bf16)
%d: bf16[2, 4] @ [dp, -] = aten._to_copy(%m, dtype=bf16)
%collective_2: bf16[8, 4] @ [-, -] ~dp = collective(pvary, "dp", %c)
%y: bf16[2, 8] @ [dp, -] = aten.linear(%d, %collective_2)
%collective_3: bf16[2, 8] @ [-, -] = collective(gather_inv, "dp", %y)
return %collective_3""",
        )


class Layers(nn.Module):
    """Linear layers under autocast, and a norm whose parameters stay in float32."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self.layers:
                if self.again:
                    x = x + checkpoint(self.part, layer, x, use_reentrant=False)
                else:
                    x = x + self.part(layer, x)
            return self.head(x).float()

    def part(self, layer: nn.Module, x: Tensor) -> Tensor:
        return torch.relu(layer(self.norm(x)))


@pytest.fixture(scope="module", params=[False, True], ids=["once", "recomputed"])
def subject(request: pytest.FixtureRequest) -> Subject:
    torch.manual_seed(0)
    module = Layers(request.param)
    return subject_of(module, (torch.randn(8, 16),), {})


def collectives(graph: Graph, op: Collective) -> list[torch.dtype]:
    """The dtypes of what a kind of collective sends, tensor by tensor."""
    found: list[torch.dtype] = []
    for node in graph.calls():
        if node.args[:1] == (op,) and node.target in (EXCHANGE, OPEN):
            found += [n.meta["value"].dtype for n in node.args[3:]]
    return found


@pytest.mark.parametrize("strategy", ["zero", "data"])
def test_the_numbers_are_those_of_gathering_first(
    strategy: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: with two devices a sum has two terms, in whatever dtype and order."""
    plan: Plan = plan_of(subject, 2, strategy)
    decisions = decisions_of(subject, plan)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    sizes = subject.capture.bind(subject.capture.flatten((x,), {}))
    assert sizes is not None

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        made = simulate(subject, (x,), {}, lambda y: y.square().sum(), decisions)
        return made.loss, {n: g for n, g in made.gradients.items() if g is not None}

    loss, gradients = run()
    (graph, _) = lower_all(subject.graph, sizes, decisions)
    if strategy == "zero":
        low = [d for d in collectives(graph, GATHER_VARY) if d is torch.bfloat16]
        assert len(low) == 8
        assert torch.float32 not in collectives(graph, GATHER_INV)[:-1]
        assert collectives(graph, PVARY) == []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "cast_before_gather", lambda graph, mesh: graph)
        first_loss, first = run()
        (graph, _) = lower_all(subject.graph, sizes, decisions)
        low = collectives(graph, GATHER_VARY) + collectives(graph, GATHER_INV)[:-1]
        assert torch.bfloat16 not in low
    assert torch.equal(loss, first_loss)
    assert gradients.keys() == first.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, first[name]), name


def test_what_is_dropped_after_use_is_gathered_again(subject: Subject) -> None:
    """ZeRO-3 keeps the shards in the lower precision, not what is gathered of them."""
    decisions = decisions_of(subject, plan_of(subject, 2, "zero"))
    assert decisions.regather
    sizes = subject.capture.bind(subject.capture.flatten((torch.randn(8, 16),), {}))
    assert sizes is not None
    graph = lower_all(subject.graph, sizes, decisions)[0]
    groups = groups_of(graph, decisions.mesh, ThreadWorld(2), 0)
    source = load_program(graph, groups).source
    gathers = [line for line in source.splitlines() if "= regathered_" in line]
    assert sum(line.count("v__to_copy") for line in gathers) == 8
