"""What adding up the gradients of parameters over micro-batches costs, at the ops that make them.

Autograd keeps the first micro-batch's gradient of a parameter as it is and adds those of the others
to it: of `k` micro-batches, `k - 1` read two gradients of the parameter and write one. A parameter
is read whole or as it is sharded for the op: what counts is the size that the op wants it in.
Gradients in 16 bits are added to sums in float32.
"""

from __future__ import annotations

from typing import Any

import torch.fx

from autopar.cost.cluster import Device
from autopar.cost.compute import accumulate_time
from autopar.cost.families import canonical_name, op_family, op_name
from autopar.cost.local_op import LocalOp, TensorSpec
from autopar.ir.graph import tensor_inputs, value_of

from .widening import widening

Node = torch.fx.Node


def sums_time(device: Device, node: Node, op: LocalOp, micro_batches: int) -> Any:
    """Seconds per micro-batch, on average, to add gradients of the parameters that an op reads.

    `op` is the op at its local sizes (numbers or arrays).
    """
    return share_that_adds(micro_batches) * sum_time(device, node, op) if micro_batches > 1 else 0.0


def sum_time(device: Device, node: Node, op: LocalOp) -> Any:
    """Seconds to add them once; sizes may be formulas, too."""
    given = [op.inputs[slot] for slot in parameter_slots(node)]
    return sum((accumulate_time(device, _passed_bytes(spec)) for spec in given), start=0.0)


def _passed_bytes(gradient: TensorSpec) -> Any:
    """A third of what is read and written to add a gradient; the sum may be wider than it."""
    wider = widening(gradient.dtype)
    return gradient.bytes * (3 + 2 * wider) / 3 if wider else gradient.bytes


def share_that_adds(micro_batches: Any) -> Any:
    """The share of the micro-batches whose gradients are added: all but the first."""
    return (micro_batches - 1) / micro_batches


def parameter_slots(node: Node) -> tuple[int, ...]:
    """Which tensor inputs of an op are parameters that want gradients, or views or casts of them.

    None of a view or a cast: the op that reads it makes the gradient.
    """
    if _passes_through(node):
        return ()
    return tuple(slot for slot, source in enumerate(tensor_inputs(node)) if _is_parameter(source))


def _is_parameter(node: Node) -> bool:
    while _passes_through(node):
        sources = tensor_inputs(node)
        if len(sources) != 1:
            return False
        node = sources[0]
    return node.meta.get("role") == "param" and value_of(node).requires_grad


def _passes_through(node: Node) -> bool:
    if node.op != "call_function":
        return False
    name = op_name(node.target)
    return op_family(name) == "view" or canonical_name(name) == "to"
