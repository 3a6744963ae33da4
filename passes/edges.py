"""Who reads what: the reads of tensor values in a graph, through nodes that pass them on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch.fx

from autopar.ir.graph import Graph, Value, tensor_inputs

Node = torch.fx.Node

WORN = "worn"  # meta of a cast that is planned as part of its parameter (`narrow_gathers`)


class Edge(NamedTuple):
    """A value read by a node: output `port` of `producer` is tensor input `slot` of `consumer`."""

    producer: Node
    port: int
    consumer: Node
    slot: int


def edges_of(graph: Graph) -> list[Edge]:
    """Every read of a tensor value by an op or by the output, through nodes that pass it on."""
    return edges_among(graph.fx.nodes)


def edges_among(nodes: Iterable[Node]) -> list[Edge]:
    """Every read of a tensor value by one of the nodes."""
    found = []
    for node in nodes:
        if node.op == "output" or (node.op == "call_function" and not passes_on(node)):
            for slot, source in enumerate(tensor_inputs(node)):
                found.append(Edge(*producer_of(source), node, slot))
    return found


def is_getitem(node: Node) -> bool:
    """Whether a node only picks one output of the op before it."""
    return getattr(node.target, "__name__", "") == "getitem"


def passes_on(node: Node) -> bool:
    """Whether a node decides nothing: its readers read what is before it."""
    return bool(node.meta.get(WORN)) or is_getitem(node)


def producer_of(node: Node) -> tuple[Node, int]:
    """The op behind a value and which of its tensor outputs it is."""
    if node.meta.get(WORN):
        return tensor_inputs(node)[0], 0
    if not is_getitem(node):
        return node, 0
    source, index = node.args[0], node.args[1]
    assert isinstance(source, Node) and isinstance(index, int)
    values = source.meta["value"]
    return source, sum(isinstance(v, Value) for v in values[:index])


def edge_key(edge: Edge) -> tuple[str, int, str, int]:
    """Orders edges by name."""
    return (edge.producer.name, edge.port, edge.consumer.name, edge.slot)
