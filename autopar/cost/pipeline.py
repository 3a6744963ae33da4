"""Simulate a training step on the stages of a pipeline.

Every stage's forward and backward of a micro-batch is simulated by itself, its own collectives
included (`simulate.passes_of`); the schedule then says when each runs. Reductions of gradients
begin in a stage's last backward of a chunk and go on beside whatever it still does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .cluster import Cluster
from .comm import collective_time
from .schedules import BACKWARD, FORWARD, Executed, Schedule, Work, execute, peak_in_flight
from .simulate import Passes, how_for, passes_of
from .simulator import How
from .stages import stages_of
from .step import Step
from .timeline import Points, Span, StageUse, Timeline

MOST_SPANS = 60_000
_NAMES = ("forward", "backward", "weights")


def transfer_s(cluster: Cluster | None, nbytes: float, level: int = -1) -> float:
    """Seconds to send bytes from one device to one of another stage, across a cluster's level.

    Priced as a broadcast in a group of two: one message over one link.
    """
    if cluster is None or nbytes <= 0:
        return 0.0
    outer = range(len(cluster.levels))[level]
    span = tuple(2 if i == outer else 1 for i in range(len(cluster.levels)))
    return float(collective_time(cluster, "broadcast", nbytes, span))


def simulate_pipeline(
    step: Step,
    schedule: Schedule,
    cluster: Cluster | None = None,
    *,
    how: How | None = None,
    level: int = -1,
    overlap_sends: bool | None = None,
    layers_per_stage: Sequence[int] | None = None,
) -> Timeline:
    """A step cut into stages (`stages_of`), on a schedule; `level` is what stages are apart by.

    `overlap_sends` says whether transfers between stages run beside compute (default: where
    collectives do). The timeline is that of the stage that ends last, its memory that of the stage
    with the highest peak; `stages` has all of them. Micro-batches are the step's.
    """
    pieces = stages_of(step, schedule.stages, schedule.chunks, layers_per_stage)
    return simulate_stages(
        pieces, schedule, cluster, how=how, level=level, overlap_sends=overlap_sends
    )


def simulate_stages(
    pieces: Sequence[Step],
    schedule: Schedule,
    cluster: Cluster | None = None,
    *,
    how: How | None = None,
    level: int = -1,
    overlap_sends: bool | None = None,
    boundary_bytes: Sequence[float] | None = None,
    passes: Sequence[Passes] | None = None,
) -> Timeline:
    """`simulate_pipeline` of pieces that are given: number `c * stages + s` is chunk c of stage s.

    `boundary_bytes[i]` goes from piece i to the next (default: what enters the next one's first
    segment). Micro-batches are those of the first piece. `passes` are the pieces' where they are
    known.
    """
    made = how_for(cluster, how)
    if boundary_bytes is None:
        boundary_bytes = [piece.segments[0].input_bytes for piece in pieces[1:]]
    sends = [*(transfer_s(cluster, nbytes, level) for nbytes in boundary_bytes), 0.0]
    if passes is None:
        passes = _each(pieces, made)
    work = [_work(p, schedule, sends, i) for i, p in enumerate(passes)]
    crossed = range(len(cluster.levels))[level] if cluster is not None else made.overlap_from
    beside = made.overlap and crossed >= made.overlap_from
    if overlap_sends is not None:
        beside = overlap_sends
    executed = execute(schedule, work, pieces[0].micro_batches, beside)
    return _timeline(pieces, schedule, passes, work, executed, made.record)


def _each(pieces: Sequence[Step], how: How) -> list[Passes]:
    """The passes of every piece; pieces that are alike are simulated once."""
    known: list[tuple[Step, Passes]] = []
    found = []
    for piece in pieces:
        made = next((p for other, p in known if other == piece), None)
        if made is None:
            made = passes_of(piece, how)
            known.append((piece, made))
        found.append(made)
    return found


def _work(passes: Passes, schedule: Schedule, sends: Sequence[float], i: int) -> Work:
    weights = min(passes.weights_s, passes.backward_s) if schedule.kind == "zero_bubble" else 0.0
    return Work(
        passes.forward_s,
        passes.backward_s - weights,
        weights,
        passes.saved_bytes,
        sends[i],
        sends[i - 1] if i else 0.0,
    )


def _timeline(
    pieces: Sequence[Step],
    schedule: Schedule,
    passes: Sequence[Passes],
    work: Sequence[Work],
    executed: Executed,
    record: bool,
) -> Timeline:
    p, m = schedule.stages, pieces[0].micro_batches
    in_flight = peak_in_flight(schedule, executed, work)
    uses, ends = [], []
    for stage in range(p):
        mine = [c * p + stage for c in range(schedule.chunks)]
        link = after = 0.0
        for i in sorted(mine, reverse=True):  # the last chunk is done with its backward first
            after = _last_backward(executed, stage, i // p)
            link = max(link, after) + passes[i].tail_s
        first = sum(passes[i].first_s for i in mine)
        done = max(executed.end[stage][-1], link) + first
        optimizer = sum(pieces[i].optimizer_s for i in mine)
        compute = m * sum(passes[i].compute_s for i in mine)
        exposed = m * sum(sum(passes[i].exposed_s.values()) for i in mine)
        exposed += first + max(0.0, link - executed.end[stage][-1])
        exposed = exposed if exposed > 1e-12 * done else 0.0  # of rounding
        working = max(passes[i].working_bytes for i in mine)
        state = sum(passes[i].state_bytes for i in mine)
        ends.append(done + optimizer)
        saved = max(passes[i].saved_bytes for i in mine)
        uses.append(
            StageUse(
                compute,
                exposed,
                done - compute - exposed,
                state + in_flight[stage] + working,
                in_flight[stage] / saved if saved else 0.0,
            )
        )
    last = int(np.argmax(ends))
    fullest = int(np.argmax([use.peak_bytes for use in uses]))
    mine = [c * p + last for c in range(schedule.chunks)]
    memory = _memory(schedule, executed, work, passes, fullest, ends[last])
    peak = int(np.argmax(memory[:, 1]))
    named = _exposed(passes, mine, m, uses[last].exposed_s)
    return Timeline(
        ends[last],
        uses[last].compute_s,
        sum(pieces[i].optimizer_s for i in mine),
        named,
        {},
        uses[fullest].peak_bytes,
        float(memory[peak, 0]),
        "forward",
        memory,
        bubble_s=uses[last].bubble_s,
        micro_batches=m,
        spans=_spans(executed, schedule) if record else (),
        stages=tuple(uses),
    )


def _last_backward(executed: Executed, stage: int, chunk: int) -> float:
    """When a stage has done its last backward of a chunk, its weights' gradients included."""
    ops, ends = executed.ops[stage], executed.end[stage]
    at = next(i for i in reversed(range(len(ops))) if ops[i][0] != FORWARD and ops[i][1] == chunk)
    return ends[at]


