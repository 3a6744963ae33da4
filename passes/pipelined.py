"""The outer search over pipelines: stages, micro-batches, meshes inside a stage, recomputation.

With `p` stages and `m` micro-batches a pipeline takes at least what the whole model takes on the
mesh of one stage, `m + p - 1` times over `p` (all stages alike; arXiv:2104.04473, section 2.2), and
a stage holds `min(p, m)` micro-batches of a `p`-th of the model. So the inner programme is that of
the whole model on one stage's mesh, with `m + p - 1` micro-batches, `min(p, m)` of them in memory
and `p` times the limit: its value over `p` bounds the pipeline's step, and ranks candidates. The
best few are solved exactly, cut (`stage_cuts`) and simulated under every schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch.fx

from autopar.cost.cluster import make_mesh
from autopar.cost.schedules import KINDS
from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh
from autopar.plan import PIPELINE_AXIS

from .accounts import FULL, NONE, SELECTIVE
from .frame import Frame, Priced, Variant
from .hints import hinted_axes
from .propose import Frames, Request, Roles, role_sets
from .relax import Relaxation, Relaxed

Node = torch.fx.Node
Progress = Callable[[str], None]

ROWS = (1, 2, 4, 8, 16)  # of a micro-batch on every device along the first axis inside a stage
TIMES = (1, 2, 4)  # micro-batches per stage, where 16 rows make more than those
MOST_RELAXED = 28  # candidates whose relaxation is solved
FAR = 1.3  # by how much an innermost axis between hosts is taken to miss its bound at first
WITHIN = 1.35  # times its bound that a candidate's programme reaches
LARGEST_INNER = 64  # members of the innermost axis


@dataclass(frozen=True)
class Wanted:
    """Which pipelines may be tried; None: all numbers of stages, micro-batches from the batch.

    `statistics` says whether batch normalisation may take those of a micro-batch. Raises UserError
    for an unknown schedule and for less than two stages.
    """

    stages: Sequence[int] | None = None
    schedules: Sequence[str] = KINDS
    micro_batches: Sequence[int] | None = None
    statistics: bool = False

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.schedules if kind not in KINDS]
        if unknown:
            raise UserError(
                f"unknown pipeline schedule {unknown[0]!r}", fix=f"use one of {', '.join(KINDS)}"
            )
        for stages in self.stages or ():
            if stages < 2:
                raise UserError(
                    f"a pipeline of {stages} stage{'s' * (stages != 1)}",
                    fix="use 2 stages or more, or leave --stages out",
                )

    @property
    def bubble(self) -> float:
        """The least share of a micro-batch's time that each further stage adds to a step.

        With zero bubble about a third (arXiv:2401.10241, table 1: a forward takes as long as
        either half of a backward), interleaved half, for stages have two pieces at least.
        """
        least = {"zero_bubble": 1 / 3, "interleaved": 1 / 2}
        return min(least.get(kind, 1.0) for kind in self.schedules)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A pipeline that may be the best: `bound_s` is below its step, `est_s` its relaxation's."""

    stages: int
    roles: Roles
    mesh: Mesh
    micro_batches: int
    mode: str
    bound_s: float
    least_bytes: float
    relaxation: Relaxation | None = None
    relaxed: Relaxed | None = None
    est_s: float = math.inf

    @property
    def inner(self) -> Mesh:
        """The mesh of one stage."""
        return inner_mesh(self.mesh)

    @property
    def variant(self) -> Variant:
        return Variant(self.micro_batches, self.mode)


@dataclass
class Proposed:
    """Solved candidates by rising estimate, and what was left: the least bound of the rest."""

    solved: list[Candidate] = field(default_factory=list)
    left_s: float = math.inf
    count: int = 0
    leanest: Candidate | None = None  # of those that need more than there is


def inner_mesh(mesh: Mesh) -> Mesh:
    """The mesh of one stage: without `pp`, and without axes of one device."""
    return Mesh(tuple(a for a in mesh if a.name != PIPELINE_AXIS and a.size > 1))


def propose_pipelines(
    frames: Frames,
    request: Request,
    wanted: Wanted,
    most_stages: int,
    best_s: float = math.inf,
    progress: Progress = lambda _: None,
) -> Proposed:
    """Pipelines that may take less than `best_s`, the most promising first.

    `most_stages` is how many pieces the model has at most.
    """
    return _Outer(frames, request, wanted, best_s, progress).run(most_stages)


