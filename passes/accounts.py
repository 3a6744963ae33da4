"""What a training step pays for options and reshards: micro-batches, recomputation, overlap.

Per copy of an op and per step, with `k` micro-batches (arXiv:2205.05198 names the modes)::

    none        k (forward + backward);            its saved tensors, in every copy
    full        k (2 forward + backward);          what enters each copy, one copy's saved tensors
    selective   forward twice for what is cheap;   outputs of matrix work, one copy's other tensors

Collectives of parameters run once per step, those that are regathered (ZeRO-3) in every
micro-batch, and overlap with compute: they cost what is left over `overlap` times the compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch.fx

from autopar.cost.cluster import Cluster
from autopar.cost.families import op_family, op_name
from autopar.ir.graph import Graph, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding
from autopar.plan import PIPELINE_AXIS

from .blocks import Blocks
from .columns import Edge, Flow, passes_on
from .gradient_sums import is_summed, summed_as
from .narrow_gathers import summed
from .options import Option
from .price import Pricer
from .wide_gradients import is_summed_apart
from .widening import widening

Node = torch.fx.Node

NONE, SELECTIVE, FULL = "none", "selective", "full"
MODES = (NONE, SELECTIVE, FULL)

# Share of an accelerator's compute time in which collectives of parameters can be in flight. What a
# plan's timeline says counts; this only ranks candidates.
OVERLAP = 0.8


def overlap_of(cluster: Cluster, mesh: Mesh) -> float:
    """Ranks of a CPU compute on the cores that communicate: only between hosts it overlaps.

    So it does not where none but the stages of a pipeline are on different hosts.
    """
    inside = [axis for axis in mesh if axis.name != PIPELINE_AXIS and axis.size > 1]
    crosses = cluster.single is None or any(axis.level for axis in inside)
    return OVERLAP if crosses else 0.0


def is_heavy(node: Node) -> bool:
    """Matrix work, whose outputs selective recomputation keeps."""
    return node.op == "call_function" and op_family(op_name(node.target)) in (
        "matmul",
        "conv",
        "attention",
    )


@dataclass(frozen=True)
class Regions:
    """Repeated blocks as sets of nodes.

    `of[call]` is (block, copy) of every call in a repeated block, `leaving[representative]` how
    many of its copies are read outside their copy.
    """

    of: Mapping[Node, tuple[int, int]]
    copies: tuple[int, ...]
    leaving: Mapping[Node, int]

    def block(self, node: Node) -> int:
        """Index of the node's repeated block, or -1."""
        return self.of[node][0] if node in self.of else -1


