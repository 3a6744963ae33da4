"""Which parameters travel in the lower precision that they are used in.

Under autocast a parameter is cast for its reader. A cast commutes with a gather: it runs on the
shard that is stored (`cast_before_gather`), and what is gathered, and what is reduced of its
gradient, has the cast's dtype. For the planner the two are one parameter: its readers read it, and
it travels as its cast.
"""

from __future__ import annotations

import torch
import torch.fx

from autopar.ir.graph import Graph, Value, tensor_inputs, value_of, values_of
from autopar.ir.hint import MARK

from .edges import WORN

Node = torch.fx.Node


def is_narrowing_cast(node: Node) -> bool:
    """Whether a call does nothing but round a floating point parameter to a narrower dtype."""
    if node.target is not torch.ops.aten._to_copy.default or set(node.kwargs) != {"dtype"}:
        return False
    (source,) = tensor_inputs(node)
    before, after = value_of(source).dtype, value_of(node).dtype
    return (
        source.op == "placeholder"
        and source.meta["role"] == "param"
        and before.is_floating_point
        and after.is_floating_point
        and after.itemsize < before.itemsize
    )


def wear_casts(graph: Graph) -> Graph:
    """Mark the casts that the planner takes as part of their parameters.

    Those that alone read their parameter and have one reader: wherever the parameter is stored in
    more pieces than that reader wants, `cast_before_gather` moves them. To be planned, not lowered.
    """
    new = graph.copy()
    for parameter in new.placeholders("param"):
        (only, *others) = [*parameter.users] or [parameter]
        if not others and only is not parameter and _is_worn(parameter, only):
            only.meta[WORN] = True
    return new


def travelling(node: Node) -> Node:
    """The node whose value moves where a value is resharded: of a parameter, its cast if it has."""
    if node.op != "placeholder" or len(node.users) != 1:
        return node
    (only,) = node.users
    return only if only.meta.get(WORN) else node


def travelling_value(node: Node, port: int) -> Value:
    """The value that moves where an output of a node is resharded."""
    return values_of(travelling(node))[port]


def is_narrow(node: Node) -> bool:
    """Whether a parameter travels in a lower precision than it is stored in."""
    return travelling(node) is not node


def summed(node: Node, regather: bool) -> Node:
    """The node whose gradients are added up over micro-batches.

    What is gathered once per step is a leaf of them; else the stored shard is.
    """
    return node if regather else travelling(node)


def _is_worn(parameter: Node, cast: Node) -> bool:
    if cast.op != "call_function" or not is_narrowing_cast(cast) or len(cast.users) != 1:
        return False
    (reader,) = cast.users
    if reader.op != "call_function" or tensor_inputs(reader).count(cast) != 1:
        return False
    return MARK not in cast.meta and MARK not in parameter.meta
