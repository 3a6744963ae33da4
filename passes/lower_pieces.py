"""The lowering of a pipeline's pieces: the programs of those that one rank runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopar.ir.graph import Graph, Value, value_of
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding
from autopar.kernel_use import NOWHERE, Places

from .edges import producer_of
from .follow_micro_batches import Followed
from .lower_step import Lowered, lower_part
from .pieces import Boundary, Piece, cut_graph
from .pipeline import Stage

DIRECT = Boundary()  # what is whole is sent whole


@dataclass(frozen=True)
class LoweredPieces:
    """What one rank runs of a pipeline, and what it must know of the rest.

    `mine` are the numbers of its pieces with their programs. `outputs` are what the model returns
    (the type of a tensor, else the value itself), `updates` the new values of buffers, by name,
    with the stages that make them. `parameters` are the stages that read every parameter, by its
    first name.
    """

    mine: tuple[tuple[int, Lowered], ...]
    outputs: tuple[object, ...]
    updates: tuple[tuple[str, int, Value], ...]
    parameters: Mapping[str, tuple[int, ...]]

    @property
    def stages(self) -> list[Stage]:
        """What every pass left of the rank's pieces, one piece after the other."""
        return [replace(stage, piece=i) for i, made in self.mine for stage in made.stages]


def lower_pieces(
    followed: Followed,
    cuts: Sequence[str],
    stages: int,
    stage_mesh: Mesh,
    rank: int,
    storage: Mapping[str, Sharding],
    regather: frozenset[str] = frozenset(),
    ahead: bool = True,
    kernels: Places = NOWHERE,
    boundary: Boundary = DIRECT,
) -> LoweredPieces:
    """Cut a model in micro-batches, and lower the pieces of the rank's stage.

    `rank` counts over stages first, then over `stage_mesh`; piece `i` runs on stage
    `i % stages`; values cross between them as `boundary` says. Raises UserError where the cuts do
    not fit, and as `lower_part` does.
    """
    pieces = cut_graph(followed.graph, cuts)
    stage, member = divmod(rank, stage_mesh.size)
    made = []
    for i in range(stage, len(pieces), stages):
        received = dict(
            zip(pieces[i].receives, _crossing(followed, pieces[i].receives, boundary), strict=True)
        )
        lowered = lower_part(
            followed,
            pieces[i].graph,
            member,
            {**storage, **received},
            regather,
            ahead,
            sends=boundary if i < len(pieces) - 1 else None,
            kernels=kernels,
        )
        made.append((i, lowered))
    return LoweredPieces(
        tuple(made), _outputs(followed.graph), _updates(pieces, stages), _readers(pieces, stages)
    )


def _crossing(followed: Followed, names: Sequence[str], boundary: Boundary) -> tuple[Sharding, ...]:
    """How the values of these names cross from a piece to the next."""
    nodes = {node.name: node for node in followed.graph.calls()}
    found = []
    for name in names:
        producer, port = producer_of(nodes[name])
        given = followed.given[producer.name, port]
        found.append(boundary.sharding(value_of(nodes[name]), given))
    return tuple(found)


def _outputs(graph: Graph) -> tuple[object, ...]:
    entries = graph.output_node.args[0]
    assert isinstance(entries, (list, tuple))
    return tuple(getattr(e, "meta", {}).get("value", e) for e in entries[: graph.outputs])


def _updates(pieces: Sequence[Piece], stages: int) -> tuple[tuple[str, int, Value], ...]:
    found = []
    for i, piece in enumerate(pieces):
        names = {n.name: n.meta["fqns"][0] for n in piece.graph.placeholders("buffer")}
        entries: Any = piece.graph.output_node.args[0]
        new = entries[piece.graph.outputs :]
        for name, node in zip(piece.graph.mutated, new, strict=True):
            found.append((names[name], i % stages, node.meta["value"]))
    return tuple(found)


def _readers(pieces: Sequence[Piece], stages: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, dict[int, None]] = {}
    for i, piece in enumerate(pieces):
        for node in piece.graph.placeholders("param"):
            found.setdefault(node.meta["fqns"][0], {})[i % stages] = None
    return {name: tuple(stages_) for name, stages_ in found.items()}
