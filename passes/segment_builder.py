"""What one device does of every chunk of a step, op by op: times, collectives, what is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch.fx

from autopar.cost.cluster import group_span
from autopar.cost.comm import collective_time
from autopar.cost.compute import is_noop, local_op
from autopar.cost.families import canonical_name, op_family, op_name
from autopar.cost.memory import moment_bytes
from autopar.cost.step import COMPUTE, Part, Segment
from autopar.ir.graph import tensor_inputs, value_of, values_of
from autopar.ir.lowered import GATHER_VARY
from autopar.ir.registry import rule_for
from autopar.ir.rule import Placed
from autopar.ir.sharding import Sharding

from .blocks import Blocks
from .chunks import Chunk
from .gradient_sums import is_summed, summed_as
from .kept import own_outputs
from .narrow_gathers import is_narrow, travelling_value
from .options import Option
from .price import EdgeCollective, Pricer
from .programme import passes_on, producer_of
from .stored import gradient_bytes
from .wide_gradients import is_summed_whole
from .widening import widening

Node = torch.fx.Node
Place = tuple[int, int]  # chunk, part

_KEPT_WHEN_SELECTIVE = ("matmul", "conv", "attention")


@dataclass(frozen=True)
class _Facts:
    """Seconds of an op, its family, and what its output is: a view, bytes, kept by itself."""

    forward_s: float
    backward_s: float
    family: str
    view: bool
    output_bytes: float
    saves_output: bool
    moment_bytes: float


@dataclass
class SegmentBuilder:
    """What is paid and kept so far, and where every value of the step is made."""

    blocks: Blocks
    option: Mapping[Node, Option]
    pricer: Pricer
    alias: Mapping[Node, Node] = field(default_factory=dict)
    paid: dict[tuple[Node, int, Sharding], Place | None] = field(default_factory=dict)
    kept: set[tuple[Node, int, Sharding]] = field(default_factory=set)
    gradients: set[Node] = field(default_factory=set)
    place: dict[tuple[Node, int], Place | None] = field(default_factory=dict)
    left: set[Place] = field(default_factory=set)
    entered: set[Place] = field(default_factory=set)
    entering: dict[int, dict[Place, float]] = field(default_factory=lambda: defaultdict(dict))
    facts: dict[tuple[Node, object, object], _Facts] = field(default_factory=dict)
    views: dict[Node, bool] = field(default_factory=dict)
    sums_s: dict[Node, float] = field(default_factory=lambda: defaultdict(float))

    def segment(self, chunk: Chunk, index: int) -> list[Part]:
        """The parts of one chunk, collectives right before the op that first wants their result."""
        parts: list[Part] = []
        for node in chunk.nodes:
            if node.op != "output" and passes_on(node):
                continue
            saved: list[tuple[int, float]] = []
            inputs = tensor_inputs(node)
            made = [
                self._edge(parts, index, source, node, slot, saved)
                for slot, source in enumerate(inputs)
            ]
            if node.op != "output":
                known = [at for at in made if at is not None]
                self._call(parts, index, node, inputs, known, saved)
        return parts

    # -- ops ------------------------------------------------------------------------------------

    def _call(
        self,
        parts: list[Part],
        index: int,
        node: Node,
        sources: list[Node],
        inputs: list[Place],
        saved: list[tuple[int, float]],
    ) -> None:
        option, facts = self.option[node], self._facts(node)
        own = option.time_s - facts.forward_s - facts.backward_s
        kept = sum(nbytes for _, nbytes in saved) + option.memory_bytes
        sums_s = self.sums_s.pop(node, 0.0)
        if facts.view and not facts.forward_s and not facts.backward_s + sums_s and not kept:
            for port, _ in enumerate(values_of(node)):  # where what it looks at is made
                self.place[node, port] = max(inputs, default=None)
            return
        at = len(parts)
        weight_s, gradient = self._of_parameters(facts, sources)
        parts.append(
            Part(
                name=node.name,
                module=node.meta.get("module", ""),
                kind=COMPUTE,
                forward_s=facts.forward_s,
                backward_s=facts.backward_s + sums_s,
                output_bytes=facts.output_bytes,
                saved_bytes=kept,
                deps=_deps(inputs, index),
                recomputable=facts.family not in _KEPT_WHEN_SELECTIVE,
                saved_from=tuple(s for s in saved if s[1]),
                freed_by=at if facts.saves_output or facts.view else -1,
                weight_s=weight_s + sums_s,
                gradient_bytes=gradient,
                moment_bytes=facts.moment_bytes,
            )
        )
        if own > 1e-12 * option.time_s:
            at = self._own_collectives(parts, node, own, facts.backward_s)
        for port, _ in enumerate(values_of(node)):
            self.place[node, port] = (index, at)

    def _facts(self, node: Node) -> _Facts:
        """What is the same for all copies of an op that do the same."""
        option, stands_for = self.option[node], self.blocks.representative[node]
        key = (stands_for, option.wants, option.gives)
        if key not in self.facts:
            placed, pricer = Placed(option.wants, option.gives), self.pricer
            view, values = self._is_view(node), values_of(node)
            made = 0.0 if view else sum(map(pricer.local_bytes, values, option.gives))
            self.facts[key] = _Facts(
                *pricer.compute_times_s(stands_for, placed),
                op_family(op_name(node.target)),
                view,
                made,
                bool(own_outputs(node)),
                self._moment_bytes(node),
            )
        return self.facts[key]

    def _moment_bytes(self, node: Node) -> float:
        """What the backward takes beside its gradients.

        Nothing where ranks have a part of the classes each: that is made of other ops.
        """
        whole = float(moment_bytes(local_op(node)))
        rule = rule_for(node) if whole else None
        if rule is None:
            return 0.0
        option = self.option[node]
        if any(rule.communicates_over(choice.factor) for _, choice in option.choices):
            return 0.0
        return whole / option.wants[0].parts(self.pricer.mesh)

    def _of_parameters(self, facts: _Facts, sources: list[Node]) -> tuple[float, float]:
        """(backward seconds that only make gradients of parameters, stored bytes of those).

        A product with a parameter makes two products of one size in its backward. The gradient of
        a parameter that passes through collectives is counted with them.
        """
        origins = [self._origin(source) for source in sources]
        stored = [s for s in origins if s.meta.get("role") == "param" and value_of(s).requires_grad]
        if not stored:
            return 0.0, 0.0
        gradient = 0.0
        for source in stored:
            if source not in self.gradients:
                self.gradients.add(source)
                gradient += gradient_bytes(source, self.option, self.pricer)
        if facts.family not in ("matmul", "conv", "embedding"):
            return 0.0, gradient
        wanted = [s for s in origins if any(v.requires_grad for v in values_of(s))]
        share = 1.0 if len(stored) == len(wanted) else 0.5
        return share * facts.backward_s, gradient

    def _is_view(self, node: Node) -> bool:
        stands_for = self.blocks.representative[node]
        if stands_for not in self.views:
            family = op_family(op_name(node.target))
            self.views[stands_for] = family == "view" or is_noop(local_op(node))
        return self.views[stands_for]

    def _origin(self, node: Node) -> Node:
        """What a value is a view of."""
        node, _ = producer_of(node)
        while node.op == "call_function" and self._is_view(node) and tensor_inputs(node):
            node, _ = producer_of(tensor_inputs(node)[0])
        return node

    def _own_collectives(self, parts: list[Part], node: Node, own_s: float, backward: float) -> int:
        """What an op communicates by itself, after it: one part per mesh axis.

        The statistics of a cross-entropy travel in its forward; every other op that communicates
        does half of it in its backward.
        """
        rule = rule_for(node)
        axes = [
            axis
            for axis, choice in self.option[node].choices
            if rule is not None and rule.communicates_over(choice.factor)
        ]
        placed = Placed(self.option[node].wants, self.option[node].gives)
        name = canonical_name(op_name(node.target))
        reduces = name in ("cross_entropy", "batch_norm")
        messages = [
            self.pricer.own_messages(node, axis, placed) if reduces else (1.0, 1.0) for axis in axes
        ]
        prices = [
            tuple(self._all_reduce_s(n, axis) if reduces else 1.0 for n in sizes)
            for axis, sizes in zip(axes, messages, strict=True)
        ]
        total = sum(map(sum, prices)) or 1.0
        for axis, sizes, price in zip(axes, messages, prices, strict=True):
            first, second = (own_s * p / total for p in price)
            both = backward > 0 and name != "cross_entropy"
            kind = "all_reduce" if reduces else "all_to_all"
            group = self.pricer.mesh[axis].size
            wire = 2 * (group - 1) / group if reduces else 0.0
            parts.append(
                Part(
                    name=f"{node.name} over {axis}",
                    module=node.meta.get("module", ""),
                    kind=kind,
                    forward_s=first if both else first + second,
                    backward_s=second if both else 0.0,
                    backward_kind=kind if both else "",
                    axis=axis,
                    level=self._level(axis),
                    sent_bytes=wire * (sizes[0] if both else sum(sizes)),
                    backward_sent_bytes=wire * sizes[1] if both else 0.0,
                    deps=(len(parts) - 1,),
                    recomputable=op_family(op_name(node.target)) not in _KEPT_WHEN_SELECTIVE,
                )
            )
        return len(parts) - 1

    def _level(self, axis: str) -> int:
        """The outermost level of the pricer's cluster that groups along an axis cross."""
        span = group_span(self.pricer.cluster, self.pricer.mesh, (axis,))
        return max((i for i, members in enumerate(span) if members > 1), default=0)

    def _all_reduce_s(self, nbytes: float, axis: str) -> float:
        span = group_span(self.pricer.cluster, self.pricer.mesh, (axis,))
        return float(collective_time(self.pricer.cluster, "all_reduce", nbytes, span))

    # -- edges ----------------------------------------------------------------------------------

    def _edge(
        self,
        parts: list[Part],
        index: int,
        read: Node,
        node: Node,
        slot: int,
        saved: list[tuple[int, float]],
    ) -> Place | None:
        """Where an input of an op is made: its collectives are added if they are not paid yet.

        What the op keeps of the input, if nothing has kept it yet, is appended to `saved`.
        """
        producer, port = producer_of(read)
        given, want = self.option[producer], self.option[node].wants[slot]
        source = given.gives[port]
        key = (producer, port, want)
        if key not in self.paid:
            at = self.place.get((self.alias.get(producer, producer), port))
            if source != want:
                at = self._collectives(parts, index, producer, port, want, at)
            self.paid[key] = at
            if is_summed(producer, port):
                self.sums_s[node] += self._sum_s(producer, port, want)
        at = self.paid[key]
        if at is not None and at[0] != index:
            moved = travelling_value(producer, port)
            self._enters(index, at, self.pricer.local_bytes(moved, want))
        if node.op == "output" or key in self.kept or not self._saves(node, slot):
            return at
        self.kept.add(key)
        nbytes = self.pricer.saved_input_bytes(producer, port, source, want, given.regather)
        here = at[1] if at is not None and at[0] == index else -1
        shard = is_narrow(producer) and given.regather  # is kept, and what is gathered is not
        here = -1 if shard else here
        if producer.op == "placeholder" and here >= 0:
            parts[here] = replace(parts[here], saved_bytes=parts[here].saved_bytes + nbytes)
        elif nbytes:
            saved.append((here, nbytes))
        return at

    def _sum_s(self, producer: Node, port: int, want: Sharding) -> float:
        """Seconds per micro-batch, on average, to add a parameter's gradient to those before."""
        k, given = self.pricer.micro_batches, self.option[producer]
        if k == 1:
            return 0.0
        held = summed_as(given.gives[port], want, given.regather)
        return (k - 1) / k * self.pricer.sum_s(producer, port, held, given.regather)

    def _saves(self, node: Node, slot: int) -> bool:
        return self.pricer.saves_input(self.blocks.representative[node], slot)

    def _enters(self, index: int, at: Place, nbytes: float) -> None:
        """A value made in another chunk is read in this one."""
        self.left.add(at)
        if at[0] == index - 1 or at not in self.entered:
            self.entered.add(at)
            self.entering[index].setdefault(at, nbytes)

    def _collectives(
        self,
        parts: list[Part],
        index: int,
        producer: Node,
        port: int,
        want: Sharding,
        at: Place | None,
    ) -> Place | None:
        """Append the collectives of an edge; where their result is made."""
        source, value = self.option[producer].gives[port], travelling_value(producer, port)
        param = producer.meta["fqns"][0] if producer.meta.get("role") == "param" else ""
        first = len(parts)
        for collective in self.pricer.edge_collectives(producer, port, source, want):
            if not collective.forward_s and not collective.backward_s:
                continue
            if at is not None and at[0] != index:
                self._enters(index, at, self.pricer.local_bytes(value, source))
            deps = _deps([at] if at is not None else [], index)
            parts.append(self._collective(collective, producer, deps, param))
            at = (index, len(parts) - 1)
            if param and producer not in self.gradients:
                self.gradients.add(producer)
                gradient = gradient_bytes(producer, self.option, self.pricer)
                parts[-1] = replace(parts[-1], gradient_bytes=gradient)
        if param and self.pricer.micro_batches > 1:
            self._sum_wide(parts, first, producer, want)
        return at

    def _sum_wide(self, parts: list[Part], first: int, producer: Node, want: Sharding) -> None:
        """Note the sum of a parameter's gradient with the gather that makes what ops read."""
        value, given = travelling_value(producer, 0), self.option[producer]
        gathers = [i for i in range(first, len(parts)) if parts[i].kind and parts[i].backward_s]
        if gathers and is_summed_whole(given.gives[0], want, given.regather):
            last = parts[gathers[-1]]
            wider = widening(value.dtype) * last.output_bytes
            parts[gathers[-1]] = replace(last, sum_bytes=wider)

    def _collective(
        self, c: EdgeCollective, producer: Node, deps: tuple[int, ...], param: str
    ) -> Part:
        regather = self.option[producer].regather
        group = self.pricer.mesh[c.axis].size
        shards = group if c.op.after == "S" else 1
        return Part(
            name=f"{param or producer.name}:{c.axis}",
            module=producer.meta.get("module", ""),
            kind=c.op.forward or "",
            forward_s=c.forward_s,
            backward_s=c.backward_s,
            backward_kind=(c.op.backward or "") if c.backward_s else "",
            axis=c.axis,
            level=self._level(c.axis),
            sent_bytes=c.sent_bytes,
            backward_sent_bytes=c.backward_sent_bytes,
            output_bytes=c.whole_bytes / shards,
            deps=deps,
            recomputable=False,
            param=param,
            once=bool(param) and not regather,
            regather=regather and c.op is GATHER_VARY and c.backward_s > 0,
        )

    # -- the whole ------------------------------------------------------------------------------

    def finish(self, index: int, chunk: Chunk, parts: list[Part]) -> Segment:
        """A segment that says of every output how long it is held, and whether it leaves."""
        readers: dict[int, list[int]] = defaultdict(list)
        savers: dict[int, int] = {}
        for i, part in enumerate(parts):
            for dep in part.deps:
                readers[dep].append(i)
            for source, _ in part.saved_from:
                savers.setdefault(source, i)
        until = [0] * len(parts)
        for i in reversed(range(len(parts))):
            part, leaves = parts[i], (index, i) in self.left
            # What a view (or a collective without a forward) looks at is held as long as it is.
            ends = [until[r] if parts[r].shares_memory else r for r in readers[i]]
            until[i] = len(parts) if leaves else max(ends, default=i)
            until[i] = min(until[i], savers.get(i, until[i]))
            saved_here = part.freed_by == i or (part.param and part.saved_bytes)
            freed = i if saved_here else until[i]
            if (part.freed_by, part.leaves) != (freed, leaves):
                parts[i] = replace(part, freed_by=freed, leaves=leaves)
        return Segment(
            chunk.nodes[0].name, tuple(parts), 1, sum(self.entering.get(index, {}).values())
        )


def _deps(inputs: Iterable[Place], index: int) -> tuple[int, ...]:
    """Places as indices within chunk `index`."""
    return tuple(dict.fromkeys(part if chunk == index else -1 for chunk, part in inputs))
