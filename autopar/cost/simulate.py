"""Simulate a priced step on one device: copies of blocks and micro-batches that repeat are reused.

After every copy of a segment (and every micro-batch) the state of the machine is compared with that
after the one before: work left in flight, buckets being filled, gathers ahead. Where it is the
same, so is everything that follows, and the remaining copies are the last one again, later: this is
exact up to rounding. Where micro-batches never reach such a state (a growing backlog of
reductions), the last one of a few stands for the rest, and the timeline says `exact=False`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cluster import Cluster
from .filling import Filling, fill, filling_of, repeats_that_fit
from .links import Flow
from .prepared import Prepared, prepare
from .schedules import Schedule
from .simulator import Gathered, How, Machine
from .step import Step
from .timeline import Points, Span, Timeline

MOST_RECORDED = 60_000  # spans or memory events that repeated micro-batches may add
MOST_MICRO_BATCHES = 12  # simulated one by one before the last stands for the rest
FEW = 3  # repeats whose memory is followed one by one where nothing is recorded
MOST_IN_FLIGHT = 256  # beyond it a state is not compared: its backlog grows

Signature = tuple[Any, ...]
Event = tuple[float, float, float]  # when, late, bytes


def how_for(cluster: Cluster | None, how: How | None = None) -> How:
    """What to simulate a step with on a cluster.

    Ranks that are threads of a CPU communicate on the cores that compute: inside a host nothing
    overlaps. Between hosts it does. A device may say by how much communication slows compute down
    (`overlap_slowdown`).
    """
    made = how or How()
    if made.slowdown is None:
        slowdown = cluster.device.overlap_slowdown if cluster is not None else 0.0
        made = replace(made, slowdown=slowdown)
    if cluster is not None and cluster.single is not None:
        several = len(cluster.levels) > 1
        made = replace(made, overlap=made.overlap and several, overlap_from=1, prefetch=0)
    return made if made.overlap else replace(made, prefetch=0)


def simulate(
    step: Step,
    cluster: Cluster | None = None,
    *,
    schedule: Schedule | None = None,
    how: How | None = None,
    flat: bool = False,
) -> Timeline:
    """One training step on one device over time, or on the stages of a pipeline.

    `cluster` says whether communication overlaps with compute (`how_for`); without one it does.
    `flat` simulates every copy and every micro-batch by itself.
    """
    if schedule is not None and schedule.stages > 1:
        from .pipeline import simulate_pipeline  # built on this module

        return simulate_pipeline(step, schedule, cluster, how=how)
    return _Run(step, how_for(cluster, how), flat).timeline()


@dataclass(frozen=True)
class Passes:
    """What one device does with a micro-batch, in the middle of a step and at its ends.

    Seconds; waits for collectives included. `first_s` is what the first micro-batch takes longer
    (what is gathered once), `tail_s` how long reductions go on after the last backward, `weights_s`
    the share of `backward_s` that makes gradients of parameters. `saved_bytes` live from a forward
    to its backward, `state_bytes` always (gradients included), `working_bytes` is what a single
    micro-batch needs beyond both.
    """

    forward_s: float
    backward_s: float
    weights_s: float
    first_s: float
    tail_s: float
    compute_s: float
    exposed_s: dict[str, float]
    last_exposed_s: dict[str, float]
    saved_bytes: float
    state_bytes: float
    working_bytes: float


def passes_of(step: Step, how: How) -> Passes:
    """Simulate four micro-batches of a step: the first, two in the middle, the last."""
    run = _Run(replace(step, micro_batches=4), replace(how, record=False), False)
    machine = run.machine
    times, compute = [0.0], [0.0]
    exposed: list[dict[tuple[str, str], float]] = [{}]
    for k in range(4):
        for backward in (False, True):
            run.one_way(backward, k == 0, k == 3)
            times.append(machine.time)
            exposed.append(dict(machine.exposed))
            compute.append(machine.compute_s)
    ended = machine.time
    machine.drain()
    taken = np.diff(times)
    whole = [float(taken[2 * k] + taken[2 * k + 1]) for k in range(4)]
    saved = sum(unit.kept * copies for unit, copies in run.units)
    gathered = sum(s.copies * p.saved_bytes for s, p in step.parts() if p.param)
    state = sum(step.state_bytes.values()) + gathered
    # Of two micro-batches: the second one has the gradients of the first beside it.
    few = replace(step, micro_batches=min(2, step.micro_batches))
    alone = _Run(few, replace(how, record=False), False).timeline()
    return Passes(
        float(taken[4]),
        float(taken[5]),
        sum(s.copies * p.weight_s for s, p in step.parts()),
        max(0.0, whole[0] - whole[1]) + max(0.0, whole[3] - whole[2]),
        machine.time - ended,
        compute[6] - compute[4],
        _named(_difference(exposed[6], exposed[4])),
        _named(_difference(machine.exposed, exposed[6])),
        saved,
        state,
        max(0.0, alone.peak_bytes - state - saved),
    )


def _difference(
    now: dict[tuple[str, str], float], then: dict[tuple[str, str], float]
) -> dict[tuple[str, str], float]:
    return {key: seconds - then.get(key, 0.0) for key, seconds in now.items()}


@dataclass
class _Mark:
    """The machine's books at some moment."""

    time: float
    numbers: tuple[float, float, float]
    exposed: dict[tuple[str, str], float]
    busy: dict[tuple[str, str], float]
    spans: int
    memory: int


