"""Mark what the backward computes again: the plan's blocks, and the user's own checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.fx

from autopar.errors import UserError
from autopar.ir.graph import Graph, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.recomputed import FULL, MARK, SELECTIVE, Recomputed, mark_of
from autopar.plan import Recompute

from .blocks import find_blocks
from .uneven import unlike_somewhere

Node = torch.fx.Node


def mark_recompute(graph: Graph, recompute: Sequence[Recompute] = ()) -> Graph:
    """Mark the first `full` copies of a plan's blocks, the next `selective` ones, user regions.

    A user's `torch.utils.checkpoint.checkpoint` is recomputed as it was written; copies of a block
    that hold such a region are left to it.
    Raises UserError if the graph has no such block.
    """
    new = graph.copy()
    calls = list(new.calls())
    for node in calls:
        region = node.meta.get("region")
        node.meta[MARK] = None if region is None else Recomputed(f"checkpoint_{region}")
    if not recompute:
        return new
    at = {node: i for i, node in enumerate(calls)}
    regions = {(f.name, copies): (f, ops) for f, ops, copies in find_blocks(new).regions}
    for index, block in enumerate(recompute):
        if (block.block, block.copies) not in regions:
            raise UserError(
                f"the plan recomputes a block of {block.copies} copies that begins at "
                f"%{block.block}, and the model has no such block",
                fix="make the plan again with `autopar plan`",
            )
        first, ops = regions[block.block, block.copies]
        for copy in range(block.full + block.selective):
            mode = FULL if copy < block.full else SELECTIVE
            nodes = calls[at[first] + copy * ops : at[first] + (copy + 1) * ops]
            if not any(mark_of(node) for node in nodes):
                for node in nodes:
                    node.meta[MARK] = Recomputed(f"block_{index}_{copy}", mode)
    return new


def matching_recompute(graph: Graph, recompute: Sequence[Recompute]) -> tuple[Recompute, ...]:
    """The recomputation of a plan for another capture of its model (of another batch, say).

    Blocks are matched by first node and number of copies, else by the number alone, in order; those
    without a match keep everything.
    """
    left = list(find_blocks(graph).regions)
    found: list[Recompute] = []
    for block in recompute:
        alike = [r for r in left if r[2] == block.copies]
        match = next((r for r in alike if r[0].name == block.block), alike[0] if alike else None)
        if match is not None:
            left.remove(match)
            found.append(replace(block, block=match[0].name))
    return tuple(found)


def settle_recompute(graph: Graph, mesh: Mesh) -> Graph:
    """Run a region to its end in the backward if some devices have nothing, or one row, in it.

    What autograd saves, and so where a recomputation may begin and stop, is the same on all
    devices unless ops take other ways on some.
    """
    new = graph.copy()
    unlike = {
        mark.region
        for node in new.calls()
        if (mark := mark_of(node)) is not None
        and any(_is_unlike(n, mesh) for n in (node, *node.all_input_nodes))
    }
    for node in new.calls():
        mark = mark_of(node)
        if mark is not None and mark.region in unlike:
            node.meta[MARK] = replace(mark, to_the_end=True)
    return new


def _is_unlike(node: Node, mesh: Mesh) -> bool:
    return any(
        unlike_somewhere(value.int_shape(), value.sharding, mesh)
        for value in values_of(node)
        if value.sharding is not None
    )
