"""Rebuild the priced assignment of a plan: what every node of the captured graph does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.fx

from autopar.errors import UserError
from autopar.ir.graph import Graph, tensor_inputs, value_of, values_of
from autopar.ir.parse import parse_sharding
from autopar.ir.rule import REPLICATE, Choice, ShardingRule, choices
from autopar.ir.sharding import Sharding
from autopar.plan import Plan

from .blocks import Blocks, find_blocks
from .options import Option, place_call
from .price import Pricer
from .programme import passes_on

Node = torch.fx.Node


def assignment_of(
    graph: Graph,
    rules: Mapping[str, ShardingRule],
    plan: Plan,
    pricer: Pricer,
    blocks: Blocks | None = None,
) -> dict[Node, Option]:
    """The option of every node that a plan implies, with the prices of `pricer`.

    `graph` has integer sizes (`specialise`); `pricer` was made for the plan's mesh (any cluster).
    Copies of a block that do the same cost what the first one costs, as in the programme. Raises
    UserError where the plan asks for something that an op or a parameter cannot do.
    """
    stands_for = (blocks or find_blocks(graph)).representative
    option: dict[Node, Option] = {}
    calls: dict[tuple[Node, tuple[tuple[str, str], ...]], Option] = {}
    for node in graph.fx.nodes:
        if node.op == "output":
            option[node] = Option((), _whole(tensor_inputs(node)), (), 0.0, 0.0)
        elif node.op == "placeholder" and values_of(node):
            option[node] = _stored(node, plan, pricer)
        elif node.op == "call_function" and not passes_on(node):
            texts = plan.choices.get(node.name, {})
            key = (stands_for[node], tuple(texts.items()))
            if key not in calls:
                calls[key] = _call(stands_for[node], rules[stands_for[node].name], texts, pricer)
            option[node] = calls[key]
    return option


def _whole(sources: Sequence[Node]) -> tuple[Sharding, ...]:
    return tuple(Sharding.replicated(v.rank) for s in sources for v in values_of(s)[:1])


def _call(node: Node, rule: ShardingRule, texts: Mapping[str, str], pricer: Pricer) -> Option:
    """What an op does under the plan's choices (texts by axis)."""
    chosen = {
        axis: Choice.parse(texts[axis])
        for axis in pricer.mesh.names
        if axis in texts and Choice.parse(texts[axis]) != REPLICATE
    }
    known = all(choice in choices(rule) for choice in chosen.values())
    placed = place_call(node, rule, pricer.mesh, chosen, uneven=True) if known else None
    if placed is None:
        asked = ", ".join(f"{axis}: {choice}" for axis, choice in chosen.items())
        raise UserError(
            f"the plan lets {node.name} do what it cannot: {asked} under {rule}",
            where=node.meta.get("source") or None,
            fix="correct this op's choices, or make a new plan",
        )
    forward, backward = pricer.op_times_s(node, rule, placed, chosen)
    return Option(
        tuple(chosen.items()),
        placed.inputs,
        placed.outputs,
        forward + backward,
        pricer.saved_output_bytes(node, placed),
        forward_s=forward,
    )


def _stored(node: Node, plan: Plan, pricer: Pricer) -> Option:
    """A placeholder: a parameter as the plan stores it, anything else whole."""
    value = value_of(node)
    whole = Sharding.replicated(value.rank)
    if node.meta["role"] != "param":
        return Option((), (), (whole,), 0.0, 0.0)
    known = [name for name in node.meta["fqns"] if name in plan.params]
    if not known:
        raise UserError(
            f"the plan does not say how to store the parameter {node.meta['fqns'][0]}",
            fix="make a new plan of this model",
        )
    stored = plan.params[known[0]]
    sharding = parse_sharding(stored.sharding)
    if sharding.rank != value.rank:
        raise UserError(
            f"the plan stores {known[0]} as {sharding}, and it has {value.rank} dims",
            fix="make a new plan of this model",
        )
    return Option(
        (),
        (),
        (sharding,),
        pricer.update_time_s(node, sharding),
        pricer.stored_bytes(value, sharding),
        stored.regather,
    )