@dataclass
class _Run:
    step: Step
    how: How
    flat: bool
    machine: Machine = field(init=False)
    units: list[tuple[Prepared, int]] = field(init=False)
    exact: bool = True

    def __post_init__(self) -> None:
        self.machine = Machine(self.how)
        self.units = [
            (prepare(segment, i, self.how.bucket_bytes, self.how.most_s_per_byte), segment.copies)
            for i, segment in enumerate(self.step.segments)
        ]

    def timeline(self) -> Timeline:
        machine, step = self.machine, self.step
        self._micro_batches()
        machine.drain()
        end = machine.time + step.optimizer_s
        if self.how.record and step.optimizer_s:
            machine.spans.append(Span("optimizer", "compute", machine.time, end, "optimizer"))
        memory = staircase(machine.memory, base_bytes(step), end)
        peak = int(np.argmax(memory[:, 1]))
        return Timeline(
            end,
            machine.compute_s,
            step.optimizer_s,
            _named(machine.exposed),
            _named(machine.links.busy_s),
            float(memory[peak, 1]),
            float(memory[peak, 0]),
            _phase_at(machine.spans, float(memory[peak, 0])),
            memory,
            recompute_s=machine.recompute_s,
            slowdown_s=machine.slowdown_s,
            micro_batches=step.micro_batches,
            spans=tuple(machine.spans),
            exact=self.exact,
        )

    # -- repetition -----------------------------------------------------------------------------

    def _micro_batches(self) -> None:
        count = self.step.micro_batches
        done = 0
        before: Signature | None = None
        before_s, backlog = 0.0, self.machine.links.backlog()
        while done < count:
            mark = self._mark()
            self._micro_batch(done == 0, done == count - 1)
            done += 1
            now, elapsed = self._signature(()), self.machine.time - mark.time
            waiting = self.machine.links.backlog()
            left = count - 1 - done  # the last one is different
            steady = done >= 4 and abs(elapsed - before_s) <= 1e-9 * elapsed
            settled = now == before or steady or done == MOST_MICRO_BATCHES
            if settled and left > 0 and done > 1 and not self.flat:
                self._repeat(mark, left)
                if now != before:  # what waits grows by as much every time
                    self.exact = False
                    self.machine.links.grow(waiting, backlog, left)
                done += left
            before, before_s, backlog = now, elapsed, waiting

    def _micro_batch(self, first: bool, last: bool) -> None:
        self.one_way(False, first, last)
        self.one_way(True, first, last)

    def one_way(self, backward: bool, first: bool, last: bool) -> None:
        """Forward or backward of one micro-batch, through all segments."""
        self.machine.carried = ()
        self._pass(self.units[::-1] if backward else self.units, backward, first, last)
        if backward:
            self.machine.flush()

    def _pass(
        self, units: Sequence[tuple[Prepared, int]], backward: bool, first: bool, last: bool
    ) -> None:
        """Forward or backward through all copies, gathers of parameters some copies ahead."""
        machine, ahead = self.machine, self.how.prefetch
        order = [unit for unit, copies in units for _ in range(copies)]
        gathered: deque[Gathered] = deque()
        asked = 0

        def ask(until: int) -> None:
            nonlocal asked
            while asked <= min(until, len(order) - 1):
                gathered.append(machine.gather(order[asked], backward, first))
                asked += 1

        at = 0
        for unit, copies in units:
            before: Signature | None = None
            filled: Filling = {}
            copy = 0
            while copy < copies:
                mark = self._mark()
                machine.segment = unit.segment.name
                machine.copy = copies - 1 - copy if backward else copy
                ask(at + ahead)
                if backward:
                    machine.backward(unit, gathered.popleft(), first, last)
                else:
                    machine.forward(unit, gathered.popleft())
                at, copy = at + 1, copy + 1
                if copies < 4 or self.flat:
                    continue
                now, filling = self._signature(gathered), filling_of(machine.filling)
                left = copies - copy - ahead
                if now == before and left > 0:
                    fit = repeats_that_fit(filled, filling, self.how.bucket_bytes)
                    left = int(min(left, fit))
                    if left > 0:
                        fill(filled, filling, left)
                        self._repeat(mark, left, -1 if backward else 1)
                        at, copy, asked = at + left, copy + left, asked + left
                        filling = filling_of(machine.filling)
                before, filled = now, filling

    def _signature(self, gathered: Sequence[Gathered] | deque[Gathered]) -> Signature:
        """The state of the machine without names and times: equal states go on equally.

        Until a bucket of gradients is full: what is in them is `filling_of`.
        """
        machine = self.machine
        if sum(map(len, machine.links.queues.values())) > MOST_IN_FLIGHT:
            return (object(),)  # like no other
        place: dict[int, tuple[str, int]] = {
            id(flow): (axis, i)
            for axis, queue in machine.links.queues.items()
            for i, flow in enumerate(queue)
        }

        def where(flow: Flow) -> tuple[str, int] | None:
            return place.get(id(flow))

        return (
            machine.links.signature(),
            tuple(map(where, machine.carried)),
            tuple(tuple((i, where(f)) for i, f in g.items()) for g in gathered),
        )

    def _mark(self) -> _Mark:
        m = self.machine
        return _Mark(
            m.time,
            (m.compute_s, m.recompute_s, m.slowdown_s),
            dict(m.exposed),
            dict(m.links.busy_s),
            len(m.spans),
            len(m.memory),
        )

    def _repeat(self, mark: _Mark, times: int, copies: int = 0) -> None:
        """Go on as if what happened since the mark had happened so many times more.

        `copies` is by how much the number of the copy changes each time.
        """
        m = self.machine
        period = m.time - mark.time
        for name, then in zip(
            ("compute_s", "recompute_s", "slowdown_s"), mark.numbers, strict=True
        ):
            now = getattr(m, name)
            setattr(m, name, now + times * (now - then))
        for books, old in ((m.exposed, mark.exposed), (m.links.busy_s, mark.busy)):
            for key, seconds in list(books.items()):
                books[key] = seconds + times * (seconds - old.get(key, 0.0))
        spans, events = m.spans[mark.spans :], m.memory[mark.memory :]
        if len(spans) * times <= MOST_RECORDED:
            for k in range(1, times + 1):
                m.spans += [later(span, k * period, k * copies) for span in spans]
        if not self.how.record and times > FEW:
            # Only the peak is asked for: it is at either end of what goes up or down steadily.
            self._shifted(events, period, (1,))
            net = sum(nbytes for _, _, nbytes in events)
            m.memory.append((m.time + (times - 2) * period, -1.0, net * (times - FEW)))
            self._shifted(events, period, (times - 1, times))
        elif len(events) * times <= MOST_RECORDED:
            self._shifted(events, period, range(1, times + 1))
        elif net := sum(nbytes for _, _, nbytes in events):
            m.memory.append((m.time, 0.0, net * times))
        m.time += times * period
        m.links.shift(times * period)

    def _shifted(self, events: Sequence[Event], period: float, times: Iterable[int]) -> None:
        """Book events again, so many periods later each."""
        memory = self.machine.memory
        for k in times:
            late = k * period
            memory += [(at + late, order, nbytes) for at, order, nbytes in events]


