"""Prices of the planner's options and edges on one mesh of one cluster.

All times are seconds per training step (forward and backward) on the device with the largest
shards, all memory is bytes on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch.fx

from autopar.cost.cluster import Cluster, group_span
from autopar.cost.comm import collective_time, reshard_time, wire_bytes
from autopar.cost.compute import (
    accumulate_time,
    backward_time,
    forward_time,
    local_op,
    optimizer_time,
)
from autopar.cost.families import op_name
from autopar.cost.memory import saved, state_bytes
from autopar.ir.graph import Value, tensor_inputs, value_of, values_of
from autopar.ir.hint import MARK, may_reshard
from autopar.ir.lowered import (
    GATHER_INV,
    GATHER_VARY,
    PVARY,
    SCATTER_SUM,
    SLICE_INV,
    SLICE_VARY,
    Collective,
)
from autopar.ir.mesh import Mesh
from autopar.ir.reshard import reshard_steps
from autopar.ir.rule import Choice, Placed, ShardingRule
from autopar.ir.sharding import Sharding

from .bucket_collectives import BUCKET_BYTES
from .gradient_sums import sum_time
from .kept import own_outputs
from .narrow_gathers import is_narrow, summed, travelling, travelling_value
from .route_costs import route_messages

Node = torch.fx.Node
aten = torch.ops.aten


_SHRINKING = (SCATTER_SUM, SLICE_INV, SLICE_VARY)


@dataclass(frozen=True)
class _Priced:
    """A step of a reshard: `parts` is by how much other axes divide what its group sees."""

    op: Collective
    axis: str
    parts: int


@dataclass(frozen=True)
class EdgeCollective:
    """One collective of an edge: times in seconds, `whole_bytes` what its group holds together.

    The backward's figures are zero where no gradient flows. The sent bytes are one device's.
    """

    op: Collective
    axis: str
    whole_bytes: float
    forward_s: float
    backward_s: float
    sent_bytes: float
    backward_sent_bytes: float


class Pricer:
    """Prices for one (cluster, mesh, optimizer); results are cached per argument."""

    def __init__(
        self,
        cluster: Cluster,
        mesh: Mesh,
        optimizer: str = "adamw",
        never_gather: frozenset[str] = frozenset(),
        micro_batches: int = 1,
    ) -> None:
        """`never_gather`: axes on which parameters are not gathered (pure tensor parallelism).

        Of several `micro_batches`, each adds its gradients of parameters to those before.
        """
        self.never_gather = never_gather
        self.micro_batches = micro_batches
        self.cluster = cluster
        self.mesh = mesh
        self.optimizer = optimizer
        self.device = cluster.device_for(mesh.size)
        self._origin = dict.fromkeys(mesh.names, 0)
        self._span = {name: group_span(cluster, mesh, (name,)) for name in mesh.names}
        self._steps = lru_cache(maxsize=None)(self._find_steps)
        self._step_time_s = lru_cache(maxsize=None)(self._find_step_time_s)
        self._edge_times: dict[tuple[Any, ...], float] = {}
        self._saved: dict[Node, frozenset[int]] = {}
        self._own_outputs: dict[Node, tuple[int, ...]] = {}
        self._value_bytes: dict[int, tuple[float, Value]] = {}

    # -- ops ----------------------------------------------------------------------------------

    def op_time_s(
        self, node: Node, rule: ShardingRule, placed: Placed, chosen: Mapping[str, Choice]
    ) -> float:
        """Local compute of an op, and what it communicates by itself."""
        return sum(self.op_times_s(node, rule, placed, chosen))

    def op_times_s(
        self, node: Node, rule: ShardingRule, placed: Placed, chosen: Mapping[str, Choice]
    ) -> tuple[float, float]:
        """The same as (forward, backward)."""
        forward, backward = self.compute_times_s(node, placed)
        first, second = self.own_times_s(node, rule, placed, chosen)
        return forward + first, backward + second

    def own_times_s(
        self, node: Node, rule: ShardingRule, placed: Placed, chosen: Mapping[str, Choice]
    ) -> tuple[float, float]:
        """What an op communicates by itself: (forward, backward)."""
        forward = backward = 0.0
        for axis, choice in chosen.items():
            span = self._span[axis]
            if choice.factor in rule.comm:
                first, second = (
                    float(collective_time(self.cluster, "all_reduce", n, span))
                    for n in self.own_messages(node, axis, placed)
                )
                forward, backward = forward + first, backward + second
            for m in route_messages(node, rule, placed, choice.factor, axis, self.mesh):
                seconds = float(collective_time(self.cluster, m.kind, m.nbytes, span))
                if m.backward:
                    backward += seconds
                else:
                    forward += seconds
        return forward, backward

    def compute_time_s(self, node: Node, placed: Placed) -> float:
        """Local compute of an op, forward and backward."""
        return sum(self.compute_times_s(node, placed))

    def compute_times_s(self, node: Node, placed: Placed) -> tuple[float, float]:
        """Local compute of an op: (forward, backward)."""
        inputs = [
            self._local(value_of(source), sharding)
            for source, sharding in zip(tensor_inputs(node), placed.inputs, strict=True)
        ]
        outputs = [
            self._local(value, sharding)
            for value, sharding in zip(values_of(node), placed.outputs, strict=True)
        ]
        op = local_op(node, inputs, outputs)
        forward, backward = float(forward_time(self.device, op)), 0.0
        if any(v.requires_grad for v in values_of(node)):
            backward = float(backward_time(self.device, op))
        readers = sum(1 for user in node.users if user.op == "call_function")
        value = node.meta["value"]
        if readers > 1 and isinstance(value, Value) and value.requires_grad:
            nbytes = self.local_bytes(value, placed.outputs[0])
            backward += (readers - 1) * float(accumulate_time(self.device, nbytes))
        return forward, backward

    def own_messages(self, node: Node, axis: str, placed: Placed) -> tuple[float, float]:
        """Bytes of the all-reduces that an op makes by itself: (forward, backward)."""
        if op_name(node.target) == "cumsum":  # the totals along the split dim
            value, dim = values_of(node)[0], placed.outputs[0].dim_of(axis)
            shape = self._local(value, placed.outputs[0])
            totals = self.local_bytes(value, placed.outputs[0]) / max(1, shape[dim or 0])
            return totals, totals * value.requires_grad
        first, second = message_bytes(node, placed, self._local)
        return float(first), float(second)

    def saved_output_bytes(self, node: Node, placed: Placed) -> float:
        """What autograd keeps of an op's outputs (inputs are counted on the edges)."""
        outputs = [
            self._local(value, sharding)
            for value, sharding in zip(values_of(node), placed.outputs, strict=True)
        ]
        inputs = [
            self._local(value_of(source), sharding)
            for source, sharding in zip(tensor_inputs(node), placed.inputs, strict=True)
        ]
        if not any(v.requires_grad for v in values_of(node)):
            return 0.0
        op = local_op(node, inputs, outputs)
        kept = saved(op)
        if node not in self._own_outputs:
            self._own_outputs[node] = own_outputs(node)
        return float(kept.own_bytes + sum(op.outputs[i].bytes for i in self._own_outputs[node]))

    # -- parameters ---------------------------------------------------------------------------

    def optimizer_time_s(self, value: Value, sharding: Sharding) -> float:
        if not value.requires_grad:
            return 0.0
        local = self.local_bytes(value, sharding) / value.dtype.itemsize
        return float(optimizer_time(self.device, local, value.dtype, self.optimizer))

    def update_time_s(self, node: Node, sharding: Sharding) -> float:
        """What a stored parameter takes per step: its update, and its cast if it has one."""
        seconds, cast = self.optimizer_time_s(value_of(node), sharding), travelling(node)
        if cast is node:
            return seconds
        shape = self._local(value_of(node), sharding)
        op = local_op(cast, [shape], [shape])
        seconds += float(forward_time(self.device, op))
        return seconds + float(backward_time(self.device, op)) * value_of(cast).requires_grad

    def stored_bytes(self, value: Value, sharding: Sharding) -> float:
        local = self.local_bytes(value, sharding) / value.dtype.itemsize
        if not value.requires_grad:
            return local * value.dtype.itemsize
        return float(state_bytes(local, value.dtype, self.optimizer).total)

    def sum_s(self, producer: Node, port: int, sharding: Sharding, regather: bool = False) -> float:
        """Seconds to add one micro-batch's gradient of a parameter to those of the ones before."""
        value = values_of(summed(producer, regather))[port]
        return float(sum_time(self.device, self.local_bytes(value, sharding), value.dtype))

    # -- edges --------------------------------------------------------------------------------

    def shrinks(self, source: Sharding, want: Sharding) -> bool:
        """Whether every step of a reshard leaves less of the value on each device."""
        steps = self._steps(source, want)
        return steps is not None and all(s.op in _SHRINKING for s in steps)

    def edge_time_s(
        self, producer: Node, port: int, source: Sharding, want: Sharding, regather: bool = False
    ) -> float:
        """Resharding of a value for its readers, and of its gradient on the way back.

        Infinite where there is no way, or none that the family of plans allows.
        """
        if source == want:
            return 0.0
        if MARK in producer.meta and not may_reshard(producer.meta[MARK], source, want):
            return float("inf")
        value = travelling_value(producer, port)
        role = producer.meta.get("role") if producer.op == "placeholder" else None
        key = (source, want, self._bytes(value), value.requires_grad, role, regather)
        found = self._edge_times.get(key)
        if found is None:
            found = self._edge_times[key] = self._find_edge_time_s(*key)
        return found

    def edge_forward_s(self, producer: Node, port: int, source: Sharding, want: Sharding) -> float:
        """The forward's share of `edge_time_s`: what recomputation repeats."""
        return sum(c.forward_s for c in self.edge_collectives(producer, port, source, want))

    def _find_edge_time_s(
        self,
        source: Sharding,
        want: Sharding,
        nbytes: float,
        grad: bool,
        role: str | None,
        regather: bool,
    ) -> float:
        steps = self._steps(source, want)
        if steps is None:
            return float("inf")
        total = 0.0
        for step in steps:
            if (
                role == "param"
                and step.axis in self.never_gather
                and step.op in (GATHER_VARY, GATHER_INV)
            ):
                return float("inf")
            whole = nbytes / step.parts
            forward, backward = self._step_time_s(step.op, step.axis, whole, role is not None)
            total += forward
            if grad:
                total += backward
                if regather and step.op is GATHER_VARY:
                    total += forward
        return total

    def edge_collectives(
        self, producer: Node, port: int, source: Sharding, want: Sharding
    ) -> list[EdgeCollective]:
        """The collectives of one edge in forward order, each with its dual and both times."""
        value = travelling_value(producer, port)
        role = producer.meta.get("role") if producer.op == "placeholder" else None
        found = []
        for step in self._steps(source, want) or ():
            whole = self._bytes(value) / step.parts
            times = self._step_time_s(step.op, step.axis, whole, role is not None)
            n = self.mesh[step.axis].size
            sent, back = (
                float(wire_bytes(kind, whole, n)) if kind is not None else 0.0
                for kind in (step.op.forward, step.op.backward)
            )
            found.append(
                EdgeCollective(
                    step.op,
                    step.axis,
                    whole,
                    times[0],
                    times[1] if value.requires_grad else 0.0,
                    sent,
                    back if value.requires_grad else 0.0,
                )
            )
        return found

    def edge_bytes(
        self, producer: Node, port: int, source: Sharding, want: Sharding, regather: bool = False
    ) -> dict[str, float]:
        """Bytes that one device sends per step for an edge, per collective."""
        value = travelling_value(producer, port)
        found: dict[str, float] = {}
        for step in self._steps(source, want) or ():
            nbytes = self._bytes(value) / step.parts
            kinds = [step.op.forward]
            if value.requires_grad:
                kinds.append(step.op.backward)
                if regather and step.op is GATHER_VARY:
                    kinds.append(step.op.forward)
            for kind in kinds:
                if kind is not None:
                    sent = float(wire_bytes(kind, nbytes, self.mesh[step.axis].size))
                    found[kind] = found.get(kind, 0.0) + sent
        return found

    def saves_input(self, node: Node, slot: int) -> bool:
        """Whether autograd keeps tensor input `slot` of an op until the backward."""
        if node.op != "call_function":
            return False
        if node not in self._saved:
            needed = any(v.requires_grad for v in values_of(node))
            self._saved[node] = frozenset(saved(local_op(node)).inputs if needed else ())
        return slot in self._saved[node]

    def saved_input_bytes(
        self, producer: Node, port: int, source: Sharding, want: Sharding, regather: bool = False
    ) -> float:
        """Memory of a value kept for the backward in the form its readers want.

        A parameter as stored, and a gathered copy that is dropped and gathered again, cost nothing;
        but for the cast shard of one that travels in a lower precision.
        """
        value = travelling_value(producer, port)
        if is_narrow(producer):
            return self._bytes(value) / (source if regather else want).parts(self.mesh)
        if producer.op == "placeholder":
            if producer.meta.get("role") != "param" or regather:
                return 0.0
            if want.without_varying() == source:
                return 0.0
        return self._bytes(value) / want.parts(self.mesh)

    # -- helpers ------------------------------------------------------------------------------

    def local_bytes(self, value: Value, sharding: Sharding) -> float:
        n = value.dtype.itemsize
        for size in self._local(value, sharding):
            n *= size
        return float(n)

    def _local(self, value: Value, sharding: Sharding) -> tuple[int, ...]:
        return sharding.local_shape(value.int_shape(), self.mesh, self._origin)

    def _bytes(self, value: Value) -> float:
        """Bytes of a whole value."""
        found = self._value_bytes.get(id(value))
        if found is None:
            n = value.dtype.itemsize
            for size in value.int_shape():
                n *= size
            # The value is kept with its size, so that its id stays its own.
            found = self._value_bytes[id(value)] = (float(n), value)
        return found[0]

    def _find_step_time_s(
        self, op: Collective, axis: str, nbytes: float, bucketed: bool
    ) -> tuple[float, float]:
        """(forward, backward) seconds of one collective on a tensor that its group sees whole.

        Collectives of parameters travel in buckets: a small one pays its share of a full bucket.
        """
        span = self._span[axis]
        if bucketed and op in (PVARY, GATHER_VARY) and nbytes < BUCKET_BYTES:
            full = reshard_time(self.cluster, op, float(BUCKET_BYTES), span)
            share = nbytes / BUCKET_BYTES
            return float(full[0]) * share, float(full[1]) * share
        forward, backward = reshard_time(self.cluster, op, nbytes, span)
        return float(forward), float(backward)

    def _find_steps(self, source: Sharding, want: Sharding) -> tuple[_Priced, ...] | None:
        try:
            steps = reshard_steps(source, want, self.mesh)
        except ValueError:
            return None
        priced, before = [], source
        for step in steps:
            split = before if step.op.before == "S" else step.after
            parts = split.without_axis(step.axis).parts(self.mesh)
            priced.append(_Priced(step.op, step.axis, parts))
            before = step.after
        return tuple(priced)


def message_bytes(
    node: Node, placed: Placed, local: Callable[[Value, Sharding], tuple[Any, ...]]
) -> tuple[Any, Any]:
    """Bytes of the all-reduces inside an op: cross-entropy's statistics, batch norm's sums.

    `local` gives the local shape of a value under a sharding, in numbers or arrays.
    """
    if op_name(node.target) == "batch_norm":
        channels = local(values_of(node)[0], placed.outputs[0])[1]
        return 3 * channels * 4, 2 * channels * 4
    shape = local(value_of(tensor_inputs(node)[0]), placed.inputs[0])
    last = node.target is not aten.cross_entropy_loss.default
    classes = len(shape) - 1 if last else min(1, len(shape) - 1)
    tokens: Any = 1
    for dim, size in enumerate(shape):
        tokens = tokens * (1 if dim == classes else size)
    return tokens * 4, 2 * tokens * 4
