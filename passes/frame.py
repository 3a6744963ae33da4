"""A programme without prices for all meshes with the same axes, and its prices on each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import sympy
import torch.fx
from numpy.typing import NDArray

from autopar.cost.cluster import Cluster, make_mesh
from autopar.ir.graph import values_of
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding

from .accounts import FULL, NONE, SELECTIVE, Regions, is_heavy, overlap_of
from .columns import Columns, Edge, Flow, build_columns, copies_of, reading_patterns, times_read
from .grid import Grid, GridPricer, Layouts, OptionPrices
from .kept import own_outputs
from .moves import MovePrices, Moves, Ways, moves_of, price_moves
from .options import Option
from .price import Pricer
from .priced_columns import PricedColumns, copies_kept, priceable
from .problem import Problem, options_of
from .variant import ILLEGAL_S, Prices, Variant

__all__ = ["ILLEGAL_S", "Frame", "Priced", "Prices", "Table", "Variant", "build_frame"]

Node = torch.fx.Node
Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

LARGER = 1.6  # most reshards in columns that are used again, over those that are needed


@dataclass(frozen=True)
class Priced:
    """Prices of one micro-batch, before a variant says how often each is paid.

    The arrays are those of all nodes, one after the other: [options, meshes].
    """

    pricer: GridPricer
    options: Mapping[Node, OptionPrices]
    forward_s: Array
    backward_s: Array
    kept_bytes: Array
    made_bytes: Array
    legal: Flags
    moves: Moves

    @cached_property
    def value_bytes(self) -> Array:
        return np.array([self.pricer.whole_bytes(*value) for value in self.moves.values])

    @cached_property
    def moved(self) -> MovePrices:
        return price_moves(self.moves, self.pricer.grid, self.value_bytes)


@dataclass(frozen=True)
class Table:
    """Prices of the frame's options on some meshes, [options, meshes].

    `least_s` is, per mesh, what the cheapest options take: no step is faster.
    """

    meshes: tuple[Mesh, ...]
    priced: Priced
    variant: Variant
    overlap: Array
    cost: Array
    memory: Array
    least_s: Array
    least_bytes: Array


@dataclass(frozen=True)
class _Built:
    """Columns, and which options and uses of the frame are in them."""

    options: Flags
    uses: Flags
    columns: PricedColumns


@dataclass(frozen=True)
class Frame:
    """Options for meshes with the axes `roles` (name -> role), outermost first."""

    problem: Problem
    roles: Mapping[str, str]
    reference: Mesh
    options: Mapping[Node, Sequence[Option]]
    regions: Regions
    count: Mapping[Node, int]
    patterns: Mapping[frozenset[Edge], int]
    shrinks: Callable[[Sharding, Sharding], bool]
    saves: Callable[[Node, int], bool]
    ways: Ways = field(default_factory=dict)
    layouts: dict[Node, Layouts] = field(init=False, default_factory=dict)
    built: dict[bool, _Built] = field(init=False, default_factory=dict)

    @cached_property
    def is_empty(self) -> bool:
        """Whether the user's hints leave some node nothing to do with these roles."""
        return not all(self.options.values())

    @cached_property
    def symbolic(self) -> Mapping[str, object]:
        graph = self.problem.symbolic or self.problem.graph
        return {node.name: node.meta.get("value") for node in graph.fx.nodes}

    @cached_property
    def moves(self) -> Moves:
        return moves_of(times_read(self.patterns), self.options, self.reference, self.ways)

    @cached_property
    def number(self) -> Mapping[Node, Ints]:
        """The numbers of every node's options among all."""
        found, at = {}, 0
        for node, options in self.options.items():
            found[node] = np.arange(at, at + len(options))
            at += len(options)
        return found

    @cached_property
    def starts(self) -> Ints:
        return np.array([numbers[0] for numbers in self.number.values()], dtype=np.int64)

    @cached_property
    def twins(self) -> Mapping[Node, Node]:
        """The first op that has the same prices, of every op: it does the same, of equal types."""
        first: dict[object, Node] = {}
        found: dict[Node, Node] = {}
        for node, options in self.options.items():
            if node.op == "call_function":
                static = torch.fx.map_arg((node.args, node.kwargs), self._typed)
                readers = sum(1 for user in node.users if user.op == "call_function")
                listed = tuple((o.choices, o.wants, o.gives) for o in options)
                rule = self.problem.rules[node.name]
                does = (node.target, str(static), self._typed(node), str(rule))
                key = (*does, own_outputs(node), readers, listed)
                found[node] = first.setdefault(key, node)
        return found

    def _typed(self, node: Node) -> str:
        """What a value is to an op that reads or makes it, at any size."""
        types = [(v.dtype, v.requires_grad) for v in values_of(node)]
        shapes = [v.shape for v in values_of(node)]
        role = node.meta.get("role", "") if node.op == "placeholder" else ""
        return f"{node.op} {role} {types} {shapes} {self.symbolic.get(node.name)}"

    def priced(
        self,
        meshes: Sequence[Mesh],
        cluster: Cluster,
        symbols: Mapping[sympy.Symbol, int],
    ) -> Priced:
        """Prices of all options on some meshes; `symbols` are the sizes of one micro-batch."""
        problem = self.problem
        grid = Grid(cluster, tuple(meshes), symbols)
        pricer = GridPricer(grid, self.symbolic, problem.symbols, problem.optimizer, self.layouts)
        options: dict[Node, OptionPrices] = {}
        for node, listed in self.options.items():
            if node.op == "placeholder":
                options[node] = pricer.stored(node, listed)
            elif node.op != "output":
                first = self.twins[node]
                options[node] = (
                    pricer.call(node, problem.rules[node.name], listed)
                    if first is node
                    else options[first]
                )
        nothing = np.zeros((1, len(grid)))
        free = OptionPrices(
            nothing, nothing, nothing, nothing, np.ones((1, len(grid)), dtype=np.bool_)
        )
        all_ = [options.get(node, free) for node in self.options]
        return Priced(
            pricer,
            options,
            np.concatenate([p.forward_s for p in all_]),
            np.concatenate([p.backward_s for p in all_]),
            np.concatenate([p.kept_bytes for p in all_]),
            np.concatenate([p.made_bytes for p in all_]),
            np.concatenate([p.legal for p in all_]),
            self.moves,
        )

    def table(self, priced: Priced, variant: Variant) -> Table:
        """What the options cost in a step of a variant."""
        grid, often = priced.pricer.grid, self._often(variant)
        cost = often.forward * priced.forward_s + often.backward * priced.backward_s
        memory = often.kept * priced.kept_bytes + often.made * priced.made_bytes
        cost[~priced.legal] = ILLEGAL_S
        least_s = np.minimum.reduceat(cost, self.starts, axis=0).sum(axis=0)
        legal = np.where(priced.legal, memory, np.inf)
        least_bytes = np.minimum.reduceat(legal, self.starts, axis=0).sum(axis=0)
        least_bytes += self._least_saved(priced.pricer, variant)
        overlap = np.array([overlap_of(grid.cluster, mesh) for mesh in grid.meshes])
        return Table(grid.meshes, priced, variant, overlap, cost, memory, least_s, least_bytes)

    @cached_property
    def saved_values(self) -> list[tuple[Flow, int, frozenset[tuple[str, ...]]]]:
        """Activations that are kept: (as a flow, how often, axes that may split what is kept)."""
        found = []
        for pattern, times in self.patterns.items():
            saving = [e for e in pattern if self.saves(e.consumer, e.slot)]
            if not saving or saving[0].producer.op == "placeholder":
                continue
            wants = {o.wants[e.slot] for e in saving for o in self.options[e.consumer]}
            axes = frozenset(tuple(sorted(a for s in w.splits for a in s.axes)) for w in wants)
            first, any_want = saving[0], next(iter(wants))
            # Not what is wanted as it is given: that may be kept with its producer already.
            flow = Flow(first.producer, first.port, any_want, any_want, False, tuple(pattern), True)
            found.append((flow, times, axes))
        return found

    def _least_saved(self, pricer: GridPricer, variant: Variant) -> Array:
        """Bytes of saved inputs if each is split as much as any reader allows."""
        total = np.zeros(len(pricer.grid))
        for flow, times, axes in self.saved_values:
            copies = copies_kept(self.regions, flow, times, variant)
            if copies:
                most = np.max([pricer.grid.product(a) for a in axes], axis=0)
                total += copies * pricer.whole_bytes(flow.producer, flow.port) / most
        return total

    def programme(self, table: Table, within_s: float) -> tuple[Columns, Prices] | None:
        """Columns of what a step below `within_s` seconds can contain on some mesh of the table.

        None where a node or an edge has nothing left. Columns that were built before are used
        again where all that is needed is in them.
        """
        variant, moves = table.variant, self.moves
        slack = within_s - table.least_s
        least = np.minimum.reduceat(table.cost, self.starts, axis=0)
        sizes = np.diff(np.append(self.starts, len(table.cost)))
        above = table.cost - np.repeat(least, sizes, axis=0)
        reach: Flags = np.any((above <= slack) & (table.cost < ILLEGAL_S), axis=1)
        if not np.logical_or.reduceat(reach, self.starts).all():
            return None
        kept = {node: np.flatnonzero(reach[numbers]) for node, numbers in self.number.items()}
        hidden_s = table.overlap.max() * within_s if table.overlap.any() else 0.0
        uses = moves.within(kept, table.priced.moved, variant.micro_batches, slack, hidden_s)
        built = self._columns(reach, uses, variant.micro_batches > 1)
        if built is None:
            return None
        return built.columns, built.prices(
            table.cost,
            table.memory,
            table.priced.moved,
            table.priced.value_bytes,
            table.priced.pricer.grid,
            variant,
            table.overlap,
        )

    def _columns(self, reach: Flags, uses: Flags, several: bool) -> PricedColumns | None:
        """Columns with the options and uses; `several` micro-batches keep parameters gathered."""
        before = self.built.get(several)
        if before is not None:
            covers = not (reach & ~before.options).any() and not (uses & ~before.uses).any()
            if covers and before.uses.sum() <= LARGER * uses.sum():
                return before.columns
            both = uses | before.uses
            if both.sum() <= LARGER * uses.sum():
                reach, uses = reach | before.options, both
        kept = {node: np.flatnonzero(reach[numbers]) for node, numbers in self.number.items()}
        options = {
            node: [self.options[node][i] for i in found.tolist()] for node, found in kept.items()
        }
        edges = self.moves.edges
        allowed = np.append(uses, False)  # the last stands for what is no use at all

        def admits(edge: Edge, source: Sharding, want: Sharding, regather: bool) -> bool:
            return bool(allowed[edges[edge].use(source, want, regather)])

        def holds(edge: Edge) -> bool:
            if several and edge.producer.meta.get("role") == "param":
                return True
            return self.saves(edge.consumer, edge.slot)

        columns = build_columns(self.patterns, options, self.count, admits, self.shrinks, holds)
        if columns is None:
            return None
        numbers = {node: self.number[node][found] for node, found in kept.items()}
        made = priceable(columns, self.regions, self.moves, numbers)
        self.built[several] = _Built(reach, uses, made)
        return made

    def _often(self, variant: Variant) -> _Often:
        """How often the prices of every option are paid, as `Accounts` says."""
        k, mode, held = variant.micro_batches, variant.mode, variant.in_flight
        rows: list[tuple[float, float, float, float]] = []
        for node, options in self.options.items():
            count = self.count[node]
            if node.op == "output":
                row = (0.0, 0.0, 0.0, 0.0)
            elif node.op == "placeholder":
                row = (0.0, count, count, 0.0)
            else:
                inside = self.regions.block(node) >= 0 and mode != NONE
                heavy = mode == SELECTIVE and is_heavy(node)
                again = inside and (mode == FULL or not heavy)
                kept = count if heavy else self.regions.leaving.get(node, 0)
                memory = (1.0, held * kept) if inside else (held * count, 0.0)
                row = (count * k * (1 + again), count * k, *memory)
            rows += [row] * len(options)
        return _Often(*np.array(rows, dtype=np.float64).T[:, :, None])