def later(span: Span, seconds: float, copies: int) -> Span:
    """The same span later, of another copy."""
    start, end = span.start_s + seconds, span.end_s + seconds
    copy = span.copy + copies
    return Span(span.name, span.stream, start, end, span.phase, span.nbytes, span.segment, copy)


def base_bytes(step: Step) -> float:
    """What is in memory before the step: state, without the gradients that the step makes."""
    made = sum(s.copies * p.gradient_bytes for s, p in step.parts())
    return sum(step.state_bytes.values()) - made


def staircase(events: Sequence[Event], base: float, end: float) -> Points:
    """Bytes in use from every moment on, of (when, late, bytes that are taken or given back).

    Of events at one moment (up to rounding) those with `late` set come last: what a collective
    gives back when it is done is still there when an op takes memory at the same time.
    """
    if not events:
        return np.array([[0.0, base], [end, base]])
    changes: NDArray[np.float64] = np.array(events)
    moment = np.round(changes[:, 0] / max(end * 1e-10, 1e-300))
    changes = changes[np.lexsort((changes[:, 1], moment))]
    level = base + np.cumsum(changes[:, 2])
    made = np.column_stack([changes[:, 0], level])
    return np.vstack([[0.0, base], made, [end, level[-1]]])


def _named(books: dict[tuple[str, str], float]) -> dict[str, float]:
    return {f"{kind} {axis}": seconds for (kind, axis), seconds in sorted(books.items())}


def _phase_at(spans: Sequence[Span], at: float) -> str:
    """What the compute stream does at a moment."""
    running = [s for s in spans if s.stream == "compute" and s.start_s <= at <= s.end_s]
    return running[-1].phase if running else ""
