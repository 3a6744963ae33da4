"""An assignment from a relaxation that was solved: its columns, at the prices of their mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.fx

from .accounts import Accounts
from .options import Option, priced_on
from .problem import Problem
from .programme import Assignment, evaluate, round_relaxed
from .relax import Relaxation, Relaxed

Node = torch.fx.Node

AGREE = 1e-3  # how far prices on many meshes may be from those on one


@dataclass(frozen=True)
class Rounded:
    """What became of a relaxation.

    No `assignment` where nothing is feasible. `agrees` is false where the relaxation's prices are
    not those of the mesh, which says nothing of it.
    """

    assignment: Assignment | None
    agrees: bool = True


def round_off(
    problem: Problem,
    relaxation: Relaxation,
    at: int,
    relaxed: Relaxed,
    accounts: Accounts,
    memory_limit: float,
) -> Rounded:
    """The assignment of a relaxation on its mesh number `at`; what it leaves open, exactly.

    `problem` and `accounts` are of that mesh at the sizes of one micro-batch. The gap is to the
    relaxation.
    """
    columns = relaxation.columns
    where = {node: range(i, i + len(columns.options[node])) for node, i in columns.first.items()}
    rows = relaxation.rows(at, memory_limit)
    solved = round_relaxed(rows, where, relaxed.whole)
    if solved is None:
        return Rounded(None)
    chosen, objective, gap, status = solved
    representative = _priced(problem, columns.options, chosen, accounts)
    if representative is None:
        return Rounded(None, agrees=False)
    stands_for = problem.blocks.representative
    nodes = {node.name: node for node in representative}
    everywhere = {
        node: representative[nodes[stands_for[node].name]]
        for node in problem.graph.fx.nodes
        if stands_for[node].name in nodes
    }
    time_s, memory_bytes = evaluate(problem.graph, problem.blocks, everywhere, accounts)
    close = abs(time_s - objective) <= AGREE * max(objective, 1e-12)
    if not close or memory_bytes > memory_limit * (1 + 1e-6):
        return Rounded(None, agrees=False)
    return Rounded(Assignment(everywhere, time_s, memory_bytes, gap, status))


def _priced(
    problem: Problem,
    options: Mapping[Node, Sequence[Option]],
    chosen: Mapping[Node, int],
    accounts: Accounts,
) -> dict[Node, Option] | None:
    """The chosen options for the problem's own nodes, which have the names of the columns'."""
    own = {node.name: node for node in problem.graph.fx.nodes}
    found: dict[Node, Option] = {}
    for node, i in chosen.items():
        option = options[node][i]
        mine = own[node.name]
        made = priced_on(mine, problem.rules.get(node.name), option, accounts.pricer)
        if made is None:
            return None
        found[mine] = made
    return found
