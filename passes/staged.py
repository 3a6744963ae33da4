"""Settle one pipeline: its assignment, recomputation, stage cuts and schedule, simulated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.fx

from autopar.cost.pipeline import simulate_stages, transfer_s
from autopar.cost.schedules import Schedule
from autopar.cost.simulate import Passes, how_for, passes_of
from autopar.cost.step import Segment, Step
from autopar.cost.timeline import StageUse, Timeline
from autopar.ir.mesh import Mesh
from autopar.plan import PIPELINE_AXIS, Pipeline, Recompute

from .accounts import FULL, NONE, SELECTIVE, Accounts, overlap_of
from .cut_points import Unit, units_of
from .describe import collapse
from .frame import Variant
from .pipelined import Candidate, Wanted, role_map, runs
from .price import Pricer
from .problem import Problem, options_of
from .programme import Assignment, solve
from .rounded import round_off
from .settle import Settled
from .stage_cuts import TooFull, bounds_of, cut_chain
from .stage_steps import Chain, Shares, chain_of

Node = torch.fx.Node

MOST_CHUNKS = 4  # pieces per stage that are tried
SIMPLER = 0.02  # what a schedule must gain over a simpler one
ATTEMPTS = 4  # at leaving room for what the simulation has beyond the sums
LEVELS = 8  # steps between no recomputation and the most that is allowed


@dataclass(frozen=True)
class Staged(Settled):
    """A pipeline that can be run.

    `step` is that of the fullest stage, all its pieces together. `users` are the stages that use
    each parameter, its owner first. `bound_s` is below every pipeline of these stages' kind.
    """

    pipeline: Pipeline = field(default_factory=lambda: Pipeline("1f1b", ()))
    users: Mapping[Node, tuple[int, ...]] = field(default_factory=dict)
    sent_bytes: float = 0.0
    bound_s: float = 0.0


@dataclass(frozen=True)
class Misfit:
    """A pipeline that does not fit: the stage that needs most, and how much at least."""

    mesh: Mesh
    stage: int
    needs_bytes: float


def settle_pipeline(
    name: str,
    problem: Problem,
    candidate: Candidate,
    wanted: Wanted,
    modes: Sequence[str],
    memory_limit: float,
    rounds: Variant,
    chunks: Sequence[int] | None = None,
    family: str = "auto",
    roles: Mapping[str, str] | None = None,
) -> Staged | Misfit | None:
    """The best pipeline of a candidate, or what does not fit; None where it has no assignment.

    `problem` is at the sizes of one micro-batch; `rounds` is the variant as which the inner
    programme is priced (`pipelined`). `chunks` are the pieces per stage that may be tried.
    """
    stages = candidate.stages
    inner = candidate.inner
    mesh = Mesh((candidate.mesh[PIPELINE_AXIS], *inner.axes))
    restricted = problem.family(family, role_map(candidate) if roles is None else roles)
    pricer = Pricer(problem.cluster, mesh, problem.optimizer, restricted.never_gather)
    accounts = Accounts(
        pricer,
        problem.regions,
        rounds.micro_batches,
        dict.fromkeys(range(len(problem.regions.copies)), rounds.mode),
        overlap_of(problem.cluster),
        rounds.in_flight,
    )
    room = stages * memory_limit
    assignment: Assignment | None = None
    relaxation, relaxed = candidate.relaxation, candidate.relaxed
    if relaxation is not None and relaxed is not None and mesh == candidate.mesh:
        assignment = round_off(problem, relaxation, 0, relaxed, accounts, room).assignment
    if assignment is None:
        options = options_of(problem, inner, pricer, restricted)
        assignment = solve(
            problem.graph, problem.blocks, options, pricer, room, accounts=accounts
        ) or solve(
            problem.graph,
            problem.blocks,
            options,
            pricer,
            math.inf,
            minimise_memory=True,
            accounts=accounts,
        )
    if assignment is None:
        return None
    cutter = _Cutter(name, problem, mesh, pricer, candidate, assignment, tuple(modes), memory_limit)
    return cutter.best(wanted, chunks)


@dataclass
class _Cutter:
    """Cuts one assignment for every schedule."""

    name: str
    problem: Problem
    mesh: Mesh
    pricer: Pricer
    candidate: Candidate
    assignment: Assignment
    modes: tuple[str, ...]
    limit: float
    chains: dict[tuple[str, ...], Chain] = field(default_factory=dict)
    passes: dict[tuple[Segment, ...], Passes] = field(default_factory=dict)
    misfit: Misfit | None = None

    def best(self, wanted: Wanted, chunks: Sequence[int] | None) -> Staged | Misfit | None:
        found: Staged | None = None
        for schedule in schedules_of(self.candidate, wanted, chunks):
            made = self._under(schedule)
            if made is None:
                continue
            if found is None or made.timeline.step_s < found.timeline.step_s * (1 - SIMPLER):
                found = made
        return found or self.misfit

    def _under(self, schedule: Schedule) -> Staged | None:
        """One schedule, with the least recomputation that lets it fit."""
        pieces = schedule.stages * schedule.chunks
        units = units_of(self.problem.graph, self.problem.blocks, pieces)
        if len(units) < pieces:
            return None
        chain = self._chain(units)
        levels = [self._shares(i / LEVELS) for i in range(LEVELS + 1)]
        if self.modes == (NONE,) or not self.problem.blocks.regions:
            return self._fitted(chain, schedule, {})
        made = self._fitted(chain, schedule, levels[0])
        if made is not None:
            return made
        made = self._fitted(chain, schedule, levels[-1])
        if made is None:
            return None
        low, high = 0, LEVELS
        while high - low > 1:
            level = (low + high) // 2
            tried = self._fitted(chain, schedule, levels[level])
            low, high = (low, level) if tried is not None else (level, high)
            if tried is not None and tried.timeline.step_s < made.timeline.step_s:
                made = tried
        return made

    def _shares(self, level: float) -> Shares:
        """From nothing over all copies selectively to all in full; the first copies first.

        Early stages hold the most micro-batches.
        """
        both = SELECTIVE in self.modes and FULL in self.modes
        found = {}
        for region, (_, _, copies) in enumerate(self.problem.blocks.regions):
            if both:
                full = round(copies * max(0.0, 2 * level - 1))
                found[region] = (full, round(copies * min(1.0, 2 * level)) - full)
            else:
                n = round(copies * level)
                found[region] = (n, 0) if FULL in self.modes else (0, n)
        return found

    def _chain(self, units: Sequence[Unit]) -> Chain:
        key = tuple(unit.name for unit in units)
        if key not in self.chains:
            problem = self.problem
            self.chains[key] = chain_of(
                problem.graph,
                problem.symbolic,
                problem.blocks,
                units,
                self.assignment.option,
                self.pricer,
                self.candidate.micro_batches,
            )
        return self.chains[key]

    def _fitted(self, chain: Chain, schedule: Schedule, shares: Shares) -> Staged | None:
        """The chain cut so that the simulated peak is within the limit; None where it cannot be."""
        chain = chain.recomputed(shares)
        how = how_for(self.problem.cluster)
        working, limit = chain.working(how), self.limit
        for _ in range(ATTEMPTS):
            starts = cut_chain(chain, schedule, working, limit)
            if isinstance(starts, TooFull):
                stage = starts.piece % schedule.stages
                needs = starts.needs_bytes + self.limit - limit
                if self.misfit is None or needs < self.misfit.needs_bytes:
                    self.misfit = Misfit(self.mesh, stage, needs)
                return None
            made = self._simulated(chain, schedule, starts, shares)
            over = made.timeline.peak_bytes - self.limit
            if over <= 0:
                return made
            if self.misfit is None or made.timeline.peak_bytes < self.misfit.needs_bytes:
                peaks = [use.peak_bytes for use in made.timeline.stages]
                self.misfit = Misfit(self.mesh, peaks.index(max(peaks)), max(peaks))
            limit = 0.999 * (limit - over)
        return None

    def _simulated(
        self, chain: Chain, schedule: Schedule, starts: Sequence[int], shares: Shares
    ) -> Staged:
        stages, chunks = schedule.stages, schedule.chunks
        bounds = bounds_of(starts, len(chain))
        pieces = [chain.piece(start, end) for start, end in bounds]
        sent = [chain.crossing_bytes[start] for start in starts[1:]]
        level = self.mesh[PIPELINE_AXIS].level
        timeline = simulate_stages(
            pieces,
            schedule,
            self.problem.cluster,
            level=level,
            boundary_bytes=sent,
            passes=[self._passes(piece) for piece in pieces],
        )
        users = chain.users(starts, stages)
        timeline = self._with_ties(timeline, users, level)
        named = _named(chain, bounds, timeline, stages)
        timeline = replace(timeline, stages=named)
        fullest = max(range(stages), key=lambda s: named[s].peak_bytes)
        regions = self.problem.blocks.regions
        recompute = tuple(
            Recompute(regions[r][0].name, regions[r][2], full, selective)
            for r, (full, selective) in shares.items()
            if full or selective
        )
        most = max(_sent_by_stage(sent, stages, chunks), default=0.0)
        mode = FULL if any(f for f, _ in shares.values()) else SELECTIVE if recompute else NONE
        return Staged(
            self.name,
            self.problem,
            self.mesh,
            self.pricer,
            Variant(self.candidate.micro_batches, mode),
            self.assignment,
            recompute,
            _together(pieces[fullest::stages]),
            timeline,
            pipeline=Pipeline(
                schedule.kind, tuple(chain.units[start].name for start in starts[1:]), chunks
            ),
            users=users,
            sent_bytes=most * chain.micro_batches,
            bound_s=self.candidate.bound_s,
        )

    def _passes(self, piece: Step) -> Passes:
        """The passes of a piece; pieces of the same ops are simulated once."""
        if piece.segments not in self.passes:
            alone = replace(piece, state_bytes={})
            self.passes[piece.segments] = passes_of(alone, how_for(self.problem.cluster))
        made = self.passes[piece.segments]
        return replace(made, state_bytes=made.state_bytes + sum(piece.state_bytes.values()))

    def _with_ties(
        self, timeline: Timeline, users: Mapping[Node, tuple[int, ...]], level: int
    ) -> Timeline:
        """With what parameters of several stages take: their value goes out, gradients return."""
        seconds = 0.0
        for node, stages in users.items():
            if len(stages) > 1:
                value, option = node.meta["value"], self.assignment.option[node]
                nbytes = self.pricer.local_bytes(value, option.gives[0])
                seconds += 2 * (len(stages) - 1) * transfer_s(self.problem.cluster, nbytes, level)
        if not seconds:
            return timeline
        exposed = {**timeline.exposed_s, f"send {PIPELINE_AXIS}": seconds}
        return replace(timeline, step_s=timeline.step_s + seconds, exposed_s=exposed)


def _sent_by_stage(sent: Sequence[float], stages: int, chunks: int) -> Iterator[float]:
    """Bytes that each stage sends per micro-batch: outputs forward, gradients back."""
    pieces = stages * chunks
    for stage in range(stages):
        total = 0.0
        for piece in range(stage, pieces, stages):
            total += sent[piece] if piece < pieces - 1 else 0.0
            total += sent[piece - 1] if piece else 0.0
        yield total


def schedules_of(
    candidate: Candidate, wanted: Wanted, chunks: Sequence[int] | None = None
) -> list[Schedule]:
    """The schedules to try, simple ones first; GPipe only where 1F1B, which needs less, cannot."""
    p, m = candidate.stages, candidate.micro_batches
    found = []
    for kind in ("1f1b", "zero_bubble", "interleaved"):
        if kind in wanted.schedules and runs(kind, p, m):
            several = [v for v in (2, MOST_CHUNKS) if chunks is None or v in chunks]
            numbers = several if kind == "interleaved" else [1]
            found += [Schedule(p, v, kind) for v in numbers]
    if "gpipe" in wanted.schedules and not found:
        found.append(Schedule(p, 1, "gpipe"))
    return found


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
