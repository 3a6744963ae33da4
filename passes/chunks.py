"""Cut the ops of a graph at the copies of its repeated blocks."""

from __future__ import annotations

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
