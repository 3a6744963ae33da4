"""Dropouts of a lowered program that a compiler sees as arithmetic, not as calls to leave alone.

They read their keys from one more input of the program, a table made of the seed for every run. The
seed itself stays an input for those that remain calls: by a kernel of autopar's own, in a selective
region (which runs op by op), or with a region that depends on the micro-batch. To those it comes
unseen by the compiler (`autopar.runtime.unseen`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor

from autopar.ir.graph import Graph
from autopar.ir.lowered import DROPOUT, LoweredOp, Region
from autopar.ir.recomputed import SELECTIVE, mark_of

from .random_keys import key_table, masked

KEYED_DROPOUT = LoweredOp("keyed_dropout")
TABLE = "rng_keys"


def keyed_dropout(x: Tensor, p: float, table: Tensor, call: int, region: Region) -> Tensor:
    """`autopar.runtime.sharded_ops.dropout` of one region, by a table of keys."""
    return masked(x, p, table, call, region)


def read_keys(graph: Graph) -> Graph:
    """The graph with its dropouts reading a last input `rng_keys`; the graph itself without any."""
    if not any(_is_keyed(node) for node in graph.calls()):
        return graph
    new = graph.copy()
    last = new.placeholders()[-1]
    with new.fx.inserting_after(last):
        table = new.fx.placeholder(TABLE)
    table.meta = {"value": None, "role": "keys", "fqns": (TABLE,)}
    for node in list(new.calls()):
        if _is_keyed(node):
            x, p, _, call, region = node.args
            node.target, node.args = KEYED_DROPOUT, (x, p, table, call, region)
    return new


def with_keys(
    run: Callable[..., tuple[Any, ...]], graph: Graph, device: torch.device | None
) -> Callable[..., tuple[Any, ...]]:
    """`run` of `read_keys(graph)`, called with the inputs of `graph`."""
    roles = [node.meta["role"] for node in graph.placeholders()]
    seed = roles.index("seed")
    calls = [node.args[3] for node in graph.calls() if _is_keyed(node)]
    count = 1 + max(call for call in calls if isinstance(call, int))

    def keyed(*tensors: Any) -> tuple[Any, ...]:
        return run(*tensors, key_table(tensors[seed], 0, count, device))

    return keyed


def _is_keyed(node: torch.fx.Node) -> bool:
    if node.target is not DROPOUT or len(node.args) != 5 or node.kwargs:
        return False
    mark: Any = mark_of(node)
    region: Any = node.args[4]
    if mark is not None and mark.mode == SELECTIVE:
        return False
    return isinstance(region, Region) and isinstance(node.args[3], int)
