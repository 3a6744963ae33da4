"""Make one cross-entropy of a log-softmax and a negative log-likelihood: that one can be split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph, value_of
from autopar.ir.rules.common import arguments, dim_index

from .free_factories import erase_unread

aten = torch.ops.aten
Node = torch.fx.Node

_LOSSES = (aten.nll_loss_nd.default, aten.nll_loss.default)
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)


def join_log_softmax(graph: Graph) -> Graph:
    """Replace `nll_loss(log_softmax(x), ids)` by `cross_entropy_loss(x, ids)`, which computes it.

    A reshape of rows may be between the two. The mean of a likelihood divides by a count that
    depends on the ids, so that its tokens could not be split; a cross-entropy's is counted by the
    runtime. The log-softmax stays for other readers.
    """
    new = graph.copy()
    for node in list(new.fx.nodes):
        if node.target not in _LOSSES:
            continue
        a = arguments(node)
        scores = _scores(new, node, a["self"])
        if scores is not None:
            node.target = aten.cross_entropy_loss.default
            node.args = (scores, a["target"], a["weight"], a["reduction"], a["ignore_index"])
            node.kwargs = {}
            erase_unread(new, a["self"])
    return new


def _scores(graph: Graph, loss: Node, source: Any) -> Node | None:
    """What the log-softmax that a loss reads is taken of, in the shape that the loss reads."""
    value, reshaped = value_of(source), None
    if source.target is aten.reshape.default:
        reshaped, source = source, source.args[0]
        assert isinstance(source, torch.fx.Node)
    if source.target not in _LOG_SOFTMAX:
        return None
    a = arguments(source)
    x, made = a["self"], value_of(source)
    classes = dim_index(a["dim"], made.rank)
    if value_of(x).dtype != made.dtype:
        return None
    if reshaped is None:
        found: Node = x
        return found if classes == min(1, made.rank - 1) else None
    if value.rank != 2 or classes != made.rank - 1 or value.shape[-1] != made.shape[-1]:
        return None
    with graph.fx.inserting_before(loss):
        moved = graph.fx.call_function(aten.reshape.default, (x, reshaped.args[1]))
    moved.meta = {**reshaped.meta, "value": replace(value_of(x), shape=value.shape)}
    return moved
