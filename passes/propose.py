"""The outer search: meshes of up to three axes, micro-batches and recomputation, best first.

Every candidate gets a lower bound before anything is solved: what its cheapest options take, then
the Lagrangian bound of a neighbour's relaxation (`relax`). Relaxations are solved in the order of
the bounds until the least bound is above the best step found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import sympy

from autopar.cost.cluster import Cluster, make_mesh
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh

from .accounts import FULL, NONE, SELECTIVE
from .families import THREE_AXES
from .frame import Frame, Priced, Table, Variant, build_frame
from .hints import hinted_axes, role_sets_with
from .moves import Ways
from .problem import Problem, problem_of
from .relax import Relaxation, Relaxed

Progress = Callable[[str], None]
Roles = tuple[tuple[str, str], ...]
Symbols = Mapping[sympy.Symbol, int]

LARGEST_INNER = 64  # members of an axis that communicates activations, at most
MANY = 16  # devices from which a restricted search comes before the full one
PROBED = 4  # meshes of a field that tell how far its bounds are from the truth
WORTH = 1e-3  # a candidate that is closer than this to the best is not looked for
NEAR = 1.05  # candidates this close to the best are solved until there are enough of them


@dataclass
class Frames:
    """The frames of one captured graph, made when they are first needed and kept for re-plans."""

    problem: Problem
    made: dict[Roles, Frame] = field(default_factory=dict)
    problems: dict[tuple[tuple[sympy.Symbol, int], ...], Problem] = field(default_factory=dict)
    ways: dict[tuple[str, ...], Ways] = field(default_factory=dict)

    def problem_at(self, graph: Graph, symbols: Symbols, cluster: Cluster) -> Problem:
        """The problem of the same graph for other sizes or another cluster."""
        sizes = tuple(symbols.items())
        first = self.problem
        if symbols == first.symbols:
            self.problems.setdefault(sizes, first)
        if sizes not in self.problems:
            self.problems[sizes] = problem_of(graph, symbols, cluster, first.optimizer)
        found = self.problems[sizes]
        return found if found.cluster is cluster else replace(found, cluster=cluster)

    def get(self, roles: Roles) -> Frame:
        if roles not in self.made:
            names = tuple(name for name, _ in roles)
            ways = self.ways.setdefault(names, {})
            self.made[roles] = build_frame(self.problem, dict(roles), ways=ways)
        return self.made[roles]


@dataclass(frozen=True)
class Request:
    """What to plan for: sizes, the cluster, bytes per device, and which variants may be tried.

    Candidates that take `better_than_s` seconds or more are not looked for.
    """

    cluster: Cluster
    symbols: Mapping[sympy.Symbol, int]
    memory_limit: float
    micro_batches: Sequence[int] = (1,)
    modes: Sequence[str] = (NONE,)
    axes: int = 3
    better_than_s: float = math.inf

    def at(self, micro_batches: int) -> dict[sympy.Symbol, int]:
        """The sizes of one micro-batch."""
        return {
            symbol: size // micro_batches if str(symbol) == "b" else size
            for symbol, size in self.symbols.items()
        }


@dataclass(frozen=True, eq=False)
class Proposal:
    """A candidate with its bound; `relaxed` where its relaxation was solved.

    `left`: it fits in memory and its bound is below the best, but it was not solved.
    """

    frame: Frame
    mesh: Mesh
    variant: Variant
    bound_s: float
    relaxation: Relaxation | None = None
    at: int = 0
    relaxed: Relaxed | None = None
    least_bytes: float = 0.0
    left: bool = False


@dataclass
class _Field:
    """The meshes of one set of roles under one variant, with their bounds."""

    roles: Roles
    variant: Variant
    table: Table
    bound_s: np.ndarray[tuple[int], np.dtype[np.float64]]
    open: np.ndarray[tuple[int], np.dtype[np.bool_]]
    least_bytes: np.ndarray[tuple[int], np.dtype[np.float64]]
    lean_known: np.ndarray[tuple[int], np.dtype[np.bool_]]
    relaxation: Relaxation | None = None
    built_for_s: float = math.inf
    missed: dict[int, float] = field(default_factory=dict)
    given_up: list[int] = field(default_factory=list)

    def guess(self, at: int) -> float:
        """A mesh's bound, times by how much solved meshes with its innermost axis missed theirs.

        Before any of those is solved, by how much the best of `PROBED` others did. Meshes that are
        left at their bound for that reason count in the gap that is reported.
        """
        inner = self.table.meshes[at].axes[-1].size
        others = min(self.missed.values()) if len(self.missed) >= PROBED else 1.0
        return float(self.bound_s[at]) * self.missed.get(inner, others)


def propose(
    frames: Frames, request: Request, keep: int = 4, progress: Progress = lambda _: None
) -> list[Proposal]:
    """Candidates: solved ones by rising time, at least `keep` where there are, then bounds.

    None is solved where nothing fits in memory; every mesh with its least memory is in the list.
    """
    search = _Outer(frames, request, keep, progress)
    return search.run()


class _Outer:
    def __init__(self, frames: Frames, request: Request, keep: int, progress: Progress) -> None:
        self.frames, self.request, self.keep, self.progress = frames, request, keep, progress
        self.solved: list[Proposal] = []
        self.fields: list[_Field] = []
        self.tight = False  # some candidate did not fit
        self.priced: dict[tuple[Roles, int], Priced] = {}

    @property
    def best_s(self) -> float:
        solved = (p.relaxed.time_s for p in self.solved if p.relaxed)
        return min(solved, default=self.request.better_than_s)

    def run(self) -> list[Proposal]:
        one, *others = role_sets(self.frames.problem, self.request)
        # One axis costs little and bounds the rest. Two axes without restriction are the largest
        # programmes: last, with the best bound.
        for roles in (one, *others[1:], *others[:1]):
            for mode in (m for m in (NONE, SELECTIVE, FULL) if m in self.request.modes):
                shortest = math.inf
                for k in self._micro_batches():
                    variant = Variant(k, mode)
                    if not self._is_short(variant):
                        continue
                    if self._cover(roles, variant) > self.best_s:
                        break  # smaller micro-batches only take longer
                    self._explore()
                    found = self._best_of(roles, variant)
                    if found > shortest:
                        break  # more of them only gather parameters more often
                    if found > 0:
                        shortest = found
        solved = {(str(p.mesh), p.variant) for p in self.solved}
        rest = [
            Proposal(
                self.frames.get(f.roles),
                mesh,
                f.variant,
                float(f.bound_s[i]),
                least_bytes=float(f.least_bytes[i]),
                left=bool(f.open[i]) or i in f.given_up,
            )
            for f in self.fields
            for i, mesh in enumerate(f.table.meshes)
            if (str(mesh), f.variant) not in solved
        ]
        self.progress(
            f"{len(self.solved) + len(rest)} candidates, {len(self.solved)} relaxations solved"
        )
        order = sorted(self.solved, key=lambda p: p.relaxed.time_s if p.relaxed else 0.0)
        return order + sorted(rest, key=lambda p: p.bound_s)

    def _micro_batches(self) -> list[int]:
        batch = next((n for s, n in self.request.symbols.items() if str(s) == "b"), 1)
        return [k for k in sorted(self.request.micro_batches) if batch % k == 0]

    def _best_of(self, roles: Roles, variant: Variant) -> float:
        """Seconds of the best solved mesh of some roles and a variant; -inf if none was."""
        names = tuple(name for name, _ in roles)
        solved = [
            p.relaxed.time_s
            for p in self.solved
            if p.relaxed and p.variant == variant and p.mesh.names == names
        ]
        return min(solved, default=-math.inf)

    def _is_short(self, variant: Variant) -> bool:
        """Whether memory binds without what the variant gives up: else it can gain nothing."""
        if variant == Variant():
            return True
        less = [p for p in self.solved if p.relaxed and self._gives_up_less(p.variant, variant)]
        best = min(less, key=lambda p: p.bound_s, default=None)
        return best is None or best.relaxed is None or best.relaxed.weights.memory > 0

    def _gives_up_less(self, one: Variant, other: Variant) -> bool:
        order = (NONE, SELECTIVE, FULL)
        return (
            one != other
            and one.micro_batches <= other.micro_batches
            and order.index(one.mode) <= order.index(other.mode)
        )

    def _cover(self, roles: Roles, variant: Variant) -> float:
        """Open the meshes of some roles under a variant; the least seconds that any can take."""
        frame, k = self.frames.get(roles), variant.micro_batches
        if frame.is_empty:
            return math.inf
        if (roles, k) not in self.priced:
            meshes = tuple(meshes_of(roles, self.request.cluster))
            if not meshes:
                return math.inf
            sizes = self.request.at(k)
            self.priced[roles, k] = frame.priced(meshes, self.request.cluster, sizes)
        table = frame.table(self.priced[roles, k], variant)
        fits = table.least_bytes <= self.request.memory_limit
        self.fields.append(
            _Field(
                roles,
                variant,
                table,
                table.least_s.copy(),
                fits & (table.least_s < self.best_s),
                table.least_bytes.copy(),
                np.zeros(len(table.meshes), dtype=np.bool_),
            )
        )
        return float(table.least_s.min())

    def _explore(self) -> None:
        """Solve relaxations, the most promising first, until none looks better than the best."""
        while True:
            found = [
                (field_.guess(int(i)), field_, int(i))
                for field_ in self.fields
                for i in np.flatnonzero(field_.open)
            ]
            if not found:
                return
            guess, field_, at = min(found, key=lambda entry: entry[0])
            enough = len([p for p in self.solved if p.relaxed]) >= self.keep
            if guess >= self.best_s * (1 - WORTH) and (enough or guess >= self.best_s * NEAR):
                return
            self._solve(field_, at)

    def _solve(self, field_: _Field, at: int) -> None:
        frame, variant = self.frames.get(field_.roles), field_.variant
        within = self.best_s * (NEAR if len(self.solved) >= self.keep else 1.2)
        if field_.relaxation is None or field_.built_for_s > 1.3 * within:
            field_.built_for_s = within
            built = frame.programme(field_.table, within)
            if built is None:
                field_.open[:] = False
                return
            field_.relaxation = Relaxation(*built)
        field_.open[at] = False
        relaxed = None
        if not self.tight or self._has_room(field_, at):
            relaxed = field_.relaxation.solve(at, self.request.memory_limit)
        mesh = field_.table.meshes[at]
        if relaxed is None and field_.relaxation.stalled:
            field_.given_up.append(at)
            return
        if relaxed is None:
            self.tight = True
            self._has_room(field_, at)
            return
        self.progress(f"{mesh}{_label(variant)}: {relaxed.time_s * 1e3:.4g} ms")
        bound = float(field_.bound_s[at])
        inner, missed = mesh.axes[-1].size, relaxed.time_s / bound if bound > 0 else 1.0
        field_.missed[inner] = min(missed, field_.missed.get(inner, math.inf))
        # Of what is slower than the programme was built for, nothing is known.
        bounds = np.minimum(field_.relaxation.bounds(relaxed.weights), field_.built_for_s)
        field_.bound_s[:] = np.maximum(field_.bound_s, bounds)
        self.solved.append(
            Proposal(
                frame,
                mesh,
                variant,
                relaxed.time_s,
                field_.relaxation,
                at,
                relaxed,
                float(field_.least_bytes[at]),
            )
        )

    def _has_room(self, field_: _Field, at: int) -> bool:
        """Whether a mesh can keep to the limit at all; closes others of its field that cannot."""
        assert field_.relaxation is not None
        if field_.lean_known[at]:
            return False  # asked again only after its relaxation was infeasible
        least = field_.relaxation.least_memory(at)
        if field_.built_for_s == math.inf:  # else it is the least of what is fast enough
            field_.least_bytes = np.maximum(field_.least_bytes, least)
        field_.lean_known[at] = True
        field_.open &= least <= self.request.memory_limit
        return bool(least[at] <= self.request.memory_limit)


def _label(variant: Variant) -> str:
    parts = [] if variant.micro_batches == 1 else [f"{variant.micro_batches} micro-batches"]
    if variant.mode != NONE:
        parts.append(f"{variant.mode} recomputation")
    return "".join(f", {part}" for part in parts)


def role_sets(problem: Problem, request: Request) -> list[Roles]:
    """The sets of axes to try: one, two without restriction, and three with a role each."""
    named = hinted_axes(problem.graph)
    if named:
        return role_sets_with(named)
    found: list[Roles] = [(("dp", "any"),)]
    if request.axes >= 2:
        found.append((("dp", "any"), ("tp", "any")))
        if request.cluster.size >= MANY:  # contained in the former, and a bound for it
            found.append((("dp", "batch"), ("tp", "feature")))
    if request.axes >= 3:
        for roles in THREE_AXES:
            kinds = {role for _, role in roles}
            if "expert" in kinds and not any(problem.expert.values()):
                continue
            if "sequence" in kinds and not any(problem.sequence.values()):
                continue
            found.append(roles)
    return found


def meshes_of(roles: Roles, cluster: Cluster) -> Iterator[Mesh]:
    """Every way to lay the axes over the cluster, each of at least two devices."""
    n = cluster.size
    if len(roles) == 1 or n == 1:
        if len(roles) == 1:
            yield make_mesh(cluster, {roles[0][0]: n})
        return
    for sizes in _factorisations(n, len(roles)):
        inner = sizes[1:] if len(roles) > 2 else ()
        if all(size <= LARGEST_INNER for size in inner):
            yield make_mesh(cluster, dict(zip((name for name, _ in roles), sizes, strict=True)))


def _factorisations(n: int, axes: int) -> Iterator[tuple[int, ...]]:
    if axes == 1:
        if n > 1:
            yield (n,)
        return
    for first in range(2, n // 2 + 1):
        if n % first == 0:
            for rest in _factorisations(n // first, axes - 1):
                yield (first, *rest)
