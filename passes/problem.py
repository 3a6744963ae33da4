"""What every candidate plan of a search shares: the graph at its sizes, its rules, its blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import sympy
import torch.fx

from autopar.cost.cluster import Cluster
from autopar.ir.graph import Graph, tensor_inputs, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import ShardingRule
from autopar.ir.sharding import Sharding

from .accounts import Regions, regions_of
from .blocks import Blocks, find_blocks
from .columns import passes_on
from .families import Factors, Family, batch_factors, expert_factors, sequence_factors
from .given import given_bytes
from .hints import keep_hinted
from .narrow_gathers import wear_casts
from .options import Option, call_options, param_options
from .price import Pricer
from .rules_of import rules_of
from .specialise import specialise

Node = torch.fx.Node


@dataclass(frozen=True)
class Problem:
    """A captured graph at the sizes of one (micro-)batch.

    `batch`, `sequence` and `expert` are the factors of every op's rule that are those dims;
    `symbolic` is the graph before its `symbols` were replaced.
    """

    graph: Graph
    rules: Mapping[str, ShardingRule]
    blocks: Blocks
    batch: Factors
    cluster: Cluster
    optimizer: str
    sequence: Factors = field(default_factory=dict)
    expert: Factors = field(default_factory=dict)
    symbolic: Graph | None = None
    symbols: Mapping[sympy.Symbol, int] = field(default_factory=dict)

    @cached_property
    def regions(self) -> Regions:
        return regions_of(self.graph, self.blocks)

    def given_bytes(self, micro_batches: int) -> float:
        """Bytes of a step's whole batch, of which this is one micro-batch, and of all buffers."""
        if self.symbolic is None:
            return 0.0
        return given_bytes(self.symbolic, self.symbols, micro_batches)

    def family(self, name: str, roles: Mapping[str, str]) -> Family:
        return Family(name, roles, self.batch, self.sequence, self.expert)


def problem_of(
    graph: Graph, symbols: Mapping[sympy.Symbol, int], cluster: Cluster, optimizer: str
) -> Problem:
    """The problem of a prepared graph for one size of every symbol."""
    made = replace(specialise(graph, symbols), spent=True)  # casts are marked in the same copy
    concrete = replace(wear_casts(made), spent=False)
    blocks = find_blocks(concrete)
    rules = rules_of(concrete, blocks.representative)
    return Problem(
        concrete,
        rules,
        blocks,
        batch_factors(concrete, rules, graph),
        cluster,
        optimizer,
        sequence_factors(concrete, rules, graph),
        expert_factors(concrete, rules, graph),
        graph,
        symbols,
    )


def options_of(
    problem: Problem, mesh: Mesh, pricer: Pricer, family: Family
) -> dict[Node, list[Option]]:
    """Options of every representative node on a mesh, priced."""
    options: dict[Node, list[Option]] = {}
    wanted: dict[Node, dict[Sharding, None]] = defaultdict(dict)
    stands_for = problem.blocks.representative
    for node in problem.graph.fx.nodes:
        if stands_for[node] is not node:
            continue
        if node.op == "output":
            wants = tuple(
                Sharding.replicated(v.rank) for s in tensor_inputs(node) for v in values_of(s)[:1]
            )
            options[node] = [Option((), wants, (), 0.0, 0.0)]
        elif node.op == "call_function" and not passes_on(node):
            rule = problem.rules[node.name]
            found = call_options(node, rule, mesh, pricer, family.allows)
            options[node] = keep_hinted(node, family.keeps(node, found))
    by_reader: dict[Node, list[set[Sharding]]] = defaultdict(list)
    for edge in problem.blocks.edges:
        if edge.producer.meta.get("role") == "param":
            asked = [option.wants[edge.slot] for option in options[stands_for[edge.consumer]]]
            wanted[stands_for[edge.producer]].update(dict.fromkeys(asked))
            by_reader[stands_for[edge.producer]].append(set(asked))
    for node in problem.graph.placeholders():
        if stands_for[node] is not node or not values_of(node):
            continue
        if node.meta["role"] == "param":
            found = keep_hinted(node, param_options(node, wanted[node], mesh, pricer))
            readable = [o for o in found if _is_read(o, by_reader[node], family.never_gather)]
            options[node] = family.keeps_stored(node, mesh, readable or found)
        else:
            whole = Sharding.replicated(values_of(node)[0].rank)
            options[node] = [Option((), (), (whole,), 0.0, 0.0)]
    return options


def _is_read(stored: Option, by_reader: list[set[Sharding]], axes: frozenset[str]) -> bool:
    """Whether all readers can take a parameter as it is stored on axes where none is gathered."""
    sharding = stored.gives[0]
    split = [(axis, dim) for axis in axes if (dim := sharding.dim_of(axis)) is not None]
    return all(
        any(want.dim_of(axis) == dim for want in wants)
        for axis, dim in split
        for wants in by_reader
    )
