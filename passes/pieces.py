"""Cut a graph into a chain of pieces, each a graph of its own: what a pipeline's stages run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx

from autopar.errors import UserError
from autopar.ir.graph import Graph, Value, value_of
from autopar.ir.mesh import MICRO_BATCH, Axis, Mesh
from autopar.ir.sharding import Sharding
from autopar.plan import PIPELINE_AXIS

from .columns import is_getitem
from .cut_points import made_again

Node = torch.fx.Node

RECEIVED = "received"


@dataclass(frozen=True)
class Piece:
    """One piece of a graph.

    `graph` has the placeholders that the piece reads, then one of the role "received" for every
    value of the piece before: it has the name of the node that made the value, in whatever piece.
    `sends` are the outputs of all pieces but the last, by the same names: what the next one
    receives, in order. The last piece has the outputs of the whole graph. New values of buffers
    are outputs of the piece that makes them, of the last one where all could.
    """

    graph: Graph
    receives: tuple[str, ...]
    sends: tuple[str, ...]


def cut_graph(graph: Graph, cuts: Sequence[str]) -> list[Piece]:
    """Cut a graph before the nodes named in `cuts`.

    Values needed later than in the next piece pass through the pieces between. What depends on
    inputs, buffers and constants alone is computed again where it is read. Parameters that several
    pieces read are placeholders of each. Raises UserError where the cuts are not ops of the graph
    in its order.
    """
    number = _numbered(graph, cuts)
    again = made_again(graph)
    last = len(cuts)
    needed: dict[Node, int] = {}  # the last piece that reads a value
    for node in graph.calls():
        for source in node.all_input_nodes:
            if source in number and source not in again and node not in again:
                needed[source] = max(needed.get(source, 0), number[node])
    entries: Any = graph.output_node.args[0]
    returned, updates = entries[: graph.outputs], entries[graph.outputs :]
    for source in returned:
        if isinstance(source, Node) and source in number and source not in again:
            needed[source] = last
    written: dict[int, dict[str, Node]] = {}
    for name, source in zip(graph.mutated, updates, strict=True):
        piece = last if source in again or source not in number else number[source]
        written.setdefault(piece, {})[name] = source
    crossing = [
        tuple(n for n in graph.calls() if number[n] < i <= needed.get(n, 0))
        for i in range(last + 2)
    ]
    made = []
    for i in range(last + 1):
        own = {n for n in graph.calls() if number[n] == i} - again
        results = list(returned) if i == last else list(crossing[i + 1])
        new = _piece(graph, own, again, crossing[i], results, written.get(i, {}))
        sends = () if i == last else tuple(n.name for n in crossing[i + 1])
        made.append(Piece(new, tuple(n.name for n in crossing[i]), sends))
    return made


def _numbered(graph: Graph, cuts: Sequence[str]) -> dict[Node, int]:
    """The piece of every op; outputs of an op with several are in its piece."""
    starts = {name: i for i, name in enumerate(cuts, 1)}
    number: dict[Node, int] = {}
    here = 0
    for i, node in enumerate(graph.calls()):
        if node.name in starts:
            if i == 0 or starts[node.name] != here + 1:
                raise UserError(
                    f"the cut at {node.name} leaves a stage of the pipeline empty, or is not in "
                    "the order of the model",
                    fix="name the first op of every stage but the first, in order",
                )
            here += 1
        number[node] = number[node.all_input_nodes[0]] if is_getitem(node) else here
    missing = sorted(set(cuts) - {node.name for node in number})
    if missing:
        raise UserError(
            f"the pipeline is cut before {missing[0]}, and the model has no such op",
            fix="make the plan again for this model",
        )
    return number


def _piece(
    graph: Graph,
    own: set[Node],
    again: frozenset[Node],
    receives: Sequence[Node],
    results: Sequence[Any],
    updates: Mapping[str, Node],
) -> Graph:
    """The graph of the ops in `own`, which gives the results and new values of buffers."""
    wanted = [r for r in (*results, *updates.values()) if isinstance(r, Node)]
    kept = own | _of_inputs(own, wanted, again)
    reads = {source for node in kept for source in node.all_input_nodes} | set(wanted)
    new = torch.fx.Graph()
    env: dict[Node, Node] = {}
    for node in graph.placeholders():
        if node in reads or node.name in updates:
            env[node] = _copied(new, node, env)
    for node in receives:
        env[node] = _received(new, node)
    for node in graph.calls():
        if node in kept:
            env[node] = _copied(new, node, env)
    outputs = (*results, *updates.values())
    new.output(tuple(env[r] if isinstance(r, Node) else r for r in outputs))
    return Graph(new, len(results), tuple(updates))


def _of_inputs(own: set[Node], results: Sequence[Node], again: frozenset[Node]) -> set[Node]:
    """The ops of inputs, buffers and constants that a piece computes for itself."""
    found: set[Node] = set()
    wanted = [source for node in own for source in node.all_input_nodes] + list(results)
    while wanted:
        node = wanted.pop()
        if node in again and node.op == "call_function" and node not in found:
            found.add(node)
            wanted.extend(node.all_input_nodes)
    return found


def _received(new: torch.fx.Graph, node: Node) -> Node:
    made = new.placeholder(node.name)
    made.name = node.name
    where = {key: node.meta.get(key, "") for key in ("source", "stack", "module")}
    made.meta = {**where, "value": value_of(node), "role": RECEIVED, "fqns": (node.name,)}
    return made


def _copied(new: torch.fx.Graph, node: Node, env: Mapping[Node, Node]) -> Node:
    copy = new.node_copy(node, lambda n: env[n])
    copy.meta = dict(node.meta)
    return copy


@dataclass(frozen=True)
class Boundary:
    """How values cross from one piece to the next.

    On the axes of a stage they are split or whole; what is partial there is added up. Along
    micro-batches they stay as they are: every one crosses by itself.

    What is whole on the axes `scattered` is cut up on the way, so that each device sends a part of
    it over the slow links between stages, and the devices of the next stage gather it over their
    fast ones (arXiv:2104.04473, section 4.1). That is for activations in training, which are large
    and travel twice: what has no gradient, or no dim that divides evenly, crosses whole.
    """

    scattered: tuple[Axis, ...] = ()

    @staticmethod
    def of(mesh: Mesh) -> Boundary:
        """That of a plan's mesh, `pp` included."""
        if PIPELINE_AXIS not in mesh.names:
            return Boundary()
        across = mesh[PIPELINE_AXIS].level
        inside = (axis for axis in mesh if axis.name != PIPELINE_AXIS and axis.size > 1)
        return Boundary(tuple(axis for axis in inside if axis.level < across))

    def sharding(self, value: Value, given: Sharding) -> Sharding:
        """That in which a value crosses which is `given` where it is made.

        The first dim, that of micro-batches, is not cut up.
        """
        partial = tuple((axis, kind) for axis, kind in given.partial if axis == MICRO_BATCH)
        made = Sharding(given.splits, partial)
        for axis in self.scattered if value.requires_grad else ():
            if axis.name in made.used_axes():
                continue
            sizes = dict(enumerate(value.shape[1:], 1))
            free = [d for d, size in sizes.items() if not made.splits[d] and size % axis.size == 0]
            if free:
                made = made.with_split(free[0], (axis.name,))
        return made
