"""Cut the ops of a graph at the copies of its repeated blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.fx

from autopar.ir.graph import Graph

from .blocks import Blocks

Node = torch.fx.Node


@dataclass(frozen=True)
class Chunk:
    """Consecutive ops: one copy of a repeated block, or what lies between two blocks."""

    region: int  # -1: in no repeated block
    nodes: tuple[Node, ...]


def chunks_of(graph: Graph, blocks: Blocks) -> list[Chunk]:
    """The ops of a graph (and its output) cut at the copies of its repeated blocks."""
    calls = list(graph.calls())
    at = {node: i for i, node in enumerate(calls)}
    chunks, done = [], 0
    for region, (first, length, copies) in enumerate(blocks.regions):
        start = at[first]
        chunks.append(Chunk(-1, tuple(calls[done:start])))
        for copy in range(copies):
            begin = start + copy * length
            chunks.append(Chunk(region, tuple(calls[begin : begin + length])))
        done = start + copies * length
    chunks.append(Chunk(-1, (*calls[done:], graph.output_node)))
    return [chunk for chunk in chunks if chunk.nodes]


@dataclass(frozen=True)
class Thinned:
    """Chunks without most copies of a block.

    `more[i]` copies after chunk `i` are left out; `alias` maps the nodes of the last of them to
    those of chunk `i`, which the next chunk reads instead.
    """

    chunks: Sequence[Chunk]
    more: Sequence[int]
    alias: Mapping[Node, Node]


def thinned(chunks: Sequence[Chunk], first: int = 3, last: int = 2) -> Thinned:
    """The first and the last copies of every block whose copies read their predecessors alone."""
    kept: list[Chunk] = []
    more: list[int] = []
    alias: dict[Node, Node] = {}
    at = 0
    while at < len(chunks):
        end = at + 1
        while end < len(chunks) and chunks[end].region == chunks[at].region >= 0:
            end += 1
        copies = chunks[at:end]
        left = len(copies) - first - last
        if left < 1 or not _is_chain(copies):
            kept += copies
            more += [0] * len(copies)
        else:
            kept += [*copies[:first], *copies[-last:]]
            more += [*[0] * (first - 1), left, *[0] * last]
            alias |= dict(zip(copies[-last - 1].nodes, copies[first - 1].nodes, strict=True))
        at = end
    return Thinned(kept, more, alias)


def _is_chain(copies: Sequence[Chunk]) -> bool:
    """Whether every copy but the last is read by itself and the next alone."""
    of = {node: i for i, copy in enumerate(copies) for node in copy.nodes}
    return all(
        of.get(user, -1) in (i, i + 1)
        for i, copy in enumerate(copies[:-1])
        for node in copy.nodes
        for user in node.users
    )
