"""Kernels counted in a few copies of every block are those of the whole model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from autopar.capture import Capture
from autopar.cost.cluster import parse_cluster
from autopar.ir.graph import Graph
from autopar.ir.recomputed import mark_of
from autopar.kernel_use import KernelUse
from autopar.passes import choose_kernels as chosen
from autopar.passes.blocks import find_blocks
from autopar.passes.pipelined import Wanted
from autopar.passes.prepare import prepare
from autopar.passes.rank_program import rank_program
from autopar.passes.search import search
from autopar.passes.short_program import ShortProgram, short_program
from autopar.plan import Plan, Recompute
from autopar.planning import capture_training
from tests.zoo.language import GPT, Llama

CLUSTER = "2x4xH100"


@cache
def captured(kind: str, layers: int) -> tuple[Graph, Capture]:
    model: nn.Module = GPT(512, 0.1, layers=layers) if kind == "gpt" else Llama(512, layers=layers)
    ids = torch.zeros(32, 16, dtype=torch.int64)
    made = capture_training(model, (ids, ids), {})
    return prepare(made.graph), made


@cache
def planned(kind: str, layers: int, strategy: str) -> Plan:
    graph, made = captured(kind, layers)
    return search(
        graph,
        made.fingerprint,
        made.symbols,
        parse_cluster(CLUSTER),
        strategy=strategy,
        memory_limit=1e12,
        pipelines=Wanted(micro_batches=(8,)) if strategy.startswith("pipeline") else None,
    )


def both_ways(
    kind: str, plan: Plan, monkeypatch: pytest.MonkeyPatch, mode: str, layers: int = 9
) -> tuple[tuple[KernelUse, ...], tuple[KernelUse, ...], list[bool]]:
    graph, made = captured(kind, layers)
    short: list[bool] = []

    def seen(*arguments: object) -> ShortProgram:
        found = short_program(*arguments)  # type: ignore[arg-type]
        short.append(bool(found.others))
        return found

    def whole(graph: Graph, sizes: object, plan: Plan, rank: int) -> ShortProgram:
        return ShortProgram(rank_program(graph, sizes, plan, rank, check=False))  # type: ignore[arg-type]

    uses = []
    for program in (seen, whole):
        monkeypatch.setattr(chosen, "short_program", program)
        cluster = parse_cluster(CLUSTER)
        uses.append(chosen.choose_kernels(graph, made.symbols, plan, cluster, mode))
    return uses[0], uses[1], short


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("gpt", "data"),
        ("gpt", "zero"),
        ("gpt", "data+tensor"),
        ("llama", "data+tensor"),
        ("gpt", "pipeline+data"),
    ],
)
def test_as_in_the_whole_model(kind: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, whole, short = both_ways(kind, planned(kind, 9, strategy), monkeypatch, "all")
    assert short == [True]
    assert found == whole
    assert {use.kernel for use in found} & {"pack", "dropout"}


def test_recomputed_copies_are_of_their_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("gpt", 20, "zero")
    graph, made = captured("gpt", 20)
    ((first, _, copies),) = find_blocks(graph).regions
    some = replace(plan, recompute=(Recompute(first.name, copies, 7, 2),))
    found, whole, short = both_ways("gpt", some, monkeypatch, "all", 20)
    assert short == [True]
    assert found == whole
    program = short_program(graph, made.symbols, some, 0).program
    regions = {mark.region for node in program.calls() if (mark := mark_of(node)) is not None}
    assert len(regions) == 5 + 2


def test_copies_that_a_plan_treats_otherwise_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit of one parameter in the middle: what is alike on either side is left out."""
    plan = planned("gpt", 20, "zero")
    graph, made = captured("gpt", 20)
    names = [name for name in plan.params if "10." in name and "weight" in name]
    params = dict(plan.params)
    for name in names:
        params[name] = replace(params[name], regather=not params[name].regather)
    edited = replace(plan, params=params)
    found, whole, short = both_ways("gpt", edited, monkeypatch, "all", 20)
    assert short == [True]
    assert found == whole
    ops = [
        len(list(short_program(graph, made.symbols, one, 0).program.calls()))
        for one in (plan, edited)
    ]
    assert ops[0] < ops[1]


def test_what_is_lowered_does_not_grow_with_the_number_of_copies() -> None:
    sizes = []
    for layers in (9, 20):
        graph, made = captured("gpt", layers)
        program = short_program(graph, made.symbols, planned("gpt", layers, "zero"), 0)
        sizes.append(len(list(program.program.calls())))
    assert sizes[0] == sizes[1]
