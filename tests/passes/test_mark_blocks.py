"""Copies of repeated blocks are numbered, and dropped parameters are gathered copy by copy."""

from __future__ import annotations

from autopar.ir.graph import Graph
from autopar.ir.lowered import BUCKET
from autopar.ir.mesh import Mesh
from autopar.passes.bucket_collectives import bucket_collectives
from autopar.passes.mark_blocks import BLOCK, block_of, mark_blocks

from .helpers import graph_of, lowered

LAYERS = 3
NAMES = ["a", *(f"{kind}{i}" for i in range(LAYERS) for kind in "uv"), "z"]


def text(mesh: str = "") -> str:
    """A product, blocks of two products and a gelu, and a product."""
    lines = [mesh] if mesh else []
    lines += [f'%{name}: param f32[8, 8] grad "{name}"' for name in NAMES]
    lines += ['%x: input f32[4, 8] "x"', "%y0: f32[4, 8] grad = aten.linear(%x, %a)"]
    for i in range(LAYERS):
        lines += [
            f"%h{i}: f32[4, 8] grad = aten.linear(%y{i}, %u{i})",
            f"%g{i}: f32[4, 8] grad = aten.gelu(%h{i})",
            f"%y{i + 1}: f32[4, 8] grad = aten.linear(%g{i}, %v{i})",
        ]
    lines += [
        f"%t: f32[4, 8] grad = aten.tanh(%y{LAYERS})",
        "%out: f32[4, 8] grad = aten.linear(%t, %z)",
    ]
    return "\n".join([*lines, "return %out"])


def test_copies_and_what_is_between_them_are_numbered() -> None:
    graph = mark_blocks(graph_of(text()), frozenset({"a"}))
    found = {node.name: node.meta[BLOCK] for node in graph.calls()}
    copies = [found[f"g{i}"] for i in range(LAYERS)]
    assert all(repeats for _, repeats in copies)
    assert [n for n, _ in copies] == list(range(copies[0][0], copies[0][0] + LAYERS))
    assert found["out"][0] > copies[-1][0]
    assert not found["out"][1]
    numbers = [number for number, _ in found.values()]
    assert numbers == sorted(numbers)


def test_a_parameter_is_in_the_block_that_reads_it_first() -> None:
    graph = mark_blocks(graph_of(text()), frozenset({"a"}))
    reader = {n.name: next(iter(n.users)) for n in graph.placeholders("param")}
    for node in graph.placeholders("param"):
        assert block_of(node) == reader[node.name].meta[BLOCK]


def test_nothing_is_marked_where_nothing_is_dropped() -> None:
    graph = graph_of(text())
    assert mark_blocks(graph) is graph


def test_buckets_of_dropped_parameters_keep_to_their_block() -> None:
    """Gathered again in the backward, a block's weights travel together; kept ones, all of them."""
    for regather, sizes in (("", [2 * LAYERS + 2]), (" ".join(NAMES), [2] * LAYERS)):
        made = buckets(regather)
        assert [len(names) for names in made if len(names) > 1] == sizes
    assert {frozenset(names) for names in made} == {
        frozenset({f"u{i}", f"v{i}"}) for i in range(LAYERS)
    }


def buckets(regather: str) -> list[list[str]]:
    rows = {
        node.name: {"dp": "b"} for node in graph_of(text()).calls() if "linear" in str(node.target)
    }
    rows |= {node.name: {"dp": "a"} for node in graph_of(text()).calls() if node.name not in rows}
    mesh, graph = lowered(text("mesh dp=2"), rows, dict.fromkeys(NAMES, "[dp, -]"), regather)
    return [
        [source.name for source in node.args[2]]  # type: ignore[union-attr]
        for node in marked(graph, mesh).calls()
        if node.target is BUCKET
    ]


def marked(graph: Graph, mesh: Mesh) -> Graph:
    """Buckets of a program whose ops are marked as the pass marks them before they are lowered."""
    marks = {n.name: n.meta[BLOCK] for n in mark_blocks(graph_of(text()), frozenset({"a"})).calls()}
    for node in graph.calls():
        if node.name in marks:
            node.meta[BLOCK] = marks[node.name]
    return bucket_collectives(graph, mesh)
