"""Lowered programs that compilers run: dropouts read their keys from a table, on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from autopar.inductor_ahead import inductor_kernels
from autopar.ir.graph import Graph
from autopar.ir.lowered import DROPOUT
from autopar.passes.blocks import find_blocks
from autopar.plan import Recompute
from autopar.runtime import program as programs
from autopar.runtime.alone import alone_groups
from autopar.runtime.keyed_dropout import KEYED_DROPOUT, read_keys
from autopar.runtime.phase_clock import PhaseClock
from tests import simulate


def decided(strategy: str, full: int = 0, selective: int = 0) -> simulate.Decisions:
    """A plan of two ranks for a small GPT with dropout, some of whose blocks are recomputed."""
    subject = simulate.zoo_subject("gpt")
    found = simulate.decisions_of(subject, simulate.plan_of(subject, 2, strategy))
    if not full and not selective:
        return found
    ((first, _, copies),) = find_blocks(simulate.concrete(subject)).regions
    return replace(found, recompute=(Recompute(first.name, copies, full, selective),))


@pytest.mark.parametrize(("strategy", "full"), [("data", 0), ("tensor", 0), ("tensor", 2)])
def test_two_ranks_draw_the_masks_of_one(
    monkeypatch: pytest.MonkeyPatch, strategy: str, full: int
) -> None:
    made: list[Any] = []

    def load(graph: Any, groups: Any) -> Any:
        made.append([node.target for node in read_keys(graph).calls()])
        return programs.load_program(graph, groups, backend="as it is")

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(simulate, "load_program", load)
    simulate.check_zoo("gpt", decided(strategy, full))
    assert made
    assert all(KEYED_DROPOUT in targets and DROPOUT not in targets for targets in made)


@pytest.mark.parametrize("kind", ["keyed", "selective", "by micro-batch"])
def test_no_seed_compiles_a_program_again(kind: str) -> None:
    subject = simulate.zoo_subject("gpt")
    found = decided("data", selective=1 if kind == "selective" else 0)
    graph = simulate.lower_all(subject.graph, subject.capture.symbols, found)[0]
    if kind == "by micro-batch":
        for node in graph.calls():
            if node.target is DROPOUT:
                node.args = (*node.args[:4], (node.args[4],))  # of a step of one micro-batch
    groups = alone_groups(graph, found.mesh, 0, PhaseClock(torch.device("cpu")))
    inputs = inputs_of(graph)
    one = programs.load_program(graph, groups)
    compiled = programs.load_program(graph, groups, backend="aot_eager")
    counters.clear()
    graphs_made = 0
    for seed in range(1, 4):
        given = [seed if x is None else x for x in inputs]
        with torch.no_grad():
            wanted, made = one.run(*given), compiled.run(*given)
        torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)
        graphs_made = graphs_made or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs_made > 0
    divided = any("dropout" in reason for reason in counters["graph_break"])
    assert divided == (kind == "by micro-batch")


def inputs_of(graph: Graph) -> list[Any]:
    """Arguments of a program, with None for its seed."""
    generator = torch.Generator().manual_seed(0)
    inputs: list[Any] = []
    for node in graph.placeholders():
        if node.meta["role"] == "seed":
            inputs.append(None)
        elif node.meta["role"] == "constant":
            inputs.append(node.meta["tensor"])
        else:
            value = node.meta["value"]
            x = torch.randn(value.int_shape(), generator=generator, dtype=torch.float64)
            floating = value.dtype.is_floating_point
            inputs.append(x.to(value.dtype) if floating else torch.zeros_like(x, dtype=value.dtype))
    return inputs


@pytest.mark.slow
def test_the_mask_is_in_the_kernels_of_its_neighbours() -> None:
    subject, decisions = simulate.zoo_subject("gpt"), decided("data")
    graph = simulate.lower_all(subject.graph, subject.capture.symbols, decisions)[0]
    found = inductor_kernels(graph, "sm_90").kernels
    mixing = [k for k in found if "^" in k.form.kernel.source]
    assert {k.phase for k in mixing} >= {"forward"}
    assert any("layer_norm" in k.form.kernel.name for k in mixing)
