"""One device over time: a compute stream, collectives in flight, and memory as it comes and goes.

The machine runs one copy of a segment at a time, forward or backward, in program order. Compute
waits only for what it needs: an activation's collective blocks its readers, gathers of parameters
are issued a block ahead, and gradients are reduced in buckets that nothing waits for before the
optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .filling import BucketKey
from .links import Flow, Links
from .prepared import Prepared
from .recompute import FULL, NONE
from .step import Part
from .timeline import Span

BUCKET_BYTES = 25 * 2**20  # of passes/bucket_collectives.py, and of DistributedDataParallel


@dataclass(frozen=True)
class How:
    """What a step is simulated with.

    `overlap`: whether collectives run beside compute at all, and `overlap_from`: those that cross
    which level of the cluster, and levels beyond it. `prefetch`: blocks by which gathers of
    parameters are ahead. `slowdown`: how much longer compute takes while something is in flight
    (0.1: a tenth; None: what the cluster's profile says). `reduce_every`: whether gradients are
    reduced in every micro-batch (None: those of parameters that are gathered anew in each, ZeRO-3,
    are). `split_backward`: whether gradients of inputs come before those of weights, so that their
    collectives overlap. `most_s_per_byte`: see `recomputed_parts`. `record`: whether to keep spans
    (a ranking does not need them).
    """

    overlap: bool = True
    overlap_from: int = 0
    prefetch: int = 1
    bucket_bytes: float = BUCKET_BYTES
    slowdown: float | None = None
    reduce_every: bool | None = None
    split_backward: bool = True
    most_s_per_byte: float | None = None
    record: bool = True


Gathered = dict[int, Flow]


@dataclass(slots=True)
class Machine:
    """A device in the middle of a step. `time` is when its compute stream is free."""

    how: How
    time: float = 0.0
    links: Links = field(default_factory=Links)
    compute_s: float = 0.0
    recompute_s: float = 0.0
    slowdown_s: float = 0.0
    exposed: dict[tuple[str, str], float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    memory: list[tuple[float, float, float]] = field(default_factory=list)  # when, late, bytes
    filling: dict[BucketKey, Flow] = field(default_factory=dict)
    before: dict[str, Flow] = field(default_factory=dict)
    carried: tuple[Flow, ...] = ()
    phase: str = "forward"
    segment: str = ""
    copy: int = 0

    # -- streams --------------------------------------------------------------------------------

    def compute(self, name: str, seconds: float) -> None:
        """Run an op on the compute stream, slower while anything is in flight."""
        if seconds <= 0:
            return
        start = self.time
        if self.how.slowdown and any(self.links.queues.values()):
            self._slowed(seconds)
        else:
            self.time += seconds
        self.compute_s += self.time - start
        if self.phase == "recompute":
            self.recompute_s += self.time - start
        if self.how.record:
            self._span(name, start, self.time, self.phase)

    def _span(self, name: str, start: float, end: float, phase: str) -> None:
        span = Span(name, "compute", start, end, phase, 0.0, self.segment, self.copy)
        self.spans.append(span)

    def _slowed(self, seconds: float) -> None:
        left, slowed = seconds, 1 / (1 + (self.how.slowdown or 0.0))
        while left > 0:
            self.links.advance(self.time)
            rate = slowed if self.links.active() else 1.0
            until = self.time + left / rate
            if rate == 1.0 or not self.links.step(until):
                self.slowdown_s += (until - self.time) * (1 - rate)
                self.time = until
                return
            self.slowdown_s += (self.links.now - self.time) * (1 - rate)
            left -= (self.links.now - self.time) * rate
            self.time = self.links.now

    def issue(self, flow: Flow) -> None:
        """Start a collective; where it does not overlap, also wait for it."""
        flow.segment, flow.copy = self.segment, self.copy
        self.links.issue(flow, self.time)
        if not self.how.overlap or flow.level < self.how.overlap_from:
            self.wait(flow)

    def wait(self, flow: Flow) -> None:
        """Hold the compute stream until a collective is done."""
        if flow.done and flow.end <= self.time:
            return
        if not flow.done:
            self.links.advance(self.time)
        end = self.links.wait(flow)
        if end > self.time:
            key = (flow.kind, flow.axis)
            self.exposed[key] = self.exposed.get(key, 0.0) + end - self.time
            if self.how.record:
                self._span(flow.name, self.time, end, "wait")
            self.time = end

    def hold(self, nbytes: float) -> None:
        """Take memory from now on; give it back where negative."""
        if nbytes:
            self.memory.append((self.time, 0.0, nbytes))

    def settle(self) -> None:
        """Follow the links to the present, and book what finished."""
        self.links.advance(self.time)
        for flow in self.links.finished:
            if flow.held_bytes or flow.gradient_bytes:
                self.memory.append((flow.end, 1.0, flow.gradient_bytes - flow.held_bytes))
            if self.how.record:
                stream = f"level {flow.level} {flow.axis}"
                where = (flow.segment, flow.copy)
                self.spans.append(
                    Span(flow.name, stream, flow.start, flow.end, flow.phase, flow.nbytes, *where)
                )
        self.links.finished.clear()

    # -- parameters -----------------------------------------------------------------------------

    def gather(self, unit: Prepared, backward: bool, first: bool) -> Gathered:
        """Issue the gathers of the parameters of one copy, in buckets."""
        flows: Gathered = {}
        parts = unit.segment.parts
        for bucket in unit.buckets:
            part = parts[bucket[0]]
            if (backward and not part.regather) or (part.once and not first):
                continue
            flow = Flow(
                _bucket_name(parts, bucket),
                part.kind,
                part.axis,
                part.level,
                sum(parts[i].forward_s for i in bucket),
                "backward" if backward else "forward",
                sum(parts[i].sent_bytes for i in bucket),
                tuple(flows[d] for i in bucket for d in parts[i].deps if d in flows),
            )
            flows.update(dict.fromkeys(bucket, flow))
            if not self._lazily(unit, backward):
                self._unpack(unit, bucket)
            self.issue(flow)
        return flows

    def _lazily(self, unit: Prepared, backward: bool) -> bool:
        """Whether a bucket is gathered right before its first use, and dropped after the last.

        Not where the backward runs a copy again, which keeps what it gathers until it is through.
        """
        return self.how.prefetch == 0 and not (backward and unit.mode != NONE)

    def _unpack(self, unit: Prepared, bucket: Sequence[int]) -> float:
        """Hold what a message brought; several parameters are copied out of it."""
        nbytes = sum(unit.segment.parts[i].output_bytes for i in bucket)
        self.hold(nbytes)
        if len(bucket) > 1:
            self.moment(nbytes)
        return nbytes

    def moment(self, nbytes: float) -> None:
        """Take memory and give it back at once."""
        self.hold(nbytes)
        self.hold(-nbytes)

    def _release(self, unit: Prepared, gathered: Gathered, keep: bool) -> None:
        """Give back what was gathered for one copy; `keep`: what is saved stays."""
        if self._lazily(unit, backward=not keep):
            return
        parts = unit.segment.parts
        self.hold(
            -sum(parts[i].output_bytes - (parts[i].saved_bytes if keep else 0.0) for i in gathered)
        )

    # -- forward --------------------------------------------------------------------------------

    def forward(self, unit: Prepared, gathered: Gathered) -> None:
        """Run one copy's forward."""
        self.phase = "forward"
        self.carried = self._run(unit, gathered, None, saving=unit.mode == NONE)
        if unit.mode != NONE:
            self.hold(unit.kept)
        self._release(unit, gathered, keep=True)
        self.settle()

    def _run(
        self, unit: Prepared, gathered: Gathered, only: frozenset[int] | None, saving: bool
    ) -> tuple[Flow, ...]:
        """Run parts in forward order; the collectives still in flight that leave the copy."""
        parts = unit.segment.parts
        pending: dict[int, tuple[Flow, ...]] = {i: (flow,) for i, flow in gathered.items()}
        pending[-1] = self.carried if only is None else ()
        leaving: list[Flow] = []
        lazily = only is None and self.phase == "forward" and self._lazily(unit, backward=False)
        for i, part in enumerate(parts):
            if part.param or (only is not None and i not in only):
                self._free(unit, i, only)
                continue
            if lazily:
                for bucket in unit.opens[i]:
                    if unit.buckets[bucket][0] in gathered:
                        self._unpack(unit, unit.buckets[bucket])
            before = tuple(f for d in part.deps for f in pending.get(d, ()) if not f.done)
            held = part.output_bytes if i in unit.held else 0.0
            if part.is_compute:
                for flow in before:
                    self.wait(flow)
                self.hold(held + (part.saved_bytes if saving else 0.0))
                self.compute(part.name, part.forward_s)
            elif part.forward_s:
                flow = self._flow(part, False, before)
                self.hold(held)
                self.issue(flow)
                pending[i] = (flow,)
            else:
                pending[i] = before
            if part.leaves:
                leaving.extend(pending.get(i, ()))
            if lazily:
                read = [j for j in unit.closes[i] if j in gathered]
                self.hold(-sum(parts[j].output_bytes - parts[j].saved_bytes for j in read))
            self._free(unit, i, only)
        self._free(unit, len(parts), only)
        return tuple(f for f in leaving if not f.done)

    def _free(self, unit: Prepared, at: int, only: frozenset[int] | None) -> None:
        parts = unit.segment.parts
        freed = (j for j in unit.freed[at] if only is None or j in only)
        self.hold(-sum(parts[j].output_bytes for j in freed))

    def _flow(self, part: Part, backward: bool, before: tuple[Flow, ...]) -> Flow:
        return Flow(
            part.name,
            part.backward_kind if backward else part.kind,
            part.axis,
            part.level,
            part.backward_s if backward else part.forward_s,
            self.phase,
            part.backward_sent_bytes if backward else part.sent_bytes,
            before,
        )

    # -- backward -------------------------------------------------------------------------------

    def backward(self, unit: Prepared, gathered: Gathered, first: bool, last: bool) -> None:
        """Run one copy's backward, its recomputation before it.

        `first` and `last` say which micro-batch it is: gradients appear in the first, and are
        reduced in the last.
        """
        parts = unit.segment.parts
        working = 0.0
        if unit.mode != NONE:
            self.phase = "recompute"
            entering, self.carried = self.carried, ()
            only = None if unit.mode == FULL else unit.again
            self._run(unit, gathered, only, saving=False)
            self.carried = entering
            working = sum(p.saved_bytes for p in parts if not p.param) - unit.kept
            self.hold(max(working, 0.0))
        self.phase = "backward"
        self._backward_parts(unit, gathered, first, last)
        if unit.mode != NONE:
            self.hold(-max(working, 0.0) - unit.kept)
        if last:  # what stayed gathered over the micro-batches
            self.hold(-sum(p.saved_bytes for p in parts if p.param and p.once))
        self._release(unit, gathered, keep=False)
        if self.how.prefetch == 0:  # what is gathered for a block is also reduced with it
            self.flush(only_regathered=True)
        self.settle()

    def _backward_parts(self, unit: Prepared, gathered: Gathered, first: bool, last: bool) -> None:
        parts = unit.segment.parts
        waits: dict[int, list[Flow]] = {}
        open_readers = [len(readers) for readers in unit.readers]
        issued: set[int] = set()
        gradients: dict[int, float] = {}  # of outputs, held until their part has run
        lazily = self._lazily(unit, backward=True)
        there: dict[int, float] = {}
        for i in reversed(range(len(parts))):
            part = parts[i]
            if lazily and part.is_compute and part.backward_s:
                there = self._gather_again(unit, i, gathered, there)
            if part.leaves:
                waits.setdefault(i, []).extend(self.carried)
            if part.param:
                self._reduce(part, first, last)
            elif part.is_compute:
                self._backward_compute(unit, i, gathered, waits, open_readers, issued, gradients)
                if first:
                    self.hold(part.gradient_bytes)
                if unit.mode == NONE:
                    self.hold(-part.saved_bytes)
            elif i not in issued:
                self._backward_collective(part, i, waits)
            self.hold(-gradients.pop(i, 0.0))
        self.hold(-sum(gradients.values()) - sum(there.values()))
        self.carried = tuple(f for f in waits.get(-1, ()) if not f.done)

    def _gather_again(
        self, unit: Prepared, i: int, gathered: Gathered, there: dict[int, float]
    ) -> dict[int, float]:
        """The buckets (and bytes) that are there while part `i` runs: one chain at a time."""
        wanted = [b for b in sorted(unit.wants[i]) if unit.buckets[b][0] in gathered]
        if not wanted:
            return there
        self.hold(-sum(n for b, n in there.items() if b not in wanted))
        return {b: there[b] if b in there else self._unpack(unit, unit.buckets[b]) for b in wanted}

    def _backward_compute(
        self,
        unit: Prepared,
        i: int,
        gathered: Gathered,
        waits: dict[int, list[Flow]],
        open_readers: list[int],
        issued: set[int],
        gradients: dict[int, float],
    ) -> None:
        parts = unit.segment.parts
        part = parts[i]
        split = part.weight_s if self.how.split_backward else 0.0
        if part.backward_s:
            for flow in (*waits.get(i, ()), *(gathered[d] for d in part.deps if d in gathered)):
                self.wait(flow)
            for d in part.deps:
                if d >= 0 and d not in gradients and not parts[d].param:
                    gradients[d] = parts[d].output_bytes if parts[d].backward_s else 0.0
                    self.hold(gradients[d])
            if part.moment_bytes:
                self.moment(part.moment_bytes)
            self.compute(part.name, part.backward_s - split)
        else:
            for d in part.deps:
                waits.setdefault(d, []).extend(waits.get(i, ()))
        for d in part.deps:
            if d < 0:
                continue
            open_readers[d] -= 1
            ready = open_readers[d] == 0 and not parts[d].leaves
            if split and ready and not parts[d].is_compute and not parts[d].param:
                self._backward_collective(parts[d], d, waits)
                issued.add(d)
        self.compute(f"{part.name} weights", split)

    def _backward_collective(self, part: Part, i: int, waits: dict[int, list[Flow]]) -> None:
        """Issue the collective that a gradient goes through; what made the value waits for it."""
        before = tuple(f for f in waits.get(i, ()) if not f.done)
        passed = before
        if part.backward_s:
            flow = self._flow(part, True, before)
            self.issue(flow)
            passed = (flow,)
        for d in part.deps:
            waits.setdefault(d, []).extend(passed)

    def _reduce(self, part: Part, first: bool, last: bool) -> None:
        """Send the gradient of a parameter, or put it into the bucket that is being filled.

        The gradient of a gathered parameter is whole until it is reduced to the stored shard; that
        of a parameter that is stored whole is reduced in place.
        """
        every = self.how.reduce_every if self.how.reduce_every is not None else not part.once
        in_place = not part.kind or part.backward_s == 0
        if in_place and first:
            self.hold(part.gradient_bytes)
        if not in_place and (every or first):
            self.hold(part.output_bytes + part.sum_bytes)
        if part.backward_s == 0 or not (every or last):
            return
        key = (part.backward_kind, part.axis, bool(part.deps), part.regather)
        bucket = self.filling.get(key)
        if bucket is not None and bucket.size_bytes + part.output_bytes > self.how.bucket_bytes:
            self._send(key)
            bucket = None
        if bucket is None:
            bucket = self.filling[key] = Flow(
                part.name, part.backward_kind, part.axis, part.level, 0.0, "backward"
            )
        bucket.work_s += part.backward_s
        bucket.size_bytes += part.output_bytes
        bucket.tensors += 1
        bucket.nbytes += part.backward_sent_bytes
        if not in_place:
            bucket.held_bytes += part.output_bytes + part.sum_bytes
            bucket.gradient_bytes += part.gradient_bytes if first or not every else 0.0
        if part.deps:
            self.before[part.param] = bucket
        elif part.param in self.before:  # on its way through several axes
            bucket.waits_for = (*bucket.waits_for, self.before.pop(part.param))
        if bucket.size_bytes >= self.how.bucket_bytes:
            self._send(key)

    def _send(self, key: BucketKey) -> None:
        flow = self.filling.pop(key)
        for waited in flow.waits_for:
            for other, filling in list(self.filling.items()):
                if filling is waited:
                    self._send(other)
        # A message of several tensors is a copy of them; a sum of one is not made in its place.
        if flow.tensors > 1 or flow.kind == "all_reduce":
            self.moment(flow.size_bytes)
        self.issue(flow)

    def flush(self, only_regathered: bool = False) -> None:
        """Send every bucket that is not full."""
        for key in list(self.filling):
            if key in self.filling and (key[-1] or not only_regathered):
                self._send(key)

    def drain(self) -> None:
        """Wait for everything that is in flight."""
        self.links.advance(self.time)
        for flow in sorted(
            (f for queue in self.links.queues.values() for f in queue), key=lambda f: f.axis
        ):
            self.wait(flow)
        self.settle()


def _bucket_name(parts: Sequence[Part], bucket: tuple[int, ...]) -> str:
    more = f" and {len(bucket) - 1} more" if len(bucket) > 1 else ""
    return parts[bucket[0]].name + more
