"""Which outputs of an op autograd keeps for the op alone: what a reader keeps is one tensor."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch.fx

from autopar.cost.compute import local_op
from autopar.cost.families import op_family, op_name
from autopar.cost.memory import saved
from autopar.ir.graph import tensor_inputs, values_of

Node = torch.fx.Node


def own_outputs(node: Node) -> tuple[int, ...]:
    """The outputs that the backward of an op reads and that of none of its readers.

    Those of both (of `relu` before a product, say) are counted where they are read.
    """
    if not any(v.requires_grad for v in values_of(node)):
        return ()
    kept = saved(local_op(node)).outputs
    if not kept:
        return ()
    of_readers = set(_kept_by_readers(node))
    return tuple(port for port in kept if port not in of_readers)


def _kept_by_readers(node: Node) -> Iterator[int]:
    for user in node.users:
        if user.target is operator.getitem:
            port = user.args[1]
            assert isinstance(port, int)
            if any(_keeps(reader, user) for reader in user.users):
                yield port
        elif _keeps(user, node):
            yield 0


def _keeps(reader: Node, value: Node) -> bool:
    if reader.op != "call_function" or not any(v.requires_grad for v in values_of(reader)):
        return False
    if op_family(op_name(reader.target)) == "view":  # on the same memory
        return any(_keeps(user, reader) for user in reader.users)
    slots = saved(local_op(reader)).inputs
    return any(i in slots and source is value for i, source in enumerate(tensor_inputs(reader)))
