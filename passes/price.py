"""Prices of the planner's options and edges on one mesh of one cluster.

All times are seconds per training step (forward and backward) on the device with the largest
shards, all memory is bytes on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch.fx

from autopar.cost.cluster import Cluster, group_span
from autopar.cost.comm import collective_time, reshard_time, wire_bytes
from autopar.cost.compute import (
    accumulate_time,
    backward_time,
    forward_time,
    local_op,
    op_name,
    optimizer_time,
)
from autopar.cost.memory import saved, state_bytes
from autopar.ir.graph import Value, tensor_inputs, value_of, values_of
from autopar.ir.lowered import GATHER_INV, GATHER_VARY, PVARY
from autopar.ir.mesh import Mesh
from autopar.ir.reshard import Step, reshard_steps
from autopar.ir.rule import Choice, Placed, ShardingRule
from autopar.ir.sharding import Sharding

from .bucket_collectives import BUCKET_BYTES

Node = torch.fx.Node


class Pricer:
    """Prices for one (cluster, mesh, optimizer); results are cached per argument."""

    def __init__(
        self,
        cluster: Cluster,
        mesh: Mesh,
        optimizer: str = "adamw",
        never_gather: frozenset[str] = frozenset(),
    ) -> None:
        """`never_gather`: axes on which parameters may not be gathered (pure tensor parallelism)."""
        self.never_gather = never_gather
        self.cluster = cluster
        self.mesh = mesh
        self.optimizer = optimizer
        self.device = cluster.device_for(mesh.size)
        self._origin = dict.fromkeys(mesh.names, 0)
        self._span = {name: group_span(cluster, mesh, (name,)) for name in mesh.names}
        self._steps = lru_cache(maxsize=None)(self._find_steps)

    # -- ops ----------------------------------------------------------------------------------

    def op_time_s(
        self, node: Node, rule: ShardingRule, placed: Placed, chosen: Mapping[str, Choice]
    ) -> float:
        """Local compute of an op, and what it communicates by itself."""
        compute = self.compute_time_s(node, placed)
        own = sum(
            self._own_communication_s(node, axis, placed)
            for axis, choice in chosen.items()
            if choice.factor in rule.comm
        )
        return compute + own

    def compute_time_s(self, node: Node, placed: Placed) -> float:
        inputs = [
            self._local(value_of(source), sharding)
            for source, sharding in zip(tensor_inputs(node), placed.inputs, strict=True)
        ]
        outputs = [
            self._local(value, sharding)
            for value, sharding in zip(values_of(node), placed.outputs, strict=True)
        ]
        op = local_op(node, inputs, outputs)
        time = float(forward_time(self.device, op))
        if any(v.requires_grad for v in values_of(node)):
            time += float(backward_time(self.device, op))
        readers = sum(1 for user in node.users if user.op == "call_function")
        value = node.meta["value"]
        if readers > 1 and isinstance(value, Value) and value.requires_grad:
            nbytes = self.local_bytes(value, placed.outputs[0])
            time += (readers - 1) * float(accumulate_time(self.device, nbytes))
        return time

    def _own_communication_s(self, node: Node, axis: str, placed: Placed) -> float:
        """Messages of ops that reduce inside: cross-entropy's statistics, batch norm's sums."""
        span, name = self._span[axis], op_name(node.target)
        if name == "batch_norm":
            channels = self._local(values_of(node)[0], placed.outputs[0])[1]
            sizes = (3 * channels * 4, 2 * channels * 4)
        else:
            logits = value_of(tensor_inputs(node)[0])
            shape = self._local(logits, placed.inputs[0])
            tokens = 1
            for dim, size in enumerate(shape):
                tokens *= 1 if dim == (1 if len(shape) > 1 else 0) else size
            sizes = (tokens * 4, 2 * tokens * 4)
        return sum(float(collective_time(self.cluster, "all_reduce", n, span)) for n in sizes)

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
        return float(kept.own_bytes + sum(op.outputs[i].bytes for i in kept.outputs))

    # -- parameters ---------------------------------------------------------------------------

    def optimizer_time_s(self, value: Value, sharding: Sharding) -> float:
        if not value.requires_grad:
            return 0.0
        local = self.local_bytes(value, sharding) / value.dtype.itemsize
        return float(optimizer_time(self.device, local, value.dtype, self.optimizer))

    def stored_bytes(self, value: Value, sharding: Sharding) -> float:
        local = self.local_bytes(value, sharding) / value.dtype.itemsize
        if not value.requires_grad:
            return local * value.dtype.itemsize
        return float(state_bytes(local, value.dtype, self.optimizer).total)

    # -- edges --------------------------------------------------------------------------------

    def possible(self, source: Sharding, want: Sharding, producer: Node) -> bool:
        """Whether a value may be resharded so."""
        steps = self._steps(source, want)
        if steps is None:
            return False
        if producer.meta.get("role") == "param":
            return not any(
                s.axis in self.never_gather and s.op in (GATHER_VARY, GATHER_INV) for s in steps
            )
        return True

    def edge_time_s(
        self, producer: Node, port: int, source: Sharding, want: Sharding, regather: bool = False
    ) -> float:
        """Resharding of a value for its readers, and of its gradient on the way back."""
        value = values_of(producer)[port]
        steps = self._steps(source, want)
        assert steps is not None
        bucketed = producer.op == "placeholder"
        total, current = 0.0, source
        for step in steps:
            forward, backward = self.step_time_s(value, current, step, bucketed)
            total += forward
            if value.requires_grad:
                total += backward
                if regather and step.op is GATHER_VARY:
                    total += forward
            current = step.after
        return total

    def step_time_s(
        self, value: Value, before: Sharding, step: Step, bucketed: bool
    ) -> tuple[float, float]:
        """(forward, backward) seconds of one collective.

        Collectives of parameters travel in buckets: a small one pays its share of a full bucket.
        """
        nbytes = self._whole_bytes(value, before, step)
        span = self._span[step.axis]
        if bucketed and step.op in (PVARY, GATHER_VARY) and nbytes < BUCKET_BYTES:
            full = reshard_time(self.cluster, step.op, float(BUCKET_BYTES), span)
            share = nbytes / BUCKET_BYTES
            return float(full[0]) * share, float(full[1]) * share
        forward, backward = reshard_time(self.cluster, step.op, nbytes, span)
        return float(forward), float(backward)

    def edge_bytes(
        self, value: Value, source: Sharding, want: Sharding, regather: bool = False
    ) -> dict[str, float]:
        """Bytes that one device sends per step for an edge, per collective."""
        found: dict[str, float] = {}
        current = source
        for step in self._steps(source, want) or ():
            nbytes = self._whole_bytes(value, current, step)
            kinds = [step.op.forward]
            if value.requires_grad:
                kinds.append(step.op.backward)
                if regather and step.op is GATHER_VARY:
                    kinds.append(step.op.forward)
            for kind in kinds:
                if kind is not None:
                    sent = float(wire_bytes(kind, nbytes, self.mesh[step.axis].size))
                    found[kind] = found.get(kind, 0.0) + sent
            current = step.after
        return found

    def saves_input(self, node: Node, slot: int) -> bool:
        """Whether autograd keeps tensor input `slot` of an op until the backward."""
        if node.op != "call_function" or not any(v.requires_grad for v in values_of(node)):
            return False
        return slot in saved(local_op(node)).inputs

    def saved_input_bytes(
        self, producer: Node, port: int, source: Sharding, want: Sharding, regather: bool = False
    ) -> float:
        """Memory of a value kept for the backward in the form its readers want.

        A parameter as stored, and a gathered copy that is dropped and gathered again, cost nothing.
        """
        value = values_of(producer)[port]
        local = want.without_varying()
        if producer.op == "placeholder" and (regather or local == source):
            return 0.0
        if producer.op == "placeholder" and producer.meta.get("role") != "param":
            return 0.0
        return self.local_bytes(value, local)

    # -- helpers ------------------------------------------------------------------------------

    def local_bytes(self, value: Value, sharding: Sharding) -> float:
        n = value.dtype.itemsize
        for size in self._local(value, sharding):
            n *= size
        return float(n)

    def _local(self, value: Value, sharding: Sharding) -> tuple[int, ...]:
        return sharding.local_shape(value.int_shape(), self.mesh, self._origin)

    def _whole_bytes(self, value: Value, before: Sharding, step: Step) -> float:
        """Bytes of the value as the step's group sees it whole."""
        split = before if step.op.before == "S" else step.after
        return self.local_bytes(value, split.without_axis(step.axis))

    def _find_steps(self, source: Sharding, want: Sharding) -> tuple[Step, ...] | None:
        try:
            return tuple(reshard_steps(source, want, self.mesh))
        except ValueError:
            return None
