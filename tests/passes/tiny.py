"""Tiny graphs with every assignment tried: what the solver must find."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.fx

from autopar.cost.cluster import make_mesh
from autopar.ir.graph import Graph
from autopar.passes.accounts import Accounts, regions_of
from autopar.passes.blocks import Blocks, find_blocks
from autopar.passes.families import FAMILIES, Family, batch_factors
from autopar.passes.options import Option
from autopar.passes.price import Pricer
from autopar.passes.programme import Assignment, evaluate, solve
from autopar.passes.rules_of import rules_of
from autopar.passes.search import Problem, _options
from tests.simulate import cpu

from .helpers import graph_of

Node = torch.fx.Node

LINEAR = """
%w: param f32[512, 256] grad "w"
%x: input f32[64, 256] "x"
%y: f32[64, 512] = aten.linear(%x, %w)
%s: f32[] = aten.sum(%y)
return %s
"""
TWO_MATRICES = """
%w1: param f32[512, 64] grad "w1"
%w2: param f32[64, 512] grad "w2"
%x: input f32[8, 64] "x"
%h: f32[8, 512] = aten.linear(%x, %w1)
%y: f32[8, 64] = aten.linear(%h, %w2)
return %y
"""
SHARED = """
%w: param f32[64, 64] grad "w"
%x: input f32[16, 64] "x"
%a: f32[16, 64] = aten.linear(%x, %w)
%b: f32[16, 64] = aten.linear(%a, %w)
%c: f32[16, 64] = aten.add.Tensor(%a, %b)
return %c
"""
REPEATED = """
%w0: param f32[64, 64] grad "layers.0"
%w1: param f32[64, 64] grad "layers.1"
%x: input f32[16, 64] grad "x"
%z: f32[16, 64] = aten.relu(%x)
%a: f32[16, 64] = aten.relu(%z)
%b: f32[16, 64] = aten.linear(%a, %w0)
%c: f32[16, 64] = aten.relu(%b)
%d: f32[16, 64] = aten.linear(%c, %w1)
return %d
"""
GRAPHS = {
    "linear": LINEAR, "two_matrices": TWO_MATRICES, "shared": SHARED, "repeated": REPEATED
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A graph with its options on one mesh."""

    graph: Graph
    blocks: Blocks
    options: Mapping[Node, Sequence[Option]]
    pricer: Pricer
    micro_batches: int = 1
    mode: str = "none"
    overlap: float = 0.0

    @property
    def accounts(self) -> Accounts:
        regions = regions_of(self.graph, self.blocks)
        modes = dict.fromkeys(range(len(regions.copies)), self.mode)
        return Accounts(self.pricer, regions, self.micro_batches, modes, self.overlap)

    def solve(self, limit: float = math.inf, **how: float | bool) -> Assignment | None:
        how.setdefault("accounts", self.accounts)  # type: ignore[arg-type]
        return solve(self.graph, self.blocks, self.options, self.pricer, limit, **how)  # type: ignore[arg-type]

    def assignments(self) -> list[tuple[float, float]]:
        """(seconds, bytes) of every assignment that exists."""
        nodes = list(self.options)
        stands_for = self.blocks.representative
        members = [n for n in self.graph.fx.nodes if stands_for[n] in self.options]
        found, accounts = [], self.accounts
        for picks in itertools.product(*self.options.values()):
            picked = dict(zip(nodes, picks, strict=True))
            everywhere = {n: picked[stands_for[n]] for n in members}
            cost = evaluate(self.graph, self.blocks, everywhere, accounts)
            if math.isfinite(cost[0]):
                found.append(cost)
        return found


def tiny(
    text: str,
    sizes: Mapping[str, int],
    family: str = "auto",
    most: int = 5,
    blocks: bool = True,
) -> Tiny:
    """A tiny graph on CPU ranks; `most` options are kept per node, so that all can be tried."""
    graph = graph_of(text)
    rules = rules_of(graph)
    cluster = cpu(math.prod(sizes.values()))
    mesh = make_mesh(cluster, dict(sizes))
    known = find_blocks(graph)
    if not blocks:
        known = Blocks({node: node for node in graph.fx.nodes}, ())
    problem = Problem(graph, rules, known, batch_factors(graph, rules, graph), cluster, "adamw")
    roles = next(r for r in FAMILIES[family] if len(r) == len(sizes))
    restricted = Family(family, dict(zip(sizes, roles, strict=True)), problem.batch)
    pricer = Pricer(cluster, mesh, "adamw", restricted.never_gather)
    options = _options(problem, mesh, pricer, restricted)
    kept = {node: _spread(found, most) for node, found in options.items()}
    return Tiny(graph, known, kept, pricer)


def _spread(options: Sequence[Option], most: int) -> list[Option]:
    """At most `most` options, from the first to the last."""
    if len(options) <= most:
        return list(options)
    step = (len(options) - 1) / (most - 1)
    return [options[round(i * step)] for i in range(most)]
