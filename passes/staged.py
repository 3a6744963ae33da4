"""Settle one pipeline: its assignment, recomputation, stage cuts and schedule, simulated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.fx

from autopar.cost.schedules import Schedule
from autopar.cost.simulate import how_for
from autopar.ir.mesh import Mesh
from autopar.plan import PIPELINE_AXIS, Pipeline, Recompute

from .accounts import FULL, NONE, SELECTIVE, Accounts, overlap_of
from .cut_points import Unit, units_of
from .frame import Variant
from .pipelined import Candidate, Wanted, role_map, runs
from .price import Pricer
from .problem import Problem, options_of
from .programme import Assignment, solve
from .rounded import round_off
from .settle import Settled
from .simulate_cuts import CutSimulator
from .stage_cuts import TooFull, cut_chain, unevenness
from .stage_steps import Chain, Shares, chain_of

Node = torch.fx.Node

MOST_CHUNKS = 4  # pieces per stage that are tried
SIMPLER = 0.02  # what a schedule must gain over a simpler one
ATTEMPTS = 4  # at leaving room for what the simulation has beyond the sums
UNEVEN = 0.05  # of the mean piece, from which copies of blocks are cut inside
MOST_CUT_INSIDE = 48  # units of a model where they are: deep ones are even enough
LEVELS = 8  # steps between no recomputation and the most that is allowed


@dataclass(frozen=True)
class Staged(Settled):
    """A pipeline that can be run.

    `step` is that of the fullest stage, all its pieces together; `sent_bytes` is the most that one
    device sends to other stages. `bound_s` is below every pipeline of this kind.
    """

    pipeline: Pipeline = field(default_factory=lambda: Pipeline("1f1b", ()))
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
    pricer = Pricer(
        problem.cluster, mesh, problem.optimizer, restricted.never_gather, candidate.micro_batches
    )
    accounts = Accounts(
        pricer,
        problem.regions,
        rounds.micro_batches,
        dict.fromkeys(range(len(problem.regions.copies)), rounds.mode),
        overlap_of(problem.cluster, mesh),
        rounds.in_flight,
    )
    room = stages * (memory_limit - problem.given_bytes(candidate.micro_batches))
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
    simulator: CutSimulator = field(init=False)
    misfit: Misfit | None = None

    def __post_init__(self) -> None:
        level = self.mesh[PIPELINE_AXIS].level
        self.simulator = CutSimulator(self.problem.cluster, level)

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
        if len(units) <= MOST_CUT_INSIDE and unevenness(chain, schedule) > UNEVEN:
            chain = self._chain(units_of(self.problem.graph, self.problem.blocks))
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
                problem.blocks,
                units,
                self.assignment.option,
                self.pricer,
                self.candidate.micro_batches,
                problem.given_bytes(self.candidate.micro_batches),
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
        made = self.simulator.simulate(chain, schedule, starts)
        regions = self.problem.blocks.regions
        recompute = tuple(
            Recompute(regions[r][0].name, regions[r][2], full, selective)
            for r, (full, selective) in shares.items()
            if full or selective
        )
        mode = FULL if any(f for f, _ in shares.values()) else SELECTIVE if recompute else NONE
        cuts = tuple(chain.units[start].name for start in starts[1:])
        return Staged(
            self.name,
            self.problem,
            self.mesh,
            self.pricer,
            Variant(self.candidate.micro_batches, mode),
            self.assignment,
            recompute,
            made.step,
            made.timeline,
            pipeline=Pipeline(schedule.kind, cuts, schedule.chunks),
            sent_bytes=made.sent_bytes,
            bound_s=self.candidate.bound_s,
        )


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
