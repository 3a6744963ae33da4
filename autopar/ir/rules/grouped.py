"""Matrix products of rows that are sorted by expert, one matrix per expert."""

from __future__ import annotations

import torch

from autopar.ir.rule import ShardingRule

from .common import Handler, named_inputs, routes, rule


def grouped_mm(node: torch.fx.Node) -> ShardingRule | None:
    """`td,[e]df,[o]->tf; linear(0) route(t>e)`, `o` the end of every expert's rows.

    A device that has some of the rows counts the ends from its first one; with a route it also has
    only its own experts, and sends the rows of others there. None for other forms of the op.
    """
    names = [found.name for found in named_inputs(node)]
    ranks = [found.value.rank for found in named_inputs(node)]
    if ranks != [2, 3, 1]:
        return None
    specs = (["t", "d"], ["[e]", "d", "f"], ["[o]"])
    return rule(
        node,
        dict(zip(names, specs, strict=True)),
        ["t", "f"],
        linear=[names[0]],
        clauses=routes(["t"], "[e]"),
    )


RULES: dict[str, Handler] = {
    "aten._grouped_mm": grouped_mm,
    "transformers.grouped_mm_fallback": grouped_mm,
}
