"""The outer search: meshes of up to three axes, micro-batches and recomputation, best first.

Every candidate gets a lower bound before anything is solved: what its cheapest options take, then
the Lagrangian bound of a neighbour's relaxation (`relax`). Relaxations are solved in the order of
the bounds until the least bound is above the best step found.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from autopar.cost.cluster import Cluster, make_mesh
from autopar.ir.mesh import Mesh

from .accounts import FULL, NONE, SELECTIVE
from .columns import Columns
from .families import THREE_AXES
from .frame import Frame, Priced, Table, Variant
from .frames import Frames, Request, Roles
from .hints import hinted_axes, role_sets_with
from .problem import Problem
from .relax import Relaxation, Relaxed, Weights

__all__ = ["Frames", "Outer", "Proposal", "Request", "Roles", "meshes_of", "propose", "role_sets"]

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Progress = Callable[[str], None]

LARGEST_INNER = 64  # members of an axis that communicates activations, at most
MANY = 16  # devices from which a restricted search comes before the full one
LEARNT = 4  # relaxations of other variants whose weights bound a field
WORTH = 1e-3  # a candidate that is closer than this to the best is not looked for
NEAR = 1.05  # candidates this close to the best are solved until there are enough of them


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
    """The meshes of one set of roles under one variant, with their bounds.

    `free` are bounds of what the meshes take with any amount of memory. A relaxation knows what is
    faster than `built_for_s`: the rest may be opened again.
    """

    roles: Roles
    variant: Variant
    table: Table
    bound_s: Array
    open: Flags
    least_bytes: Array
    lean_known: Flags
    relaxation: Relaxation | None = None
    built_for_s: float = math.inf
    learnt: int = 0
    given_up: list[int] = field(default_factory=list)


def propose(
    frames: Frames, request: Request, keep: int = 4, progress: Progress = lambda _: None
) -> list[Proposal]:
    """Candidates: solved ones by rising time, at least `keep` where there are, then bounds.

    None is solved where nothing fits in memory; every mesh with its least memory is in the list.
    """
    return Outer(frames, request, keep, progress).run()


class Outer:
    """The outer search; `run` looks for what is faster than `until_s`, and can be asked again."""

    def __init__(
        self,
        frames: Frames,
        request: Request,
        keep: int = 4,
        progress: Progress = lambda _: None,
    ) -> None:
        self.frames, self.request, self.keep, self.progress = frames, request, keep, progress
        self.solved: list[Proposal] = []
        self.fields: dict[tuple[Roles, Variant], _Field] = {}
        self.priced: dict[tuple[Roles, int], Priced] = {}
        self.weights: dict[Roles, list[tuple[Columns, Weights]]] = defaultdict(list)
        self.free: dict[Roles, list[tuple[Variant, Array]]] = defaultdict(list)
        self.until_s = 0.0

    @property
    def best_s(self) -> float:
        """Seconds of the best candidate so far; what is slower is not looked for."""
        best = min((p.relaxed.time_s for p in self.solved if p.relaxed), default=math.inf)
        return min(max(best, self.until_s), self.request.better_than_s)

    def run(self, until_s: float = 0.0) -> list[Proposal]:
        """Solve what may be the best, or faster than `until_s`; all candidates."""
        self.until_s = until_s
        one, *others = role_sets(self.frames.problem, self.request)
        # One axis costs little and bounds the rest. Two axes without restriction are the largest
        # programmes: last, with the best bound.
        for roles in (one, *others[1:], *others[:1]):
            if self.frames.get(roles).is_empty:
                continue
            for mode in (m for m in (NONE, SELECTIVE, FULL) if m in self.request.modes):
                for k in self._micro_batches():
                    variant = Variant(k, mode)
                    if self._free(roles, variant).min(initial=math.inf) > self.best_s * (1 - WORTH):
                        break  # smaller micro-batches only take longer
                    found = self._field(roles, variant)
                    if found is None or found.table.least_s.min() > self.best_s:
                        break
                    self._explore()
        return self._listed()

    def _listed(self) -> list[Proposal]:
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
            for f in self.fields.values()
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

    def _prices(self, roles: Roles, micro_batches: int) -> Priced | None:
        """Prices of all meshes of some roles at the sizes of one micro-batch."""
        key = (roles, micro_batches)
        if key not in self.priced:
            meshes = tuple(meshes_of(roles, self.request.cluster))
            if not meshes:
                return None
            self.priced[key] = self.frames.priced(roles, meshes, self.request, micro_batches)
        return self.priced[key]

    def _free(self, roles: Roles, variant: Variant) -> Array:
        """Seconds below which no mesh is under a variant, from variants that give up less.

        Where memory does not bind, more micro-batches and more recomputation only take longer.
        """
        made = np.zeros(0)
        for other, bounds in self.free[roles]:
            if _gives_up_less(other, variant):
                made = np.maximum(made, bounds) if len(made) else bounds
        return made if len(made) else np.zeros(self._meshes(roles))

    def _meshes(self, roles: Roles) -> int:
        return len(list(meshes_of(roles, self.request.cluster)))

    def _field(self, roles: Roles, variant: Variant) -> _Field | None:
        """The meshes of some roles under a variant."""
        if (roles, variant) in self.fields:
            return self.fields[roles, variant]
        priced = self._prices(roles, variant.micro_batches)
        if priced is None:
            return None
        table = self.frames.get(roles).table(priced, variant)
        bound = np.maximum(table.least_s, self._free(roles, variant))
        found = self.fields[roles, variant] = _Field(
            roles,
            variant,
            table,
            bound,
            table.least_bytes <= self.request.room,
            table.least_bytes.copy(),
            np.zeros(len(table.meshes), dtype=np.bool_),
        )
        return found

    def _explore(self) -> None:
        """Solve relaxations, the most promising first, until none looks better than the best."""
        while True:
            found = None
            least = math.inf
            for field_ in self.fields.values():
                bounds = np.where(field_.open, field_.bound_s, math.inf)
                at = int(bounds.argmin())
                if bounds[at] < least:
                    found, least = (field_, at), float(bounds[at])
            if found is None:
                return
            enough = len(self.solved) >= self.keep
            best_s = self.best_s
            if least >= best_s * (1 - WORTH) and (enough or least >= best_s * NEAR):
                return
            self._solve(*found)

    def _solve(self, field_: _Field, at: int) -> None:
        """Solve the relaxation of a mesh, or raise its bound by what is known from others."""
        if not self._build(field_) or self._learn(field_, at):
            return
        assert field_.relaxation is not None
        relaxed = None
        if not field_.lean_known[at] and self._is_tight(field_):
            self._has_room(field_, at)
            if not field_.open[at] or field_.bound_s[at] >= field_.built_for_s:
                return
        relaxed = field_.relaxation.solve(at, self.request.room)
        if relaxed is None and field_.relaxation.stalled:
            field_.open[at] = False
            field_.given_up.append(at)
            return
        if relaxed is None:
            self._is_slower(field_, at)
            return
        field_.open[at] = False
        self._add(field_, at, relaxed)

    def _add(self, field_: _Field, at: int, relaxed: Relaxed) -> None:
        assert field_.relaxation is not None
        mesh, roles = field_.table.meshes[at], field_.roles
        self.progress(f"{mesh}{_label(field_.variant)}: {relaxed.time_s * 1e3:.4g} ms")
        self.weights[roles].append((field_.relaxation.columns, relaxed.weights))
        self._bound(field_, relaxed.weights)
        field_.learnt = len(self.weights[roles])
        if not relaxed.weights.memory and field_.built_for_s >= self.best_s:
            self.free[roles].append((field_.variant, self._bounds(field_, relaxed.weights)))
        self.solved.append(
            Proposal(
                self.frames.get(roles),
                mesh,
                field_.variant,
                relaxed.time_s,
                field_.relaxation,
                at,
                relaxed,
                float(field_.least_bytes[at]),
            )
        )

    def _build(self, field_: _Field) -> bool:
        """Make the programme of what is fast enough to matter, unless it is there."""
        within = self.best_s * (NEAR if len(self.solved) >= self.keep else 1.2)
        if field_.relaxation is not None and within <= field_.built_for_s <= 1.3 * within:
            return True
        built = self.frames.get(field_.roles).programme(field_.table, within)
        if built is None:
            field_.bound_s = np.maximum(field_.bound_s, within)
            if within == math.inf:
                field_.open[:] = False
            return False
        field_.built_for_s = within
        field_.relaxation = Relaxation(*built)
        field_.lean_known[:] = False
        return True

    def _learn(self, field_: _Field, at: int) -> bool:
        """Bounds by the weights of other variants' relaxations; whether that says enough."""
        assert field_.relaxation is not None
        known = self.weights[field_.roles]
        fresh = [w for columns, w in known[field_.learnt :] if columns is field_.relaxation.columns]
        field_.learnt = len(known)
        before = field_.bound_s[at]
        for weights in fresh[-LEARNT:]:
            self._bound(field_, replace(weights, limit=self.request.room))
        return bool(field_.bound_s[at] > before)

    def _bound(self, field_: _Field, weights: Weights) -> None:
        field_.bound_s = np.maximum(field_.bound_s, self._bounds(field_, weights))

    def _bounds(self, field_: _Field, weights: Weights) -> Array:
        assert field_.relaxation is not None
        # Of what is slower than the programme was built for, nothing is known.
        made: Array = np.minimum(field_.relaxation.bounds(weights), field_.built_for_s)
        return made

    def _is_slower(self, field_: _Field, at: int) -> None:
        """Nothing that fits is in a mesh's programme: it may be in a larger one."""
        field_.bound_s[at] = max(float(field_.bound_s[at]), field_.built_for_s)
        if field_.built_for_s == math.inf:
            field_.open[at] = False
        elif not field_.lean_known[at]:
            self._has_room(field_, at)

    def _is_tight(self, field_: _Field) -> bool:
        return bool(field_.lean_known.any())

    def _has_room(self, field_: _Field, at: int) -> None:
        """Find out which meshes cannot keep to the limit within what the programme is built for."""
        assert field_.relaxation is not None
        least = field_.relaxation.least_memory(at)
        field_.lean_known[at] = True
        short = least > self.request.room
        field_.bound_s[short] = np.maximum(field_.bound_s[short], field_.built_for_s)
        if field_.built_for_s == math.inf:
            field_.least_bytes = np.maximum(field_.least_bytes, least)
            field_.open &= ~short


def _gives_up_less(one: Variant, other: Variant) -> bool:
    order = (NONE, SELECTIVE, FULL)
    fewer = one.micro_batches <= other.micro_batches
    return fewer and order.index(one.mode) <= order.index(other.mode)


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