def regions_of(graph: Graph, blocks: Blocks) -> Regions:
    """Which calls are in which copy of which repeated block."""
    calls = list(graph.calls())
    at = {node: i for i, node in enumerate(calls)}
    of: dict[Node, tuple[int, int]] = {}
    for index, (first, period, copies) in enumerate(blocks.regions):
        start = at[first]
        for offset in range(period * copies):
            of[calls[start + offset]] = (index, offset // period)
    leaving: dict[Node, int] = {}
    for node in calls:
        if node in of and not passes_on(node):
            readers = _readers(node)
            if any(of.get(user) != of[node] for user in readers):
                stands = blocks.representative[node]
                leaving[stands] = leaving.get(stands, 0) + 1
    return Regions(of, tuple(copies for _, _, copies in blocks.regions), leaving)


def _readers(node: Node) -> list[Node]:
    found = []
    for user in node.users:
        found += _readers(user) if passes_on(user) else [user]
    return found


@dataclass(frozen=True)
class Paid:
    """A step's bill: seconds of compute with everything that blocks it, and of what overlaps."""

    compute_s: float = 0.0
    blocking_s: float = 0.0
    parameters_s: float = 0.0
    optimizer_s: float = 0.0
    memory_bytes: float = 0.0

    def time_s(self, overlap: float) -> float:
        exposed = max(0.0, self.parameters_s - overlap * self.compute_s)
        return self.compute_s + self.blocking_s + self.optimizer_s + exposed


@dataclass(frozen=True)
class Accounts:
    """Prices of options and flows under a micro-batch count and a mode per repeated block.

    `pricer` prices one micro-batch: its graph is specialised to the batch of one. Activations of
    `in_flight` micro-batches are kept at once.
    """

    pricer: Pricer
    regions: Regions
    micro_batches: int = 1
    modes: Mapping[int, str] = field(default_factory=dict)
    overlap: float = 0.0
    in_flight: int = 1

    def mode(self, node: Node) -> str:
        return self.modes.get(self.regions.block(node), NONE)

    def again(self, node: Node) -> float:
        """How often an op's forward runs again in the backward."""
        mode = self.mode(node)
        return 1.0 if mode == FULL or (mode == SELECTIVE and not is_heavy(node)) else 0.0

    def option_time_s(self, node: Node, option: Option) -> float:
        """Seconds per step of one copy of a node."""
        if node.op == "placeholder":
            return option.time_s
        return self.micro_batches * (option.time_s + self.again(node) * option.forward_s)

    def option_memory(self, node: Node, option: Option, count: int) -> float:
        """Bytes that `count` copies of a node keep."""
        mode, held = self.mode(node), self.in_flight
        if mode == NONE:
            return count * option.memory_bytes * (1 if node.op == "placeholder" else held)
        kept = self.regions.leaving.get(node, 0) if mode == FULL or not is_heavy(node) else count
        if not kept:
            return option.memory_bytes
        made = sum(
            self.pricer.local_bytes(value, sharding)
            for value, sharding in zip(values_of(node), option.gives, strict=True)
        )
        return held * kept * made + option.memory_bytes

    def overlaps(self, flow: Flow) -> bool:
        """Whether a flow is a parameter's: its collectives are issued early and waited late."""
        return flow.producer.op == "placeholder" and flow.producer.meta.get("role") == "param"

    def flow_time_s(self, flow: Flow) -> float:
        """Seconds per step of one reshard, its gradient's included."""
        if flow.source == flow.want:
            return 0.0
        where = (flow.producer, flow.port, flow.source, flow.want)
        if self.overlaps(flow):
            once = self.pricer.edge_time_s(*where, flow.regather)
            return once * (self.micro_batches if flow.regather else 1)
        once = self.pricer.edge_time_s(*where)
        if any(self.mode(e.consumer) == FULL for e in flow.readers):
            once += self.pricer.edge_forward_s(*where)
        return self.micro_batches * once

    def sums_s(self, flow: Flow) -> float:
        """Seconds per step to add a parameter's gradients over micro-batches: compute."""
        if not self.accumulates(flow):
            return 0.0
        held = summed_as(flow.source, flow.want, flow.regather)
        each = self.pricer.sum_s(flow.producer, flow.port, held, flow.regather)
        return (self.micro_batches - 1) * each

    def flow_memory(self, flow: Flow, times: float) -> float:
        """Bytes that `times` copies of a value keep for the readers that need it backward."""
        if not flow.saved:
            return 0.0
        saved = self.pricer.saved_input_bytes(
            flow.producer, flow.port, flow.source, flow.want, flow.regather
        )
        if self.accumulates(flow):
            saved += self._sum_bytes(flow)
        if flow.producer.op == "placeholder":
            return times * saved
        modes = {self.mode(e.consumer) for e in flow.readers}
        if NONE in modes:
            return self.in_flight * times * saved
        if self.mode(flow.producer) != NONE:
            kept = self._is_kept(flow.producer)
            return 0.0 if kept and flow.source == flow.want else saved
        return self.in_flight * times * saved

    @property
    def several(self) -> bool:
        """Whether there are several micro-batches; a symbol stands for that (`step_formula`)."""
        return self.micro_batches != 1

    def holds(self, edge: Edge) -> bool:
        """Whether what arrives on an edge stays in memory beyond its reader.

        Autograd keeps it; or it is a parameter that serves several micro-batches.
        """
        if self.several and edge.producer.meta.get("role") == "param":
            return True
        return self.pricer.saves_input(edge.consumer, edge.slot)

    def accumulates(self, flow: Flow) -> bool:
        """Whether gradients of a parameter are summed over micro-batches."""
        return self.several and is_summed(flow.producer, flow.port)

    def _sum_bytes(self, flow: Flow) -> float:
        """What the sum takes: beyond the stored gradient, or whole until it is reduced."""
        value = value_of(summed(flow.producer, flow.regather))
        wider = widening(value.dtype)
        if is_summed_apart(flow.producer, flow.source, flow.want, flow.regather):
            return (1 + wider) * self.pricer.local_bytes(value, flow.want.without_varying())
        return wider * self.pricer.local_bytes(value, flow.source) if wider else 0.0

    def _is_kept(self, node: Node) -> bool:
        """Whether a recomputed block keeps the node's output (counted with the node)."""
        if self.mode(node) == SELECTIVE and is_heavy(node):
            return True
        return bool(self.regions.leaving.get(node, 0))


def bill(graph: Graph, blocks: Blocks, option: Mapping[Node, Option], accounts: Accounts) -> Paid:
    """What an assignment costs, from scratch: value by value, not column by column."""
    compute = optimizer = blocking = parameters = memory = 0.0
    count: dict[Node, int] = {}
    stands_for = blocks.representative
    for node in option:
        count[stands_for[node]] = count.get(stands_for[node], 0) + 1
    for node, n in count.items():
        seconds = n * accounts.option_time_s(node, option[node])
        if node.op == "placeholder":
            optimizer += seconds
        else:
            compute += seconds
        memory += accounts.option_memory(node, option[node], n)
    for flow, times in read_flows(graph, blocks, option, accounts).items():
        seconds = times * accounts.flow_time_s(flow)
        blocking += times * accounts.sums_s(flow)
        if accounts.overlaps(flow):
            parameters += seconds
        else:
            blocking += seconds
        memory += accounts.flow_memory(flow, times)
    return Paid(compute, blocking, parameters, optimizer, memory)


def read_flows(
    graph: Graph, blocks: Blocks, option: Mapping[Node, Option], accounts: Accounts
) -> dict[Flow, int]:
    """Every reshard of an assignment and how many copies of it there are, each paid once."""
    stands_for = blocks.representative
    found: dict[Flow, int] = {}
    if all(o is option.get(stands_for[n]) for n, o in option.items()):
        # Copies do the same: one of them stands for all.
        reads: Iterable[tuple[tuple[Edge, ...], tuple[Edge, ...], int]] = (
            (ends, ends, times) for ends, times in blocks.alike.items()
        )
    else:
        reads = ((edges, ends, 1) for edges, ends in blocks.reads)
    for edges, ends, times in reads:
        producer, port = edges[0].producer, edges[0].port
        made = option[producer]
        by_want: dict[Sharding, bool] = {}
        for edge in edges:
            want = option[edge.consumer].wants[edge.slot]
            alike = Edge(edge.producer, port, stands_for[edge.consumer], edge.slot)
            by_want[want] = by_want.get(want, False) or accounts.holds(alike)
        for want, held in by_want.items():
            flow = Flow(
                stands_for[producer], port, made.gives[port], want, made.regather, ends, held
            )
            found[flow] = found.get(flow, 0) + times
    return found
