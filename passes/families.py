"""Families of plans: what an axis may be used for, and which dims are the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx

from autopar.ir.graph import Graph, Value, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import REPLICATE, Choice, ShardingRule

from .options import Option
from .programme import is_getitem, producer_of

Node = torch.fx.Node

# What each axis of a mesh may be used for, outermost first.
FAMILIES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "auto": (("any",), ("any", "any")),
    "data": (("data",),),
    "zero": (("zero",),),
    "tensor": (("tensor",),),
    "data+tensor": (("data", "tensor"),),
    "zero+tensor": (("zero", "tensor"),),
}


@dataclass(frozen=True)
class Family:
    """Restrictions of one candidate: the role of every mesh axis.

    `any`: no restriction. `data`: the batch is split wherever it can be, nothing else is, and
    parameters are whole. `zero`: the same, parameters stored sharded. `tensor`: anything but the
    batch may be split, parameters are never gathered, and every matrix that can be is split.
    """

    name: str
    role: Mapping[str, str]
    batch: Mapping[Node, frozenset[str]]

    def allows(self, node: Node, axis: str, choice: Choice) -> bool:
        role = self.role[axis]
        if role == "any" or not choice.factor:
            return True
        on_batch = choice.factor in self.batch.get(node, frozenset())
        return on_batch if role in ("data", "zero") else not on_batch

    def keeps(self, node: Node, options: list[Option]) -> list[Option]:
        """The options of an op that do what the family is for, if there are any."""
        for axis, role in self.role.items():
            if role in ("data", "zero") and self.batch.get(node):
                split = [o for o in options if dict(o.choices).get(axis, REPLICATE).factor]
                options = split or options
        return options

    def keeps_stored(self, node: Node, mesh: Mesh, options: list[Option]) -> list[Option]:
        """The ways to store a parameter that the family is for."""
        value = value_of(node)
        # What shares a dim with another axis can only be gathered together with it.
        options = [o for o in options if not self._is_tied(o)] or options
        for axis, role in self.role.items():
            split = [o for o in options if o.gives[0].dim_of(axis) is not None]
            if role == "data":
                options = [o for o in options if o not in split]
            elif role == "zero" and value.requires_grad:
                options = [o for o in split if o.regather] or options
            elif role == "tensor" and value.requires_grad and value.rank > 1:
                options = split or options
        return options

    def _is_tied(self, option: Option) -> bool:
        return any(
            len(split.axes) > 1 and not self.never_gather.isdisjoint(split.axes)
            for split in option.gives[0].splits
        )

    @property
    def never_gather(self) -> frozenset[str]:
        return frozenset(axis for axis, role in self.role.items() if role == "tensor")


def batch_factors(
    graph: Graph, rules: Mapping[str, ShardingRule], symbolic: Graph
) -> dict[Node, frozenset[str]]:
    """Per op, the factors of its rule that are the user's batch.

    The batch enters through the dims of the user's inputs whose size is a symbol of the captured
    graph (`symbolic`, with the same node names), else through dim 0, and follows the rules.
    """
    dims: dict[tuple[Node, int], set[int]] = {}
    symbols = {n.name: n.meta["value"] for n in symbolic.placeholders("input")}
    for node in graph.placeholders("input"):
        original = symbols.get(node.name)
        sizes = original.shape if isinstance(original, Value) else ()
        found = {d for d, size in enumerate(sizes) if not isinstance(size, int)}
        rank = values_of(node)[0].rank
        dims[node, 0] = found or ({0} if rank else set())
    factors: dict[Node, frozenset[str]] = {}
    for node in graph.calls():
        if is_getitem(node):
            continue
        rule = rules[node.name]
        tainted = {
            rule.inputs[i][d][0]
            for i, source in enumerate(tensor_inputs(node))
            for d in dims.get(producer_of(source), ())
            if rule.inputs[i][d]
        }
        factors[node] = frozenset(tainted)
        for port, tensor in enumerate(rule.outputs):
            dims[node, port] = {d for d, dim in enumerate(tensor) if dim and dim[0] in tainted}
    return factors
