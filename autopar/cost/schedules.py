"""Pipeline schedules: the order of every stage's work, and when each piece of it runs.

Stages hold `chunks` pieces of the model each (virtual stages: piece `c` of stage `s` is number
`c * stages + s` of the chain). GPipe: arXiv:1811.06965. 1F1B and the interleaved schedule:
arXiv:2104.04473, whose bubbles are (p - 1) / m and (p - 1) / (v m) of the ideal time. Zero bubble:
ZB-H1 of arXiv:2401.10241, where gradients of weights fill the gaps at the memory of 1F1B and
(p - 1) (F + B - W) seconds are left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.errors import UserError

KINDS = ("gpipe", "1f1b", "interleaved", "zero_bubble")

FORWARD, BACKWARD, WEIGHTS = 0, 1, 2
Op = tuple[int, int, int]  # what, chunk, micro-batch


@dataclass(frozen=True)
class Schedule:
    """A pipeline of `stages` devices (or groups of them), each with `chunks` pieces of the model.

    Raises UserError where the kind is unknown or does not go with the number of chunks.
    """

    stages: int
    chunks: int = 1
    kind: str = "1f1b"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"unknown pipeline schedule {self.kind!r}", fix=f"use one of {', '.join(KINDS)}"
            )
        if self.stages < 1 or self.chunks < 1:
            raise UserError(
                f"a pipeline of {self.stages} stages with {self.chunks} chunks each",
                fix="use at least one stage and one chunk",
            )
        if self.chunks > 1 and self.kind != "interleaved":
            raise UserError(
                f"the schedule {self.kind} has one chunk per stage, not {self.chunks}",
                fix="use the schedule interleaved, or one chunk",
            )

    def __str__(self) -> str:
        chunks = f" of {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{self.kind}, {self.stages} stages{chunks}"


@dataclass(frozen=True)
class Work:
    """What one piece of the model costs per micro-batch: seconds, and bytes from F to B (or W).

    `backward_s` makes gradients of inputs (of everything, where weights are not split off),
    `weights_s` those of parameters. `send_s` is the transfer of the output to the next piece,
    `send_back_s` of the gradient to the one before.
    """

    forward_s: float
    backward_s: float
    weights_s: float = 0.0
    saved_bytes: float = 0.0
    send_s: float = 0.0
    send_back_s: float = 0.0


@dataclass(frozen=True)
class Executed:
    """When every stage did what: `ops[s]` in order with `start[s]` and `end[s]`, in seconds."""

    ops: tuple[tuple[Op, ...], ...]
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]

    @property
    def makespan_s(self) -> float:
        return max(end[-1] for end in self.end)


def order(schedule: Schedule, stage: int, micro_batches: int) -> list[Op]:
    """The work of one stage in order; of zero bubble without the weights, which fill gaps."""
    m, v = micro_batches, schedule.chunks
    if schedule.kind == "gpipe":
        return [(FORWARD, 0, i) for i in range(m)] + [(BACKWARD, 0, i) for i in range(m)]
    forwards, backwards = _turns(schedule, m)
    warmup = schedule.stages - stage - 1
    if v > 1:
        warmup = 2 * warmup + (v - 1) * _per_round(schedule, m)
    warmup = min(warmup, m * v)
    steady = zip(forwards[warmup:], backwards, strict=False)
    return [
        *forwards[:warmup],
        *(op for pair in steady for op in pair),
        *backwards[m * v - warmup :],
    ]


@lru_cache(maxsize=8)
def _turns(schedule: Schedule, micro_batches: int) -> tuple[list[Op], list[Op]]:
    """The forwards and the backwards of every stage in order: rounds of each chunk in turn."""
    per_round, v = _per_round(schedule, micro_batches), schedule.chunks
    rounds = range(0, micro_batches, per_round)
    inside = range(per_round)
    return (
        [(FORWARD, c, first + i) for first in rounds for c in range(v) for i in inside],
        [(BACKWARD, c, first + i) for first in rounds for c in reversed(range(v)) for i in inside],
    )


def _per_round(schedule: Schedule, micro_batches: int) -> int:
    """Micro-batches that go through one chunk before the next chunk has its turn."""
    if schedule.chunks == 1:
        return micro_batches
    rounds = max(1, micro_batches // schedule.stages)
    if micro_batches % rounds:
        raise UserError(
            f"{micro_batches} micro-batches do not divide into rounds of {schedule.stages} stages",
            fix=f"use a multiple of {schedule.stages} micro-batches, or another schedule",
        )
    return micro_batches // rounds


def execute(
    schedule: Schedule, work: Sequence[Work], micro_batches: int, overlap_sends: bool = True
) -> Executed:
    """Run a schedule; `work[c * stages + s]` is chunk `c` of stage `s`.

    Transfers run beside compute, or else keep the sender (not the receiver) busy.
    """
    if len(work) != schedule.stages * schedule.chunks:
        raise ValueError(f"{len(work)} pieces for {schedule}")
    if micro_batches < 1:
        raise ValueError(f"{micro_batches} micro-batches")
    if not overlap_sends:
        last = len(work) - 1
        work = [
            Work(
                w.forward_s + (w.send_s if i < last else 0.0),
                w.backward_s + (w.send_back_s if i else 0.0),
                w.weights_s,
                w.saved_bytes,
            )
            for i, w in enumerate(work)
        ]
    if schedule.kind == "zero_bubble":
        return _fill_gaps(schedule, work, micro_batches)
    return _in_order(schedule, work, micro_batches)


def _in_order(schedule: Schedule, work: Sequence[Work], m: int) -> Executed:
    """Every stage does its work in a fixed order, each piece as soon as its input is there."""
    p, count = schedule.stages, len(work)
    unknown = -1.0
    arrived = [[[unknown] * m for _ in range(count)] for _ in range(2)]  # inputs, gradients
    arrived[FORWARD][0] = [0.0] * m
    seconds = ([w.forward_s for w in work], [w.backward_s + w.weights_s for w in work])
    send = ([w.send_s for w in work], [w.send_back_s for w in work])
    ops = [order(schedule, stage, m) for stage in range(p)]
    starts: list[list[float]] = [[] for _ in range(p)]
    ends: list[list[float]] = [[] for _ in range(p)]
    at, free = [0] * p, [0.0] * p
    queue, queued = deque(range(p)), [True] * p
    while queue:
        stage = queue.popleft()
        queued[stage] = False
        mine, now, i = ops[stage], free[stage], at[stage]
        start, end = starts[stage], ends[stage]
        begun = i
        while i < len(mine):
            what, chunk, batch = mine[i]
            piece = chunk * p + stage
            ready = arrived[what][piece][batch]
            if ready < 0:
                break
            if ready > now:
                now = ready
            start.append(now)
            now += seconds[what][piece]
            end.append(now)
            i += 1
            if what == FORWARD:
                if piece + 1 < count:
                    arrived[FORWARD][piece + 1][batch] = now + send[FORWARD][piece]
                else:
                    arrived[BACKWARD][piece][batch] = now
            elif piece:
                arrived[BACKWARD][piece - 1][batch] = now + send[BACKWARD][piece]
        at[stage], free[stage] = i, now
        if i > begun:
            for other in ((stage + 1) % p, (stage - 1) % p):
                if not queued[other] and at[other] < len(ops[other]):
                    queued[other] = True
                    queue.append(other)
    if any(at[s] < len(ops[s]) for s in range(p)):
        raise RuntimeError(f"{schedule} with {m} micro-batches waits for itself")
    return _executed(ops, starts, ends)


def _fill_gaps(schedule: Schedule, work: Sequence[Work], m: int) -> Executed:
    """1F1B with the gradients of weights put where a stage would wait, else when memory asks."""
    p = schedule.stages
    plan = [order(schedule, stage, m) for stage in range(p)]
    unknown = -1.0
    arrived = [[[unknown] * m for _ in range(p)] for _ in range(2)]
    arrived[FORWARD][0] = [0.0] * m
    ops: list[list[Op]] = [[] for _ in range(p)]
    starts: list[list[float]] = [[] for _ in range(p)]
    ends: list[list[float]] = [[] for _ in range(p)]
    at, free = [0] * p, [0.0] * p
    weights = [0] * p  # gradients of weights that are done
    forwards, backwards = [0] * p, [0] * p

    def run(stage: int, op: Op, begin: float, seconds: float) -> float:
        ops[stage].append(op)
        starts[stage].append(begin)
        free[stage] = begin + seconds
        ends[stage].append(free[stage])
        return free[stage]

    left = sum(map(len, plan)) + p * m
    while left:
        # The stage that is free first decides first: nothing that it waits for can still change.
        progress = False
        for stage in sorted(range(p), key=lambda s: free[s]):
            mine, w = plan[stage], work[stage]
            pending = backwards[stage] - weights[stage]
            op = mine[at[stage]] if at[stage] < len(mine) else None
            ready = arrived[op[0]][stage][op[2]] if op is not None else unknown
            full = (
                op is not None
                and op[0] == FORWARD
                and forwards[stage] - weights[stage] >= p
                and pending > 0
            )
            if op is not None and ready < 0:
                # Not known yet: it is not before the next event of the others.
                horizon = min((free[s] for s in range(p) if s != stage), default=unknown)
                if not pending or free[stage] + w.weights_s > horizon + _least(work, stage, p):
                    continue
                run(stage, (WEIGHTS, 0, weights[stage]), free[stage], w.weights_s)
                weights[stage] += 1
            elif op is None or full or (pending and ready > free[stage] + w.weights_s * (1 - 1e-9)):
                if not pending:
                    continue
                run(stage, (WEIGHTS, 0, weights[stage]), free[stage], w.weights_s)
                weights[stage] += 1
            else:
                begin = max(free[stage], ready)
                _, _, batch = op
                at[stage] += 1
                if op[0] == FORWARD:
                    now = run(stage, op, begin, w.forward_s)
                    forwards[stage] += 1
                    if stage + 1 < p:
                        arrived[FORWARD][stage + 1][batch] = now + w.send_s
                    else:
                        arrived[BACKWARD][stage][batch] = now
                else:
                    now = run(stage, op, begin, w.backward_s)
                    backwards[stage] += 1
                    if stage:
                        arrived[BACKWARD][stage - 1][batch] = now + w.send_back_s
            left -= 1
            progress = True
            break
        if not progress:
            raise RuntimeError(f"{schedule} with {m} micro-batches waits for itself")
    return _executed(ops, starts, ends)


def _least(work: Sequence[Work], stage: int, stages: int) -> float:
    """The least time from the start of a neighbour's work to its arrival here."""
    found = []
    if stage:
        found.append(work[stage - 1].forward_s + work[stage - 1].send_s)
    if stage + 1 < stages:
        found.append(work[stage + 1].backward_s + work[stage + 1].send_back_s)
    return min(found, default=0.0)


def _executed(
    ops: Sequence[Sequence[Op]], starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]]
) -> Executed:
    return Executed(tuple(map(tuple, ops)), tuple(map(tuple, starts)), tuple(map(tuple, ends)))


def peak_in_flight(schedule: Schedule, executed: Executed, work: Sequence[Work]) -> list[float]:
    """Bytes of activations that each stage holds at most; they live until the weights' gradient."""
    frees = WEIGHTS if schedule.kind == "zero_bubble" else BACKWARD
    found = []
    for stage, ops in enumerate(executed.ops):
        level = peak = 0.0
        for what, chunk, _ in ops:
            nbytes = work[chunk * schedule.stages + stage].saved_bytes
            if what == FORWARD:
                level += nbytes
                peak = max(peak, level)
            elif what == frees:
                level -= nbytes
        found.append(peak)
    return found
