"""Marks of nodes whose forward runs again in the backward (activation checkpointing).

`node.meta["recompute"]` holds a `Recomputed`, or None where autograd keeps what it needs. Nodes of
one region are run, and run again, together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx

MARK = "recompute"
FULL, SELECTIVE = "full", "selective"


@dataclass(frozen=True)
class Recomputed:
    """A region and how it is recomputed.

    `full` keeps the region's inputs alone, `selective` also what matrix products, convolutions,
    attention and collectives give. With `to_the_end` the backward starts with the region's
    recomputation and runs all of it, whatever autograd saved: ranks with nothing to compute save
    less, and must communicate all the same.
    """

    region: str
    mode: str = FULL
    to_the_end: bool = False


def mark_of(node: torch.fx.Node) -> Recomputed | None:
    """The node's mark."""
    found: Recomputed | None = node.meta.get(MARK)
    return found


def common_mark(*nodes: torch.fx.Node) -> Recomputed | None:
    """The mark that the nodes share; None if they are not all of one region."""
    marks = {mark_of(node) for node in nodes}
    return marks.pop() if len(marks) == 1 else None