@dataclass(frozen=True)
class _Often:
    """Per option, [options, 1]: how often its forward, its backward, and its bytes count."""

    forward: Array
    backward: Array
    kept: Array
    made: Array


def build_frame(
    problem: Problem, roles: Mapping[str, str], family: str = "auto", ways: Ways | None = None
) -> Frame:
    """The frame of a problem for axes with roles; made on a mesh whose axes have size two.

    `ways` are what other frames with axes of these names know of resharding, and learn.
    """
    cluster = problem.cluster
    small = cluster.resized(*_least_hosts(cluster, 2 ** len(roles)))
    reference = make_mesh(small, dict.fromkeys(roles, 2))
    pricer = Pricer(small, reference, problem.optimizer)
    found = options_of(problem, reference, pricer, problem.family(family, roles))
    one: dict[Sharding, Sharding] = {}  # equal shardings are one object: comparing them is cheap
    options = {
        node: [
            replace(
                o,
                wants=tuple(one.setdefault(s, s) for s in o.wants),
                gives=tuple(one.setdefault(s, s) for s in o.gives),
            )
            for o in listed
        ]
        for node, listed in found.items()
    }
    return Frame(
        problem,
        roles,
        reference,
        options,
        problem.regions,
        copies_of(problem.graph, problem.blocks, options),
        reading_patterns(problem.graph, problem.blocks),
        pricer.shrinks,
        pricer.saves_input,
        {} if ways is None else ways,
    )


def _least_hosts(cluster: Cluster, devices: int) -> tuple[int, int]:
    """(devices per host, hosts) of a part of the cluster with at least so many devices."""
    if cluster.host_size >= devices or len(cluster.levels) == 1:
        return max(devices, cluster.host_size), 1
    return cluster.host_size, -(-devices // cluster.host_size)
