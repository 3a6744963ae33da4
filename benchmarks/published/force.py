"""Force the plan of a published run on the planner: a role per mesh axis, the rest is solved.

The only file here that speaks to the planner's search interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx

from autopar.errors import UserError
from autopar.ir.graph import Graph, tensor_inputs, value_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import REPLICATE, Choice, ShardingRule
from autopar.passes.blocks import Blocks
from autopar.passes.options import Option
from autopar.passes.price import Pricer
from autopar.passes.problem import Problem, options_of
from autopar.passes.programme import is_getitem, producer_of, solve
from autopar.passes.search import USABLE_MEMORY

__all__ = ["USABLE_MEMORY", "Axes", "Forced", "Solved", "axes_of", "solve_forced"]

Node = torch.fx.Node
Factors = Mapping[Node, frozenset[str]]


@dataclass(frozen=True)
class Axes:
    """Factors of every op's rule that are the batch, the sequence and the residual's features."""

    batch: Factors
    sequence: Factors
    features: Factors


def axes_of(graph: Graph, rules: Mapping[str, ShardingRule]) -> Axes:
    """Follow the dims of token ids, and the features of their embedding, through a decoder."""
    inputs = [(node, 0) for node in graph.placeholders("input")]
    embedded = [
        (node, 0) for node in graph.calls() if "embedding" in str(node.target).split(".")[-2:][0]
    ]
    return Axes(
        _reach(graph, rules, dict.fromkeys(inputs, 0)),
        _reach(graph, rules, dict.fromkeys(inputs, 1)),
        _reach(graph, rules, dict.fromkeys(embedded, 2)),
    )


def _reach(
    graph: Graph, rules: Mapping[str, ShardingRule], seeds: Mapping[tuple[Node, int], int]
) -> dict[Node, frozenset[str]]:
    """Factors that a dim of some values becomes, forwards and backwards, to a fixed point."""
    dims: dict[tuple[Node, int], set[int]] = {place: {dim} for place, dim in seeds.items()}
    found: dict[Node, frozenset[str]] = {}
    calls = [node for node in graph.calls() if not is_getitem(node)]
    while True:
        before = sum(map(len, dims.values()))
        for node in (*calls, *reversed(calls)):
            rule = rules[node.name]
            places = [producer_of(source) for source in tensor_inputs(node)]
            places += [(node, port) for port in range(len(rule.outputs))]
            tensors = [*rule.inputs, *rule.outputs]
            met = {
                tensor[d][0]
                for place, tensor in zip(places, tensors, strict=True)
                for d in dims.get(place, ())
                if d < len(tensor) and tensor[d]
            }
            found[node] = frozenset(met)
            for (producer, port), tensor in zip(places, tensors, strict=True):
                if producer.meta.get("role") in ("param", "buffer"):
                    continue
                hit = {d for d, dim in enumerate(tensor) if dim and dim[0] in met}
                dims.setdefault((producer, port), set()).update(hit)
        if sum(map(len, dims.values())) == before:
            return found


@dataclass(frozen=True)
class Forced:
    """A restriction in the manner of `passes.families.Family`: the role of every mesh axis.

    `data` splits the batch, `context` the sequence, wherever they can be; parameters are whole on
    them, or stored split where the axis is in `sharded` (gathered anew in the backward if
    `regather`). `tensor` splits what is neither; with `sequence_parallel` also the sequence.
    """

    role: Mapping[str, str]
    axes: Axes
    sharded: frozenset[str] = frozenset()
    regather: bool = True
    sequence_parallel: bool = True

    def allows(self, node: Node, axis: str, choice: Choice) -> bool:
        if not choice.factor:
            return True
        role = self.role[axis]
        if role == "data":
            return choice.factor in self.axes.batch.get(node, ())
        if role == "context":
            return choice.factor in self.axes.sequence.get(node, ())
        if choice.factor in self.axes.batch.get(node, ()):
            return False
        if choice.factor in self.axes.sequence.get(node, ()):
            return self.sequence_parallel
        return choice.factor not in self.axes.features.get(node, ())

    def keeps(self, node: Node, options: list[Option]) -> list[Option]:
        """The options that split the batch or the sequence on the axes that are for it."""
        for axis, role in self.role.items():
            if role in ("data", "context"):
                split = [o for o in options if dict(o.choices).get(axis, REPLICATE).factor]
                options = split or options
        return options

    def keeps_stored(self, node: Node, mesh: Mesh, options: list[Option]) -> list[Option]:
        """The ways to store a parameter that the plan is for."""
        value = value_of(node)
        for axis, role in self.role.items():
            split = [o for o in options if o.gives[0].dim_of(axis) is not None]
            if role == "tensor":  # as its readers split it: it is never gathered
                continue
            if axis in self.sharded and value.requires_grad:
                again = [o for o in split if o.regather == self.regather]
                options = again or split or options
            else:
                options = [o for o in options if o not in split] or options
        return options

    @property
    def never_gather(self) -> frozenset[str]:
        return frozenset(axis for axis, role in self.role.items() if role == "tensor")


@dataclass(frozen=True)
class Solved:
    """A forced plan: the chosen option of every node."""

    graph: Graph
    blocks: Blocks
    option: Mapping[Node, Option]


def solve_forced(
    graph: Graph,
    rules: Mapping[str, ShardingRule],
    blocks: Blocks,
    forced: Forced,
    pricer: Pricer,
) -> Solved:
    """The fastest assignment that the roles allow, whatever memory it takes.

    Raises UserError where the roles leave nothing (a dim that does not divide, say).
    """
    problem = Problem(graph, rules, blocks, forced.axes.batch, pricer.cluster, pricer.optimizer)
    options = options_of(problem, pricer.mesh, pricer, forced)  # type: ignore[arg-type]
    found = solve(graph, blocks, options, pricer, float("inf"))
    if found is None:
        raise UserError(
            f"no assignment has the roles {dict(forced.role)} on {pricer.mesh}",
            fix="check that the model's sizes divide by the axes'",
        )
    return Solved(graph, blocks, found.option)
