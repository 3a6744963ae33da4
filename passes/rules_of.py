"""The sharding rule of every op of a graph, and a report of the ops that have none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch.fx

from autopar.ir.graph import Graph
from autopar.ir.registry import rule_for
from autopar.ir.rule import ShardingRule

from .blocks import Blocks
from .options import place_call
from .price import Pricer
from .programme import is_getitem

Node = torch.fx.Node


def rules_of(
    graph: Graph, stands_for: Mapping[Node, Node] | None = None
) -> dict[str, ShardingRule]:
    """Rule per node name: the registry's, else one discovered by running the op on shards.

    Copies of a node of a repeated block have the rule of the one that `stands_for` them.
    """
    rules: dict[str, ShardingRule] = {}
    for node in graph.calls():
        if not is_getitem(node):
            first = node if stands_for is None else stands_for[node]
            if first is not node and first.name in rules:
                rules[node.name] = rules[first.name]
                continue
            found = rule_for(node)
            rules[node.name] = found if found is not None else _discovered(node)
    return rules


def _discovered(node: torch.fx.Node) -> ShardingRule:
    from autopar.ir.discover import discover  # runs ops: kept off the path of known graphs

    return discover(node)


def unsharded_ops(
    graph: Graph, blocks: Blocks, rules: Mapping[str, ShardingRule], pricer: Pricer
) -> list[str]:
    """One sentence per kind of op that autopar has no rule for, with what running it costs."""
    cost: dict[str, list[float]] = defaultdict(list)
    where: dict[str, str] = {}
    known: dict[Node, bool] = {}
    for node in graph.calls():
        first = blocks.representative[node]
        if first not in known:
            known[first] = is_getitem(node) or rule_for(first) is not None
        if known[first]:
            continue
        name = str(node.target if not hasattr(node.target, "__name__") else node.target.__name__)
        rule = rules[node.name]
        placed = place_call(node, rule, pricer.mesh, {})
        seconds = pricer.compute_time_s(node, placed) if placed is not None else 0.0
        how = f"discovered {rule}" if rule.splittable() else "runs replicated on every device"
        cost[f"{name}: no sharding rule; {how}"].append(seconds)
        where.setdefault(f"{name}: no sharding rule; {how}", node.meta.get("source", ""))
    return [
        f"{text}; {len(times)} call(s), {sum(times) * 1e3:.3g} ms per step if whole ({where[text]})"
        for text, times in cost.items()
    ]
