"""What a search of one captured graph finds out and the next one may use again, and its request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy

from autopar.cost.cluster import Cluster
from autopar.ir.graph import Graph
from autopar.ir.mesh import Mesh

from .accounts import NONE
from .frame import Frame, Priced, build_frame
from .moves import Ways
from .problem import Problem, problem_of

Roles = tuple[tuple[str, str], ...]
Symbols = Mapping[sympy.Symbol, int]

KEPT = 24  # sets of prices of meshes


@dataclass
class Frames:
    """The frames of one captured graph, made when they are first needed and kept for re-plans."""

    problem: Problem
    made: dict[Roles, Frame] = field(default_factory=dict)
    problems: dict[tuple[tuple[sympy.Symbol, int], ...], Problem] = field(default_factory=dict)
    ways: dict[tuple[str, ...], Ways] = field(default_factory=dict)
    prices: dict[object, Priced] = field(default_factory=dict)

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

    def priced(
        self, roles: Roles, meshes: tuple[Mesh, ...], request: Request, micro_batches: int
    ) -> Priced:
        """Prices of meshes at the sizes of one micro-batch; the latest are kept."""
        sizes = tuple(request.at(micro_batches).items())
        key = (roles, meshes, sizes)
        found = self.prices.get(key)
        if found is None or found.pricer.grid.cluster is not request.cluster:
            found = self.get(roles).priced(meshes, request.cluster, dict(sizes))
            while len(self.prices) >= KEPT:
                del self.prices[next(iter(self.prices))]
            self.prices[key] = found
        return found

    def get(self, roles: Roles) -> Frame:
        if roles not in self.made:
            names = tuple(name for name, _ in roles)
            ways = self.ways.setdefault(names, {})
            self.made[roles] = build_frame(self.problem, dict(roles), ways=ways)
        return self.made[roles]


@dataclass(frozen=True)
class Request:
    """What to plan for: sizes, the cluster, bytes per device, and which variants may be tried.

    Candidates that take `better_than_s` seconds or more are not looked for. `given_bytes` of the
    memory are taken by what every device is given whole, and are not in programmes.
    """

    cluster: Cluster
    symbols: Mapping[sympy.Symbol, int]
    memory_limit: float
    micro_batches: Sequence[int] = (1,)
    modes: Sequence[str] = (NONE,)
    axes: int = 3
    better_than_s: float = math.inf
    given_bytes: float = 0.0

    @property
    def room(self) -> float:
        """Bytes per device that are left to a programme."""
        return self.memory_limit - self.given_bytes

    def at(self, micro_batches: int) -> dict[sympy.Symbol, int]:
        """The sizes of one micro-batch."""
        return {
            symbol: size // micro_batches if str(symbol) == "b" else size
            for symbol, size in self.symbols.items()
        }
