"""Families of plans: what an axis may be used for, and which dims are batch, sequence, experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.fx

from autopar.ir.graph import Graph, Value, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import REPLICATE, Choice, ShardingRule

from .columns import passes_on, producer_of
from .options import Allowed, Option

Node = torch.fx.Node

# What each axis of a mesh may be used for, outermost first.
FAMILIES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "auto": (("any",), ("any", "any")),
    "data": (("data",),),
    "zero": (("zero",),),
    "tensor": (("tensor",),),
    "data+tensor": (("data", "tensor"),),
    "zero+tensor": (("zero", "tensor"),),
    "pipeline": (("stages",),),
    "pipeline+data": (("stages", "data"),),
    "pipeline+tensor": (("stages", "tensor"),),
}
PIPELINED = tuple(name for name, roles in FAMILIES.items() if roles[0][0] == "stages")


# Roles of three axes in the automatic search, outermost first, with the names of the axes.
THREE_AXES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("dp", "batch"), ("cp", "sequence"), ("tp", "feature")),
    (("dp", "batch"), ("ep", "expert"), ("tp", "feature")),
    (("dp", "batch"), ("fsdp", "batch"), ("tp", "feature")),
)

ROLE_OF = {name: role for roles in THREE_AXES for name, role in roles}

Factors = Mapping[Node, frozenset[str]]


@dataclass(frozen=True)
class Family:
    """Restrictions of one candidate: the role of every mesh axis.

    `any`: no restriction. `batch`, `sequence`: only those dims are split. `expert`: the batch or
    the dim of stacked experts. `feature`: anything but the batch.
    `data`: the batch is split wherever it can be, nothing else is, and parameters are whole.
    `zero`: the same, parameters stored sharded. `tensor`: anything but the batch may be split,
    parameters are never gathered, and every matrix that can be is split. `only`, where given,
    restricts the choices further.
    """

    name: str
    role: Mapping[str, str]
    batch: Factors
    sequence: Factors = field(default_factory=dict)
    expert: Factors = field(default_factory=dict)
    only: Allowed | None = None

    def allows(self, node: Node, axis: str, choice: Choice) -> bool:
        if self.only is not None and not self.only(node, axis, choice):
            return False
        role = self.role[axis]
        if role == "any" or not choice.factor:
            return True
        batch = self.batch.get(node, frozenset())
        on_batch = choice.factor in batch
        if role in ("data", "zero", "batch"):
            return on_batch
        if role == "sequence":
            return choice.factor in self.sequence.get(node, frozenset())
        if role == "expert":
            parts = set(choice.factor.split(">"))
            return parts <= batch | self.expert.get(node, frozenset())
        # A route `b>v` splits the batch, too.
        return choice.factor.split(">")[0] not in batch

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
    graph (`symbolic`, with the same node names) that dim 0 of an input has, else through dim 0, and
    follows the rules.
    """
    inputs = {n.name: n.meta["value"] for n in symbolic.placeholders("input")}
    shapes = [v.shape for v in inputs.values() if isinstance(v, Value) and v.shape]
    batch = {shape[0] for shape in shapes if not isinstance(shape[0], int)}
    starts: dict[tuple[Node, int], set[int]] = {}
    for node in graph.placeholders("input"):
        original = inputs.get(node.name)
        sizes = original.shape if isinstance(original, Value) else ()
        found = {d for d, size in enumerate(sizes) if not isinstance(size, int) and size in batch}
        starts[node, 0] = found or ({0} if values_of(node)[0].rank else set())
    return follow(graph, rules, starts)


def sequence_factors(
    graph: Graph, rules: Mapping[str, ShardingRule], symbolic: Graph
) -> dict[Node, frozenset[str]]:
    """Per op, the factors of its rule that are positions of the user's sequences.

    They enter through dim 1 of the inputs: of token ids `[batch, sequence]` and of embeddings
    `[batch, sequence, features]`; of other inputs where they have the same size.
    """
    starts: dict[tuple[Node, int], set[int]] = {}
    inputs = graph.placeholders("input")
    lengths = {
        value_of(n).int_shape()[1]
        for n in inputs
        if value_of(n).rank == (3 if value_of(n).dtype.is_floating_point else 2)
    }
    for node in inputs:
        shape = value_of(node).int_shape()
        if 2 <= len(shape) <= 3 and shape[1] in lengths:
            starts[node, 0] = {1}
    return follow(graph, rules, starts)


def expert_factors(
    graph: Graph, rules: Mapping[str, ShardingRule], symbolic: Graph
) -> dict[Node, frozenset[str]]:
    """Per op, the factors of its rule that count experts: dim 0 of parameters of three dims."""
    starts: dict[tuple[Node, int], set[int]] = {}
    for node in graph.placeholders("param"):
        if value_of(node).rank == 3 and value_of(node).requires_grad:
            starts[node, 0] = {0}
    if not starts:
        return {}
    found = follow(graph, rules, starts)
    # What carries experts forward is split where it is made, too: one step back from each reader.
    for node in reversed(list(graph.calls())):
        rule = rules.get(node.name)
        for i, source in enumerate(tensor_inputs(node)):
            producer, port = producer_of(source)
            if rule is None or producer not in found or not found.get(node):
                continue
            dims = {d for d, dim in enumerate(rule.inputs[i]) if dim and dim[0] in found[node]}
            made = rules[producer.name].outputs[port]
            found[producer] |= {made[d][0] for d in dims if made[d]}
    return found


def follow(
    graph: Graph,
    rules: Mapping[str, ShardingRule],
    starts: Mapping[tuple[Node, int], set[int]],
) -> dict[Node, frozenset[str]]:
    """Per op, the factors that the dims in `starts` ((placeholder, 0) -> dims) become.

    A dim is followed through the major factor of every dim that it is in.
    """
    dims = {key: set(found) for key, found in starts.items()}
    factors: dict[Node, frozenset[str]] = {}
    for node in graph.calls():
        if passes_on(node):
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
