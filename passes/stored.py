"""What training stores of parameters between steps, by what it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch.fx

from autopar.cost.memory import state_bytes
from autopar.ir.graph import value_of

from .options import Option
from .price import Pricer
from .wide_gradients import stored_sum_bytes

Node = torch.fx.Node


def stored_state(
    stored: Iterable[Node], option: Mapping[Node, Option], pricer: Pricer
) -> dict[str, float]:
    """Stored bytes by what they are; the programme's total, exactly, and sums of gradients."""
    found = {"parameters": 0.0, "gradients": 0.0, "optimizer state": 0.0}
    for node in stored:
        total = option[node].memory_bytes
        if not total:
            continue
        value, sharding = value_of(node), option[node].gives[0]
        parameter = pricer.local_bytes(value, sharding)
        gradient = _stored_gradient_bytes(node, option, pricer)
        found["parameters"] += parameter
        found["gradients"] += gradient_bytes(node, option, pricer)
        found["optimizer state"] += total - parameter - gradient
    return found


def gradient_bytes(node: Node, option: Mapping[Node, Option], pricer: Pricer) -> float:
    """Bytes of a parameter's stored gradient; 0 where it has none.

    Or of the sum over micro-batches in its place.
    """
    stored = _stored_gradient_bytes(node, option, pricer)
    return stored + stored_sum_bytes(node, option, pricer) if stored else 0.0


def _stored_gradient_bytes(node: Node, option: Mapping[Node, Option], pricer: Pricer) -> float:
    value = value_of(node)
    if not value.requires_grad or not option[node].memory_bytes:
        return 0.0
    local = pricer.local_bytes(value, option[node].gives[0]) / value.dtype.itemsize
    return float(state_bytes(local, value.dtype, pricer.optimizer).gradients)
