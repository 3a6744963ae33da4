"""The timeline of a chain that is cut into the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch.fx

from autopar.cost import staging
from autopar.cost.cluster import Cluster
from autopar.cost.pipeline import simulate_stages, transfer_s
from autopar.cost.schedules import Schedule
from autopar.cost.simulate import Passes, how_for, passes_of
from autopar.cost.simulator import How
from autopar.cost.step import Segment, Step
from autopar.cost.timeline import StageUse, Timeline
from autopar.plan import PIPELINE_AXIS

from .cut_points import Unit
from .describe import collapse
from .given import with_given
from .stage_cuts import bounds_of
from .stage_steps import Chain

Node = torch.fx.Node

ROUNDS = 4  # micro-batches per stage that are simulated: the rest are in their rhythm


@dataclass(frozen=True)
class Simulated:
    """A simulated pipeline: `step` is that of the fullest stage, all its pieces together.

    `sent_bytes` is the most that one device sends to other stages per step, `users` are the stages
    that use each parameter, its owner first.
    """

    step: Step
    timeline: Timeline
    sent_bytes: float
    users: Mapping[Node, tuple[int, ...]]


@dataclass
class CutSimulator:
    """Simulates chains on a cluster; pieces of the same ops are simulated once.

    `level` is the level of the cluster that stages communicate over.
    """

    cluster: Cluster
    level: int
    how: How | None = None
    known: dict[tuple[Segment, ...], Passes] = field(default_factory=dict)

    def simulate(self, chain: Chain, schedule: Schedule, starts: Sequence[int]) -> Simulated:
        """The chain cut at `starts` (units; the first is 0), on a schedule."""
        bounds = bounds_of(starts, len(chain))
        few = min(chain.micro_batches, ROUNDS * schedule.stages)
        pieces = [replace(chain.piece(start, end), micro_batches=few) for start, end in bounds]
        pieces = _with_staging(chain, pieces, schedule.stages)
        given = [with_given(piece, chain.given_bytes) for piece in pieces[: schedule.stages]]
        pieces[: schedule.stages] = given
        passes = [self._passes(piece) for piece in pieces]
        passes = _with_messages(chain, schedule, bounds, passes)
        sent = [chain.crossing_bytes[start] for start in starts[1:]]
        timeline = simulate_stages(
            pieces,
            schedule,
            self.cluster,
            how=self.how,
            level=self.level,
            boundary_bytes=sent,
            passes=passes,
        )
        if few < chain.micro_batches:
            timeline = _longer(timeline, passes, schedule, chain.micro_batches)
        users = chain.users(starts, schedule.stages)
        timeline = self._with_ties(timeline, chain, users)
        timeline = replace(timeline, stages=_named(chain, bounds, timeline, schedule.stages))
        peaks = [use.peak_bytes for use in timeline.stages]
        fullest = peaks.index(max(peaks))
        most = max(_sent_by_stage(sent, schedule.stages, schedule.chunks))
        return Simulated(
            _together(pieces[fullest :: schedule.stages]),
            timeline,
            most * chain.micro_batches,
            users,
        )

    def _passes(self, piece: Step) -> Passes:
        if piece.segments not in self.known:
            alone = replace(piece, state_bytes={})
            self.known[piece.segments] = passes_of(alone, how_for(self.cluster, self.how))
        made = self.known[piece.segments]
        return replace(made, state_bytes=made.state_bytes + sum(piece.state_bytes.values()))

    def _with_ties(
        self, timeline: Timeline, chain: Chain, users: Mapping[Node, tuple[int, ...]]
    ) -> Timeline:
        """With what parameters of several stages take: their value goes out, gradients return."""
        seconds = 0.0
        for stored in chain.stored:
            others = len(users[stored.node]) - 1
            nbytes = stored.state.get("parameters", 0.0)
            seconds += 2 * others * transfer_s(self.cluster, nbytes, self.level) if others else 0.0
        if not seconds:
            return timeline
        exposed = {**timeline.exposed_s, f"send {PIPELINE_AXIS}": seconds}
        return replace(timeline, step_s=timeline.step_s + seconds, exposed_s=exposed)


def _with_staging(chain: Chain, pieces: Sequence[Step], stages: int) -> list[Step]:
    """The pieces; the first of every stage has what its rank leaves for peers of the stage.

    Pieces gather and reduce one after the other, in the same memory.
    """
    found = list(pieces)
    if not chain.staging.sizes:
        return found
    for stage in range(stages):
        nbytes = max(chain.staging.of(piece.segments) for piece in pieces[stage::stages])
        state = {**pieces[stage].state_bytes, staging.NAME: nbytes}
        found[stage] = replace(pieces[stage], state_bytes=state)
    return found


def _with_messages(
    chain: Chain,
    schedule: Schedule,
    bounds: Sequence[tuple[int, int]],
    passes: Sequence[Passes],
) -> list[Passes]:
    """The passes of pieces with what they hold of what stages send each other."""
    kept = chain.messages.kept(schedule, chain.segments)
    moment = schedule.chunks * chain.messages.moment(schedule)
    return [
        replace(
            made,
            saved_bytes=made.saved_bytes + float(kept[at]),
            working_bytes=made.working_bytes + float(moment[at]),
        )
        for made, at in zip(passes, bounds, strict=True)
    ]


def _longer(
    timeline: Timeline, passes: Sequence[Passes], schedule: Schedule, micro_batches: int
) -> Timeline:
    """The timeline with more micro-batches: each takes as long as the slowest stage's.

    All that it does beyond that is wait. Its spans are those of the first micro-batches.
    """
    few, p = timeline.micro_batches, schedule.stages
    each = [sum(q.forward_s + q.backward_s for q in passes[s::p]) for s in range(p)]
    extra = (micro_batches - few) * max(each)
    more = micro_batches / few
    uses = tuple(
        replace(
            use,
            compute_s=more * use.compute_s,
            exposed_s=more * use.exposed_s,
            bubble_s=max(0.0, use.bubble_s + extra - (more - 1) * (use.compute_s + use.exposed_s)),
        )
        for use in timeline.stages
    )
    step_s = timeline.step_s + extra
    exposed = {name: more * seconds for name, seconds in timeline.exposed_s.items()}
    compute_s = more * timeline.compute_s
    bubble_s = step_s - compute_s - sum(exposed.values()) - timeline.optimizer_s
    stretch = step_s / timeline.step_s if timeline.step_s else 1.0
    return replace(
        timeline,
        step_s=step_s,
        compute_s=compute_s,
        exposed_s=exposed,
        bubble_s=max(0.0, bubble_s),
        peak_at_s=timeline.peak_at_s * stretch,
        memory=timeline.memory * np.array([stretch, 1.0]),
        micro_batches=micro_batches,
        stages=uses,
        exact=False,
    )


def _sent_by_stage(sent: Sequence[float], stages: int, chunks: int) -> Iterator[float]:
    """Bytes that each stage sends per micro-batch: outputs forward, gradients back."""
    pieces = stages * chunks
    for stage in range(stages):
        total = 0.0
        for piece in range(stage, pieces, stages):
            total += sent[piece] if piece < pieces - 1 else 0.0
            total += sent[piece - 1] if piece else 0.0
        yield total


def _together(pieces: Sequence[Step]) -> Step:
    """The pieces of one stage as one step."""
    names = dict.fromkeys(name for piece in pieces for name in piece.state_bytes)
    return Step(
        tuple(segment for piece in pieces for segment in piece.segments),
        sum(piece.optimizer_s for piece in pieces),
        {name: sum(p.state_bytes.get(name, 0.0) for p in pieces) for name in names},
        pieces[0].micro_batches,
    )


def _named(
    chain: Chain, bounds: Sequence[tuple[int, int]], timeline: Timeline, stages: int
) -> tuple[StageUse, ...]:
    """What every stage did, with the modules that it holds."""
    found = []
    for stage, use in enumerate(timeline.stages):
        texts = [what_of(chain.units[start:end]) for start, end in bounds[stage::stages]]
        found.append(replace(use, what="; ".join(texts)))
    return tuple(found)


def what_of(units: Sequence[Unit]) -> str:
    """The modules of some units, in short: `embed, layers.{0..7}`."""
    names: dict[str, None] = {}
    for unit in units:
        for node in unit.nodes:
            module = str(node.meta.get("module", ""))
            if module:
                names.setdefault(_layer(module))
    groups: dict[str, list[str]] = {}
    for name in names:
        stem, _, last = name.rpartition(".")
        groups.setdefault(stem if last.isdigit() else name, []).append(name)
    return ", ".join(collapse(found) for found in groups.values())


def _layer(module: str) -> str:
    """A module's path up to the first number in it, that included."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return module if at is None else ".".join(parts[: at + 1])
