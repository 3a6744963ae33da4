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
from autopar.ir.hint import MARK, may_reshard
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding

from .accounts import FULL, NONE, SELECTIVE, Regions, is_heavy, overlap_of
from .columns import Columns, Edge, Flow, build_columns, copies_of, reading_patterns, times_read
from .grid import Grid, GridPricer, Layouts, OptionPrices, Reshard, ReshardPrices, Way
from .options import Option
from .price import Pricer
from .problem import Problem, options_of

Node = torch.fx.Node
Array = NDArray[np.float64]

ILLEGAL_S = 1e6  # seconds: what no step takes


@dataclass(frozen=True)
class Variant:
    """How a step is run: micro-batches, and what repeated blocks recompute.

    `in_flight` is how many micro-batches' activations are kept at once (a pipeline's).
    """

    micro_batches: int = 1
    mode: str = NONE
    in_flight: int = 1


@dataclass(frozen=True)
class Prices:
    """Prices of columns, [columns, meshes]: seconds that block, overlap, or hide that; bytes."""

    cost: Array
    late: Array
    hides: Array
    memory: Array

    def weighed(self, at: int | slice, late: float, memory: float) -> Array:
        """Lagrangian costs with a weight of the exposed time and one per byte."""
        made = self.cost[:, at] + late * (self.late[:, at] - self.hides[:, at])
        return made + memory * self.memory[:, at] if memory else made


@dataclass(frozen=True)
class Priced:
    """Prices of one micro-batch, before a variant says how often each is paid."""

    pricer: GridPricer
    options: Mapping[Node, OptionPrices]


@dataclass(frozen=True)
class Table:
    """Prices of the options of every node on some meshes: [options, meshes] arrays per node.

    `least_s` is, per mesh, what the cheapest options take: no step is faster.
    """

    meshes: tuple[Mesh, ...]
    pricer: GridPricer
    variant: Variant
    overlap: float
    cost: Mapping[Node, Array]
    memory: Mapping[Node, Array]
    least_s: Array
    least_bytes: Array


