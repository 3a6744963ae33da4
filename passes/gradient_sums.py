"""What adding up the gradients of parameters over micro-batches costs.

Autograd keeps the first micro-batch's gradient of a parameter as it is and adds those of the others
to it: of `k` micro-batches, `k - 1` read two gradients and write one. A parameter that is gathered
once per step has its sum in the size in which ops read it, one that is gathered for every
micro-batch (ZeRO-3) in the size in which it is stored: its gradient is reduced before it is added.
Gradients in 16 bits are added to sums in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from autopar.cost.cluster import Device
from autopar.cost.compute import accumulate_time
from autopar.ir.graph import values_of
from autopar.ir.sharding import Sharding

from .widening import widening


def sum_time(device: Device, nbytes: Any, dtype: torch.dtype) -> Any:
    """Seconds to add a gradient of `nbytes` (a number, an array, a formula) to those before."""
    wider = widening(dtype)  # a third of what is read and written is one gradient
    return accumulate_time(device, nbytes * (3 + 2 * wider) / 3 if wider else nbytes)


def summed_as(source: Sharding, want: Sharding, regather: bool) -> Sharding:
    """How the sum of a parameter's gradients is sharded that is stored as `source`."""
    return source if regather else want.without_varying()


def is_summed(node: torch.fx.Node, port: int) -> bool:
    """Whether an output of a node is a parameter that wants gradients."""
    if node.op != "placeholder" or node.meta.get("role") != "param":
        return False
    return values_of(node)[port].requires_grad
