"""Programs as text, through one pass or several."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_program, parse_sharding
from autopar.ir.rule import Choice
from autopar.ir.text import print_graph
from autopar.passes.insert_reshards import insert_reshards
from autopar.passes.lower_collectives import lower_collectives
from autopar.passes.propagate import propagate
from autopar.passes.rules_of import rules_of

Texts = Mapping[str, str]


def dedent(text: str) -> str:
    return textwrap.dedent(text).strip()


def program(text: str) -> tuple[Mesh, Graph]:
    """Mesh and graph of a text whose first line is its mesh."""
    mesh, graph = parse_program(dedent(text))
    assert mesh is not None
    return mesh, graph


def graph_of(text: str) -> Graph:
    return parse_program(dedent(text))[1]


def show(graph: Graph) -> str:
    return print_graph(graph)


def propagated(
    text: str, choices: Mapping[str, Texts], storage: Texts | None = None, regather: str = ""
) -> tuple[Mesh, Graph]:
    """A program after `propagate`; choices (`"tp=o"` as `{"tp": "o"}`) and storage are texts."""
    mesh, graph = program(text)
    made = propagate(
        graph,
        mesh,
        rules_of(graph),
        {
            node: {axis: Choice.parse(choice) for axis, choice in chosen.items()}
            for node, chosen in choices.items()
        },
        {name: parse_sharding(sharding) for name, sharding in (storage or {}).items()},
        frozenset(regather.split()),
    )
    return mesh, made


def resharded(
    text: str, choices: Mapping[str, Texts], storage: Texts | None = None, regather: str = ""
) -> tuple[Mesh, Graph]:
    """A program after `insert_reshards`."""
    mesh, graph = propagated(text, choices, storage, regather)
    return mesh, insert_reshards(graph)


def lowered(
    text: str, choices: Mapping[str, Texts], storage: Texts | None = None, regather: str = ""
) -> tuple[Mesh, Graph]:
    """A program after `lower_collectives`."""
    mesh, graph = resharded(text, choices, storage, regather)
    return mesh, lower_collectives(graph, mesh)