@dataclass(frozen=True)
class Frame:
    """Options for meshes with the axes `roles` (name -> role), outermost first."""

    problem: Problem
    roles: Mapping[str, str]
    options: Mapping[Node, Sequence[Option]]
    regions: Regions
    count: Mapping[Node, int]
    patterns: Mapping[frozenset[Edge], int]
    shrinks: Callable[[Sharding, Sharding], bool]
    saves: Callable[[Node, int], bool]
    ways: dict[tuple[Sharding, Sharding], Way | None] = field(default_factory=dict)
    layouts: dict[Node, Layouts] = field(default_factory=dict)

    @cached_property
    def is_empty(self) -> bool:
        """Whether the user's hints leave some node nothing to do with these roles."""
        return not all(self.options.values())

    @cached_property
    def symbolic(self) -> Mapping[str, object]:
        graph = self.problem.symbolic or self.problem.graph
        return {node.name: node.meta.get("value") for node in graph.fx.nodes}

    @cached_property
    def times_read(self) -> Mapping[Edge, int]:
        return times_read(self.patterns)

    def priced(
        self, meshes: Sequence[Mesh], cluster: Cluster, symbols: Mapping[sympy.Symbol, int]
    ) -> Priced:
        """Prices of all options on some meshes; `symbols` are the sizes of one micro-batch."""
        problem = self.problem
        pricer = GridPricer(
            Grid(cluster, tuple(meshes), symbols),
            self.symbolic,
            problem.symbols,
            problem.optimizer,
            self.ways,
            self.layouts,
        )
        options = {
            node: pricer.stored(node, listed)
            if node.op == "placeholder"
            else pricer.call(node, problem.rules[node.name], listed)
            for node, listed in self.options.items()
            if node.op != "output"
        }
        return Priced(pricer, options)

    def table(self, priced: Priced, variant: Variant) -> Table:
        """What the options cost in a step of a variant."""
        k, grid = variant.micro_batches, priced.pricer.grid
        cost: dict[Node, Array] = {}
        memory: dict[Node, Array] = {}
        least_s, least_bytes = np.zeros(len(grid)), np.zeros(len(grid))
        for node, options in self.options.items():
            if node.op == "output":
                cost[node] = memory[node] = np.zeros((len(options), len(grid)))
                continue
            count, found = self.count[node], priced.options[node]
            if node.op == "placeholder":
                cost[node], memory[node] = count * found.backward_s, count * found.kept_bytes
            else:
                again = self._again(node, variant.mode)
                once = (1 + again) * found.forward_s + found.backward_s
                cost[node] = count * k * once
                memory[node] = self._kept(node, found, count, variant)
            cost[node][~found.legal] = ILLEGAL_S
            least_s += cost[node].min(axis=0)
            least_bytes += np.where(found.legal, memory[node], np.inf).min(axis=0)
        least_bytes += self._least_saved(priced.pricer, variant)
        overlap = overlap_of(grid.cluster)
        return Table(
            grid.meshes, priced.pricer, variant, overlap, cost, memory, least_s, least_bytes
        )

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
            copies = self._copies(flow, times, variant)
            if copies:
                most = np.max([pricer.grid.product(a) for a in axes], axis=0)
                total += copies * pricer.whole_bytes(flow.producer, flow.port) / most
        return total

    def programme(self, table: Table, within_s: float) -> tuple[Columns, Prices] | None:
        """Columns of what a step below `within_s` seconds can contain on some mesh of the table.

        None where a node or an edge has nothing left.
        """
        slack = within_s - table.least_s
        kept: dict[Node, list[int]] = {}
        for node, cost in table.cost.items():
            reach = ((cost - cost.min(axis=0)) <= slack) & (cost < ILLEGAL_S)
            kept[node] = list(np.flatnonzero(reach.any(axis=1)))
            if not kept[node]:
                return None
        options = {node: [self.options[node][i] for i in found] for node, found in kept.items()}
        priced, within = self._reshards(table, options, slack, within_s)

        def admits(edge: Edge, source: Sharding, want: Sharding, regather: bool) -> bool:
            key = table.pricer.reshard(edge.producer, edge.port, source, want)
            return (edge, key, regather) in within

        def holds(edge: Edge) -> bool:
            if table.variant.micro_batches > 1 and edge.producer.meta.get("role") == "param":
                return True
            return self.saves(edge.consumer, edge.slot)

        columns = build_columns(self.patterns, options, self.count, admits, self.shrinks, holds)
        if columns is None:
            return None
        return columns, self._prices(table, columns, kept, priced)

    def _reshards(
        self,
        table: Table,
        options: Mapping[Node, Sequence[Option]],
        slack: Array,
        within_s: float,
    ) -> tuple[ReshardPrices, set[tuple[Edge, Reshard, bool]]]:
        """Prices of every reshard between what producers give and readers want.

        And which edges can afford which, on some mesh, in a step within `within_s`.
        """
        uses: list[tuple[Edge, Reshard, bool]] = []
        pricer = table.pricer
        for edge in self.times_read:
            hints = edge.producer.meta.get(MARK, ())
            gives = {(o.gives[edge.port], o.regather) for o in options[edge.producer]}
            wants = {o.wants[edge.slot] for o in options[edge.consumer]}
            for source, regather in gives:
                for want in wants:
                    if hints and not may_reshard(hints, source, want):
                        continue
                    if pricer.way(source, want) is not None:
                        key = pricer.reshard(edge.producer, edge.port, source, want)
                        uses.append((edge, key, regather))
        priced = pricer.reshards(dict.fromkeys(key for _, key, _ in uses))
        rows = np.array([priced.row[key] for _, key, _ in uses], dtype=np.int64)
        times = np.array([self.times_read[edge] for edge, _, _ in uses], dtype=np.float64)
        again = np.array([float(regather) for _, _, regather in uses])
        late = np.array([float(key.late) for _, key, _ in uses])
        k, hidden = table.variant.micro_batches, table.overlap * within_s if table.overlap else 0.0
        once = (priced.forward_s + priced.backward_s)[rows] + again[:, None] * priced.gather_s[rows]
        often = times * np.where((late > 0) & (again == 0), 1, k)
        room = slack[None, :] + np.where(late > 0, hidden, 0.0)[:, None]
        fits = np.any(often[:, None] * once <= room, axis=1)
        return priced, {use for use, ok in zip(uses, fits.tolist(), strict=True) if ok}

    def _seconds(self, table: Table, flow: Flow, key: Reshard, priced: ReshardPrices) -> Array:
        """Seconds per step of one reshard, as `Accounts.flow_time_s`."""
        k, at = table.variant.micro_batches, priced.row[key]
        once: Array = priced.forward_s[at] + priced.backward_s[at]
        if key.late:
            return k * (once + priced.gather_s[at]) if flow.regather else once
        inside = any(self.regions.block(e.consumer) >= 0 for e in flow.readers)
        if inside and table.variant.mode == FULL:
            once = once + priced.forward_s[at]
        return k * once

    def _prices(
        self,
        table: Table,
        columns: Columns,
        kept: Mapping[Node, list[int]],
        priced: ReshardPrices,
    ) -> Prices:
        shape = (columns.size, len(table.meshes))
        cost, late, hides, memory = (np.zeros(shape) for _ in range(4))
        for node, at in columns.first.items():
            where = slice(at, at + len(kept[node]))
            cost[where] = table.cost[node][kept[node]]
            memory[where] = table.memory[node][kept[node]]
            if node.op == "call_function" and table.overlap:
                hides[where] = table.overlap * cost[where]
        for column, item, times in columns.time.triples():
            flow = columns.flows[item]
            key = table.pricer.reshard(flow.producer, flow.port, flow.source, flow.want)
            if flow.source == flow.want:
                continue
            seconds = times * self._seconds(table, flow, key, priced)
            (late if key.late and table.overlap else cost)[column] += seconds
        for column, item, times in columns.memory.triples():
            flow = columns.flows[item]
            copies = self._copies(flow, times, table.variant)
            memory[column] += copies * table.pricer.held(flow, table.variant.micro_batches)
        return Prices(cost, late, hides, memory)

    def _again(self, node: Node, mode: str) -> float:
        """As `Accounts.again`."""
        if self.regions.block(node) < 0 or mode == NONE:
            return 0.0
        return 1.0 if mode == FULL or not is_heavy(node) else 0.0

    def _kept(self, node: Node, priced: OptionPrices, count: int, variant: Variant) -> Array:
        """As `Accounts.option_memory`."""
        mode, held = variant.mode, variant.in_flight
        if mode == NONE or self.regions.block(node) < 0:
            return held * count * priced.kept_bytes
        heavy = mode == SELECTIVE and is_heavy(node)
        kept = count if heavy else self.regions.leaving.get(node, 0)
        return held * kept * priced.made_bytes + priced.kept_bytes if kept else priced.kept_bytes

    def _copies(self, flow: Flow, times: float, variant: Variant) -> float:
        """How many copies of a saved flow are kept, as `Accounts.flow_memory`."""
        mode = variant.mode
        if flow.producer.op == "placeholder":
            return times
        inside = all(self.regions.block(e.consumer) >= 0 for e in flow.readers)
        if mode == NONE or not inside or self.regions.block(flow.producer) < 0:
            return variant.in_flight * times
        leaves = bool(self.regions.leaving.get(flow.producer, 0))
        kept = leaves or (mode == SELECTIVE and is_heavy(flow.producer))
        return 0.0 if kept and flow.source == flow.want else 1.0


def build_frame(problem: Problem, roles: Mapping[str, str], family: str = "auto") -> Frame:
    """The frame of a problem for axes with roles; made on a mesh whose axes have size two."""
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
        options,
        problem.regions,
        copies_of(problem.graph, problem.blocks, options),
        reading_patterns(problem.graph, problem.blocks),
        pricer.shrinks,
        pricer.saves_input,
    )


def _least_hosts(cluster: Cluster, devices: int) -> tuple[int, int]:
    """(devices per host, hosts) of a part of the cluster with at least so many devices."""
    if cluster.host_size >= devices or len(cluster.levels) == 1:
        return max(devices, cluster.host_size), 1
    return cluster.host_size, -(-devices // cluster.host_size)
