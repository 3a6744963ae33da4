"""Number the dropouts of a model, so that their masks stay what they are wherever they run."""

from __future__ import annotations

import torch
import torch.fx

from autopar.ir.graph import Graph
from autopar.ir.rules.common import arguments

RANDOM_CALL = "random_call"


def number_random_calls(graph: Graph) -> Graph:
    """Give every dropout that drops anything its number, in the order of the model.

    `meta["random_call"]` is what the mask depends on beside the seed: a graph that is cut into
    pieces, or of which some nodes are copied, draws the masks of the whole.
    """
    new = graph.copy()
    numbered = 0
    for node in new.calls():
        if is_random(node):
            node.meta[RANDOM_CALL] = numbered
            numbered += 1
    return new


def is_random(node: torch.fx.Node) -> bool:
    """Whether a node is a dropout that drops anything."""
    if node.target is not torch.ops.aten.dropout.default:
        return False
    a = arguments(node)
    return bool(a["train"]) and a["p"] > 0.0
