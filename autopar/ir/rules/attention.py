"""Scaled dot-product attention: batch, heads and queries split; keys and features are whole."""

from __future__ import annotations

import torch

from autopar.ir.rule import ShardingRule

from .common import (
    Handler,
    Spec,
    arguments,
    broadcast,
    input_value,
    letters,
    named_inputs,
    output,
    rule,
    same,
    take,
)


def attention(node: torch.fx.Node) -> ShardingRule:
    """`bhs[e],bh[t][e],bh[t][f]->bhs[f]`; grouped heads are `b(hg)s[e],bh[t][e],bh[t][f]`.

    Keys and features are whole. A causal mask counts queries from the first one: where they are
    split, `localise_shapes` calls an op that knows which rows it has.
    """
    args = arguments(node)
    q, k, v = (input_value(node, name) for name in ("query", "key", "value"))
    out = output(node)
    names = letters()
    s, t, e, f = take(names, 4)
    lead = take(names, out.rank - 2)
    batch = list(lead)
    inner = {
        name: broadcast(lead, out.shape[:-2], x.shape[:-2])
        for name, x in (("query", q), ("key", k), ("value", v))
    }
    if args.get("enable_gqa") and not same(q.shape[-3], k.shape[-3]):
        group = f"({lead[-1]}{next(names)})"
        batch = [*lead[:-1], group]
        inner = {
            name: [*spec[:-1], group if name == "query" else lead[-1]]
            for name, spec in inner.items()
        }
        if not same(k.shape[-3], v.shape[-3]):
            batch = [*lead[:-1], f"[{lead[-1]}]"]
            spare = iter(take(names, 3))
            inner = {name: [*spec[:-1], f"[{next(spare)}]"] for name, spec in inner.items()}
    inputs: dict[str, Spec] = {
        "query": [*inner["query"], s, f"[{e}]"],
        "key": [*inner["key"], f"[{t}]", f"[{e}]"],
        "value": [*inner["value"], f"[{t}]", f"[{f}]"],
    }
    after = [*batch, s, f"[{f}]"]
    if any(item.name == "attn_mask" for item in named_inputs(node)):
        mask = input_value(node, "attn_mask")
        full = (*out.shape[:-1], k.shape[-2])
        inputs["attn_mask"] = broadcast([*batch, s, f"[{t}]"], full, mask.shape)
    return rule(node, inputs, after)


RULES: dict[str, Handler] = {"aten.scaled_dot_product_attention": attention}
