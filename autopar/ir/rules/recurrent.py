"""Recurrent layers: samples are apart, the steps and features of one are not."""

from __future__ import annotations

import torch
import torch.fx

from autopar.ir.rule import ShardingRule

from .common import Handler, Spec, arguments, input_value, letters, named_inputs, rule, whole


def recurrent(node: torch.fx.Node) -> ShardingRule | None:
    """`b[t][d],[l]b[h],...->b[t][e],[l]b[h]`; None without a batch, or with dropout inside."""
    args = arguments(node)
    if input_value(node, "input").rank != 3 or (args["dropout"] and args["train"]):
        return None
    names = letters()
    b, t, e, layers = next(names), next(names), next(names), next(names)

    def states() -> Spec:
        return [f"[{layers}]", b, f"[{next(names)}]"]

    def sequence(features: str) -> Spec:
        return (
            [b, f"[{t}]", f"[{features}]"]
            if args["batch_first"]
            else [f"[{t}]", b, f"[{features}]"]
        )

    found = named_inputs(node)
    hx = [states() for item in found if item.name == "hx"]
    weights = [
        whole([next(names) for _ in item.value.shape]) for item in found if item.name == "params"
    ]
    is_list = any(item.name == "hx" and item.at is not None for item in found)
    inputs: dict[str, Spec | list[Spec]] = {
        "input": sequence(next(names)),
        "hx": hx if is_list else hx[0],
        "params": weights,
    }
    return rule(node, inputs, sequence(e), *hx)


RULES: dict[str, Handler] = {
    f"aten.{name}.input": recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
}
