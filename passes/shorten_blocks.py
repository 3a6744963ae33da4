"""Leave most copies of repeated blocks out of a graph, where a few of them answer the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch.fx

from autopar.ir.graph import Graph, values_of

from .blocks import find_blocks
from .chunks import Chunk, Thinned, chunks_of, thinned

Node = torch.fx.Node

FIRST, LAST = 3, 2  # copies that stay


def shorten_blocks(graph: Graph) -> Graph:
    """The same graph with the first three and the last two copies of every repeated block.

    Copies are left out where they read their predecessors alone and all do so alike: the copy after
    them reads what the third one makes. Names stay. Parameters that only copies left out read are
    left out, too. The graph itself where there is nothing to leave out.
    """
    chunks = chunks_of(graph, find_blocks(graph))
    thin = thinned(chunks, FIRST, LAST)
    if not thin.alias or not are_wired_alike(chunks):
        return graph
    return without_copies(graph, thin)


def without_copies(graph: Graph, thin: Thinned) -> Graph:
    """The ops of a graph that stay, with what they read; names stay."""
    kept = {node for chunk in thin.chunks for node in chunk.nodes}
    new = torch.fx.Graph()
    env: dict[Node, Node] = {}
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            stays = node.name in graph.mutated or not node.users or not kept.isdisjoint(node.users)
        else:
            stays = node in kept
        if stays:
            env[node] = new.node_copy(node, lambda n: env[thin.alias.get(n, n)])
            env[node].meta = dict(node.meta)
    return replace(graph, fx=new)


def are_wired_alike(chunks: Sequence[Chunk]) -> bool:
    """Whether every copy of a block but the first reads what the one before it reads, one later."""
    at = {
        node: (i, place)
        for i, chunk in enumerate(chunks)
        for place, node in enumerate(chunk.nodes)
        if chunk.region >= 0
    }
    wiring: list[tuple[object, ...]] = []
    for i, chunk in enumerate(chunks):
        wiring.append(tuple(_reads(node, i, chunk.region, at, chunks) for node in chunk.nodes))
    return all(
        wiring[i] == wiring[i - 1]
        for i in range(2, len(chunks))
        if chunks[i].region >= 0
        and chunks[i].region == chunks[i - 1].region == chunks[i - 2].region
    )


def _reads(
    node: Node, chunk: int, region: int, at: Mapping[Node, tuple[int, int]], chunks: Sequence[Chunk]
) -> tuple[object, ...]:
    """What a node reads: places in copies of its block, other nodes, parameters by their types."""
    found: list[object] = []
    for source in node.all_input_nodes:
        copy, place = at.get(source, (-1, -1))
        if copy >= 0 and chunks[copy].region == region:
            found.append((chunk - copy, place))
        elif source.op == "placeholder" and source.meta["role"] in ("param", "buffer"):
            shared = len(source.users) > 1
            found.append(source if shared else (source.meta["role"], values_of(source)))
        else:
            found.append(source)
    return tuple(found)