def _exposed(
    passes: Sequence[Passes], mine: Sequence[int], m: int, total: float
) -> dict[str, float]:
    """What a stage waits for, by collective; what remains of the total is of parameters."""
    found: dict[str, float] = {}
    for i in mine:
        for name, seconds in passes[i].exposed_s.items():
            found[name] = found.get(name, 0.0) + m * seconds
    rest = total - sum(found.values())
    tail: dict[str, float] = {}
    for i in mine:
        for name, seconds in passes[i].last_exposed_s.items():
            tail[name] = tail.get(name, 0.0) + seconds
    weight = sum(tail.values())
    if weight <= 0:
        tail, weight = {"collectives of parameters": 1.0}, 1.0
    for name, seconds in tail.items():
        if rest > 0:
            found[name] = found.get(name, 0.0) + rest * seconds / weight
    return found


def _memory(
    schedule: Schedule,
    executed: Executed,
    work: Sequence[Work],
    passes: Sequence[Passes],
    stage: int,
    end: float,
) -> Points:
    """Bytes in use on one stage: state, what a pass needs, and activations in flight."""
    mine = range(stage, len(work), schedule.stages)
    base = sum(passes[i].state_bytes for i in mine)
    base += max(passes[i].working_bytes for i in mine)
    frees = 2 if schedule.kind == "zero_bubble" else BACKWARD
    points, level = [[0.0, base]], base
    ops = zip(executed.ops[stage], executed.start[stage], executed.end[stage], strict=True)
    for (what, chunk, _), start, finish in ops:
        nbytes = work[chunk * schedule.stages + stage].saved_bytes
        if what == FORWARD:
            level += nbytes
            points.append([start, level])
        elif what == frees:
            level -= nbytes
            points.append([finish, level])
    return np.array([*points, [end, level]])


def _spans(executed: Executed, schedule: Schedule) -> tuple[Span, ...]:
    """What every stage did when, up to a number; a stage is a stream."""
    if sum(map(len, executed.ops)) > MOST_SPANS:
        return ()
    return tuple(
        Span(
            f"{_NAMES[what]} {batch}" + (f" of chunk {chunk}" if schedule.chunks > 1 else ""),
            f"stage {stage}",
            start,
            end,
            "forward" if what == FORWARD else "backward",
        )
        for stage, ops in enumerate(executed.ops)
        for (what, chunk, batch), start, end in zip(
            ops, executed.start[stage], executed.end[stage], strict=True
        )
    )
