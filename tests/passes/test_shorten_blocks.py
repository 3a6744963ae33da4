"""Graphs without most copies of a block answer as whole ones do."""

from __future__ import annotations

import pytest
import sympy

from autopar.ir.graph import Graph
from autopar.ir.text import print_graph
from autopar.passes import lower_step
from autopar.passes.lower_step import why_not_micro_batched
from autopar.passes.shorten_blocks import shorten_blocks
from tests.simulate import zoo_subject
from tests.zoo import ZOO

from .helpers import graph_of

B = sympy.Symbol("b", integer=True, positive=True)
LAYER = """
%h{i}: f32[b, 4] grad = aten.linear(%{x}, %w{i})
%r{i}: f32[b, 4] grad = aten.relu(%h{i})
"""


def stack(layers: int, odd: dict[int, str] | None = None, end: str = "") -> Graph:
    """Layers of linear and relu, the mean of the last; some layers as `odd` has them."""
    head = ['%w0: param f32[4, 4] grad "layers.0.w"']
    head += [f'%w{i}: param f32[4, 4] grad "layers.{i}.w"' for i in range(1, layers)]
    lines = [*head, '%x: input f32[b, 4] "x"']
    for i in range(layers):
        text = (odd or {}).get(i, LAYER)
        lines.append(text.format(i=i, x=f"r{i - 1}" if i else "x", far=f"r{i - 2}"))
    lines.append(end or f"%s: f32[] grad = aten.mean(%r{layers - 1})\nreturn %s")
    return graph_of("\n".join(lines))


def test_what_stays() -> None:
    short = shorten_blocks(stack(12))
    names = " ".join(node.name for node in short.calls())
    assert names == "h0 r0 h1 r1 h2 r2 h3 r9 h10 r10 h11 r11 s"
    whole = {node.name: node for node in stack(12).calls()}
    for node in short.calls():
        assert node.meta["value"] == whole[node.name].meta["value"]
    # Beside the seam every op reads what it read.
    seams = [
        node.name
        for node in short.calls()
        if [n.name for n in node.all_input_nodes]
        != [n.name for n in whole[node.name].all_input_nodes]
    ]
    assert len(seams) == 1
    used = {n for node in short.calls() for n in node.all_input_nodes if n.op == "placeholder"}
    assert used == set(short.placeholders())


def test_depth_does_not_matter() -> None:
    assert len(list(shorten_blocks(stack(12)).calls())) == len(
        list(shorten_blocks(stack(60)).calls())
    )


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(stack(4), id="few copies"),
        pytest.param(
            stack(12, end="%s: f32[] grad = aten.mean(%r11)\nreturn %s, %r5"), id="one is returned"
        ),
        pytest.param(
            stack(12, {6: LAYER.replace("linear(%{x}", "linear(%{far}")}), id="one reads another"
        ),
    ],
)
def test_nothing_to_leave_out(graph: Graph) -> None:
    text = print_graph(graph)
    short = shorten_blocks(graph)
    assert short is graph and print_graph(short) == text


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {6: LAYER.replace("aten.relu(%h{i})", "aten.cumsum(%h{i}, 0)")},
        dict.fromkeys(range(12), LAYER.replace("aten.relu(%h{i})", "aten.cumsum(%h{i}, 0)")),
    ],
)
def test_same_answer(odd: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    short = why_not_micro_batched(stack(12, odd), {B: 8})
    monkeypatch.setattr(lower_step, "shorten_blocks", lambda graph: graph)
    assert why_not_micro_batched(stack(12, odd), {B: 8}) == short
    assert (short is None) is (not odd)


@pytest.mark.parametrize("name", ["llama", "moe", "resnet", "gpt_outside"])
def test_same_answer_for_zoo_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = zoo_subject(name)
    symbols = subject.capture.symbols
    assert name in ZOO
    short = why_not_micro_batched(subject.graph, symbols)
    monkeypatch.setattr(lower_step, "shorten_blocks", lambda graph: graph)
    assert why_not_micro_batched(subject.graph, symbols) == short