class _Outer:
    def __init__(
        self,
        frames: Frames,
        request: Request,
        wanted: Wanted,
        best_s: float,
        progress: Progress,
    ) -> None:
        self.frames, self.request, self.wanted = frames, request, wanted
        self.best_s, self.progress = best_s, progress
        self.priced: dict[tuple[Roles, int], Priced] = {}
        self.missed: dict[tuple[str, int], float] = {}
        self.batch = next((n for s, n in request.symbols.items() if str(s) == "b"), 1)

    def run(self, most_stages: int) -> Proposed:
        found, open_ = Proposed(), list[Candidate]()
        for candidate in self._candidates(most_stages):
            found.count += 1
            needs = candidate.least_bytes / candidate.stages
            if needs <= self.request.room:
                open_.append(candidate)
            elif found.leanest is None or needs < found.leanest.least_bytes / found.leanest.stages:
                found.leanest = candidate
        best = self.best_s
        for _ in range(MOST_RELAXED):
            if not open_:
                break
            candidate = min(open_, key=self._guess)
            if self._guess(candidate) >= best:
                break
            open_.remove(candidate)
            solved = self._solve(candidate)
            if solved is not None:
                found.solved.append(solved)
                best = min(best, solved.est_s)
                self._learn(candidate, solved.est_s)
                self.progress(f"{_text(solved)}: {solved.est_s * 1e3:.4g} ms")
            else:
                self._learn(candidate, 2 * candidate.bound_s)
        left = [c.bound_s for c in open_ if c.bound_s < best]
        found.left_s = min(left, default=math.inf)
        found.solved.sort(key=lambda c: c.est_s)
        return found

    def _guess(self, candidate: Candidate) -> float:
        """A candidate's bound, times by how much solved ones like it missed theirs at least.

        Like it: with as many stages, or with an innermost axis of its size; 1 where there is none.
        Those that are left at their bound for that reason count in the gap that is reported.
        """
        missed = [self.missed.get(key, prior) for key, prior in _likeness(candidate).items()]
        return candidate.bound_s * min(missed)

    def _learn(self, candidate: Candidate, seconds: float) -> None:
        missed = seconds / candidate.bound_s
        for key in _likeness(candidate):
            self.missed[key] = min(missed, self.missed.get(key, math.inf))

    # -- candidates ---------------------------------------------------------------------------

    def _candidates(self, most_stages: int) -> Iterator[Candidate]:
        """All of them with their bounds; meshes of one kind are priced together."""
        by_kind: dict[tuple[Roles, int], list[tuple[int, Mesh]]] = {}
        n = self.request.cluster.size
        for stages in stage_counts(n, most_stages, self.wanted.stages):
            for roles, mesh in self._meshes(stages):
                for k in self._micro_batches(stages, mesh):
                    by_kind.setdefault((roles, k), []).append((stages, mesh))
        for (roles, k), listed in by_kind.items():
            frame = self.frames.get(roles)
            if frame.is_empty:
                continue
            meshes = tuple(mesh for _, mesh in listed)
            priced = frame.priced(meshes, self.request.cluster, self.request.at(k))
            for stages in dict.fromkeys(stages for stages, _ in listed):
                for mode in (m for m in (NONE, SELECTIVE, FULL) if m in self.request.modes):
                    table = frame.table(priced, self.variant(stages, k, mode))
                    for i, (of, mesh) in enumerate(listed):
                        if of == stages:
                            bound = float(table.least_s[i]) / stages
                            least = float(table.least_bytes[i])
                            yield Candidate(stages, roles, mesh, k, mode, bound, least)

    def variant(self, stages: int, k: int, mode: str) -> Variant:
        """What the inner programme of a pipeline is priced as."""
        rounds = k + (stages - 1) * self.wanted.bubble
        return Variant(rounds, mode, min(stages, k))  # type: ignore[arg-type]

    def _meshes(self, stages: int) -> Iterator[tuple[Roles, Mesh]]:
        cluster, n = self.request.cluster, self.request.cluster.size // stages
        sets = [r for r in role_sets(self.frames.problem, self.request) if len(r) <= 2]
        restricted = any(role == "batch" for roles in sets for _, role in roles)
        for roles in sets:
            names = [name for name, _ in roles]
            if len(roles) == 1:
                if n > 1 or not hinted_axes(self.frames.problem.graph):
                    yield roles, make_mesh(cluster, {PIPELINE_AXIS: stages, names[0]: n})
                continue
            if restricted and all(role == "any" for _, role in roles):
                continue  # contained in what is searched without restriction
            for outer in range(2, n // 2 + 1):
                inner = n // outer
                if n % outer == 0 and inner <= LARGEST_INNER:
                    sizes = {PIPELINE_AXIS: stages, names[0]: outer, names[1]: inner}
                    yield roles, make_mesh(cluster, sizes)

    def _micro_batches(self, stages: int, mesh: Mesh) -> list[int]:
        return micro_batch_counts(self.batch, stages, mesh.axes[1].size, self.wanted.micro_batches)

    # -- relaxations --------------------------------------------------------------------------

    def _solve(self, candidate: Candidate) -> Candidate | None:
        """The candidate with its relaxation; None where it does not fit."""
        frame: Frame = self.frames.get(candidate.roles)
        stages, k = candidate.stages, candidate.micro_batches
        cluster = self.request.cluster
        priced = frame.priced((candidate.mesh,), cluster, self.request.at(k))
        table = frame.table(priced, self.variant(stages, k, candidate.mode))
        for within in (WITHIN, math.inf):
            built = frame.programme(table, candidate.bound_s * stages * within)
            if built is None:
                continue
            relaxation = Relaxation(*built)
            relaxed = relaxation.solve(0, stages * self.request.room)
            if relaxed is not None:
                est = relaxed.time_s / stages
                return Candidate(
                    stages,
                    candidate.roles,
                    candidate.mesh,
                    k,
                    candidate.mode,
                    est,
                    candidate.least_bytes,
                    relaxation,
                    relaxed,
                    est,
                )
            if candidate.bound_s * within >= self.best_s:
                break
        return None


def _likeness(candidate: Candidate) -> dict[tuple[str, int], float]:
    """What makes pipelines miss their bounds alike, with what is taken before any is solved."""
    inner = candidate.mesh.axes[-1]
    size = inner.size if len(candidate.roles) > 1 else 1
    across = FAR if size > 1 and inner.level else 1.0
    return {("stages", candidate.stages): across, ("inner", size): across}


def stage_counts(devices: int, most: int, asked: Sequence[int] | None) -> list[int]:
    """Numbers of stages that divide the devices and that the model can be cut into."""
    found = [p for p in range(2, min(devices, most) + 1) if devices % p == 0]
    return found if asked is None else [p for p in found if p in asked]


def micro_batch_counts(
    batch: int, stages: int, rows: int, asked: Sequence[int] | None = None
) -> list[int]:
    """Micro-batches to try: at least one per stage; some rows each for `rows` devices.

    Where even the most rows make many micro-batches of a few (tokens or table rows, say, as the
    batch), a few times as many as stages, too.
    """
    if asked is not None:
        return [k for k in asked if batch % k == 0]
    wanted = {batch // (rows * r) for r in ROWS if batch % (rows * r) == 0}
    enough = sorted(k for k in wanted if k >= stages)
    fewest = enough[0] if enough else 0
    few = [k for k in (stages * n for n in TIMES) if k < fewest and batch % (rows * k) == 0]
    return few + enough or sorted(k for k in _divisors(batch) if k >= stages)[:1]


def _divisors(n: int) -> Iterable[int]:
    return (k for k in range(1, n + 1) if n % k == 0)


def check_wanted(
    wanted: Wanted, graph: Graph, devices: int, most_stages: int, batch: int | None
) -> None:
    """Raise UserError where no pipeline can be as it is asked for."""
    for stages in wanted.stages or ():
        if devices % stages:
            raise UserError(
                f"{stages} stages do not divide {devices} devices: all stages have as many",
                fix=f"use one of {', '.join(str(p) for p in _divisors(devices) if p > 1)} stages",
            )
        if stages > most_stages:
            raise UserError(
                f"the model cannot be cut into {stages} stages: it has {most_stages} pieces "
                "(copies of blocks, embedding, head) between which few values pass",
                fix=f"use at most {most_stages} stages",
            )
        for k in wanted.micro_batches or ():
            _check_micro_batches(wanted, stages, k)
        if wanted.micro_batches is None and batch is not None and batch < stages:
            raise UserError(
                f"a batch of {batch} is smaller than {stages} micro-batches, one per stage",
                fix="use a larger batch or fewer stages",
            )
    for k in wanted.micro_batches or ():
        if batch is None and k > 1:
            raise UserError(
                f"{k} micro-batches need a batch that can be divided, and forward fixes its size",
                fix="leave --micro-batches out",
            )
        if batch is not None and k > batch:
            raise UserError(
                f"the batch of {batch} is smaller than {k} micro-batches",
                fix=f"use at most {batch} micro-batches, or a larger batch",
            )
        if batch is not None and batch % k:
            raise UserError(
                f"{k} micro-batches do not divide the batch of {batch}",
                fix="choose numbers that divide the batch",
            )
    del graph


def _check_micro_batches(wanted: Wanted, stages: int, k: int) -> None:
    if any(runs(kind, stages, k) for kind in wanted.schedules):
        return
    kinds = ", ".join(wanted.schedules)
    if k < stages:
        raise UserError(
            f"the schedule {kinds} of {stages} stages needs {stages} micro-batches or more, not "
            f"{k}",
            fix="use more micro-batches, fewer stages, or the schedule gpipe",
        )
    raise UserError(
        f"{k} micro-batches do not divide into equal rounds of {stages} stages, as the schedule "
        f"{kinds} has them",
        fix=f"use a multiple of {stages} micro-batches, or the schedule 1f1b",
    )


def runs(kind: str, stages: int, micro_batches: int) -> bool:
    """Whether a schedule runs so many micro-batches on so many stages."""
    if kind == "gpipe":
        return True
    if micro_batches < stages:
        return False
    rounds = micro_batches // stages
    return kind == "1f1b" or micro_batches % rounds == 0


def _text(candidate: Candidate) -> str:
    mode = f", {candidate.mode} recomputation" if candidate.mode != NONE else ""
    return f"{candidate.mesh}, {candidate.micro_batches} micro-batches{mode}"


def role_map(candidate: Candidate) -> Mapping[str, str]:
    """Axis -> role, inside a stage."""
    names = candidate.inner.names
    return {name: role for name, role in candidate.roles if name in names}
