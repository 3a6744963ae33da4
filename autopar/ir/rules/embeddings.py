"""Table look-ups."""

from __future__ import annotations

import torch

from autopar.ir.rule import ShardingRule

from .common import Handler, all_whole, arguments, input_value, letters, routes, rule, take


def embedding(node: torch.fx.Node) -> ShardingRule:
    """`vd,bs->bsd; route(b>v,s>v)`.

    A split vocabulary is a sum, every device looking up the rows it has; or ids and rows are split
    by one axis, and every device fetches the rows of its ids from their owners.
    """
    args = arguments(node)
    names = letters()
    v, d = take(names, 2)
    ids = take(names, input_value(node, "indices").rank)
    if args.get("scale_grad_by_freq") or args.get("sparse"):
        # The gradient depends on how often an id occurs in the whole batch.
        v, ids = f"[{v}]", [f"[{f}]" for f in ids]
        return rule(node, {"weight": [v, d], "indices": ids}, [*ids, d])
    return rule(node, {"weight": [v, d], "indices": ids}, [*ids, d], clauses=routes(ids, v))


RULES: dict[str, Handler] = {
    "aten.embedding": embedding,
    "aten.embedding_bag": all_whole,
    "aten._embedding_bag": all_whole,
}
