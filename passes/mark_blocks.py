"""Number the copies of repeated blocks: what is gathered for one is not gathered with another's."""

from __future__ import annotations

import torch.fx

from autopar.ir.graph import Graph

from .blocks import find_blocks

Node = torch.fx.Node

BLOCK = "block"


def mark_blocks(graph: Graph, regather: frozenset[str] = frozenset()) -> Graph:
    """Number the copies of repeated blocks, and what is between them, in the order of the graph.

    `meta["block"]` is (number, whether it is a copy of a block that repeats). Does nothing where
    no parameter is in `regather`.
    """
    if not regather:
        return graph
    new = graph.copy()
    calls = list(new.calls())
    at = {node: i for i, node in enumerate(calls)}
    starts = {0: False}
    for first, ops, copies in find_blocks(new).regions:
        starts.update({at[first] + copy * ops: True for copy in range(copies)})
        starts.setdefault(at[first] + copies * ops, False)
    block = (-1, False)
    for i, node in enumerate(calls):
        if i in starts:
            block = (block[0] + 1, starts[i])
        node.meta[BLOCK] = block
    return new


def block_of(node: Node) -> tuple[int, bool]:
    """The block that a node is in; of a collective or a getitem, that of its first reader.

    What is marked nowhere is in block 0, which does not repeat.
    """
    seen: set[Node] = set()
    found: list[tuple[int, bool]] = []
    stack = [node]
    while stack:
        top = stack.pop()
        if top in seen:
            continue
        seen.add(top)
        mark = top.meta.get(BLOCK)
        if mark is None:
            stack.extend(top.users)
        else:
            found.append(mark)
    return min(found, default=(0, False))
