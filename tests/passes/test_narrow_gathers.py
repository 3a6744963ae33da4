"""Plans under autocast are priced by what their programs send: parameters travel as their casts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from autopar.ir.graph import Graph, value_of
from autopar.ir.lowered import CLOSE, EXCHANGE, GATHER_INV, GATHER_VARY, PVARY
from autopar.passes.case import Case, make_case
from autopar.passes.edges import producer_of
from autopar.passes.narrow_gathers import is_narrow, summed, travelling_value, wear_casts
from autopar.passes.specialise import specialise
from autopar.plan import Plan
from tests.autocast import Autocast
from tests.simulate import Subject, cpu, decisions_of, lower_all, plan_of, subject_of

from .helpers import graph_of

ROWS, WIDTH, RANKS = 8, 32, 4


class Layers(nn.Module):
    """Linear layers whose weights are cast, and a norm whose parameters are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(self.norm(x)).relu()
        out: Tensor = x.float().square().sum()
        return out


@cache
def subject() -> Subject:
    torch.manual_seed(0)
    return subject_of(Autocast(Layers()), (torch.randn(ROWS, WIDTH),), {})


@cache
def plan(strategy: str, regather: bool) -> Plan:
    made = plan_of(subject(), RANKS, strategy)
    stored = {name: replace(s, regather=s.regather and regather) for name, s in made.params.items()}
    return replace(made, params=stored)


def case_of(strategy: str, regather: bool, micro_batches: int = 1) -> Case:
    given = replace(plan(strategy, regather), micro_batches=micro_batches)
    return make_case(subject().graph, subject().capture.symbols, given, cpu(RANKS))


def lowered_bytes(graph: Graph, regathered: bool) -> Counter[str]:
    """What one rank of a lowered program sends for parameters, its backward's duals included."""
    found: Counter[str] = Counter()
    share = (RANKS - 1) / RANKS
    for node in graph.calls():
        arguments: Any = node.args
        if node.target not in (EXCHANGE, CLOSE):
            continue
        op, made = arguments[0], node.meta["value"]
        if op not in (GATHER_VARY, PVARY):
            assert op is not GATHER_INV or made.dtype is not torch.bfloat16
            continue
        for value in made if isinstance(made, tuple) else (made,):
            whole = int(value.numel()) * value.dtype.itemsize * share
            if op is PVARY:
                found["all_reduce"] += int(2 * whole)
            else:
                found["all_gather"] += int((2 if regathered else 1) * whole)
                found["reduce_scatter"] += int(whole)
    return found


@pytest.mark.parametrize(
    ("strategy", "regather"), [("zero", True), ("zero", False), ("data", False)]
)
def test_what_is_priced_is_what_is_sent(strategy: str, regather: bool) -> None:
    given, case = plan(strategy, regather), case_of(strategy, regather)
    sizes = dict(subject().capture.symbols)
    graph = lower_all(subject().graph, sizes, decisions_of(subject(), given))[0]
    sent: Counter[str] = Counter()
    paid = set()
    for edge in case.blocks.edges:
        made, want = case.option[edge.producer], case.option[edge.consumer].wants[edge.slot]
        if edge.producer.meta.get("role") == "param" and (edge.producer, want) not in paid:
            paid.add((edge.producer, want))
            where = (edge.producer, edge.port, made.gives[edge.port], want, made.regather)
            for kind, n in case.pricer.edge_bytes(*where).items():
                sent[kind] += int(n)
    assert sent == lowered_bytes(graph, regather)
    if regather:  # what the plan says, of parameters and of the loss
        said = Counter(given.predicted.comm_bytes)
        for kind in ("all_gather", "reduce_scatter"):
            assert sent[kind] <= said[kind] <= sent[kind] + 64


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(
    ("strategy", "regather"), [("zero", True), ("zero", False), ("data", False)]
)
def test_formulas_follow(strategy: str, regather: bool, micro_batches: int) -> None:
    case = case_of(strategy, regather, micro_batches)
    seconds, memory, _ = case.evaluate(case.settings())
    assert seconds[0] == pytest.approx(case.time_s, rel=1e-9)
    assert memory[0] == pytest.approx(case.memory_bytes, rel=1e-9)


CAST = """
%w: param f32[8, 4] grad "w"
%x: input bf16[2, 4] "x"
%c: bf16[8, 4] = aten._to_copy(%w, dtype=bf16)
%y: bf16[2, 8] = aten.linear(%x, %c)
return %y
"""
SHARED = CAST.replace("return %y", "%z: bf16[8, 4] = aten.relu(%c)\nreturn %y, %z")
READ_TWICE = CAST.replace("return %y", "%z: f32[8, 4] = aten.relu(%w)\nreturn %y, %z")
WIDER = CAST.replace("param f32", "param bf16").replace(
    "bf16[8, 4] = aten._to", "f32[8, 4] = aten._to"
)
WIDER = WIDER.replace("dtype=bf16", "dtype=f32")


def weight(text: str) -> torch.fx.Node:
    (node,) = wear_casts(specialise(graph_of(text), {})).placeholders("param")
    return node


def test_a_cast_with_one_reader_is_part_of_its_parameter() -> None:
    node = weight(CAST)
    (cast,) = node.users
    assert is_narrow(node) and producer_of(cast) == (node, 0)
    assert travelling_value(node, 0).dtype is torch.bfloat16
    assert summed(node, regather=False) is cast and summed(node, regather=True) is node


@pytest.mark.parametrize("text", [SHARED, READ_TWICE, WIDER], ids=["shared", "twice", "wider"])
def test_other_casts_are_ops(text: str) -> None:
    node = weight(text)
    assert not is_narrow(node)
    assert travelling_value(node, 0) == value_of(node)
