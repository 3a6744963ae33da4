"""Settle one candidate: its programme solved exactly, recomputation shared out, time simulated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.fx

from autopar.cost.recompute import with_recompute
from autopar.cost.simulate import simulate
from autopar.cost.simulator import How
from autopar.cost.step import Step
from autopar.cost.timeline import Timeline
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice
from autopar.plan import Recompute

from .accounts import NONE, Accounts, overlap_of
from .families import Family
from .frame import Variant
from .given import with_given
from .options import Option
from .price import Pricer
from .problem import Problem, options_of
from .programme import Assignment, solve
from .propose import Proposal
from .relax import Relaxed
from .rounded import Rounded, round_off
from .share_recompute import Shared, share_recompute
from .step_of import step_of

Node = torch.fx.Node
Keeps = Mapping[str, frozenset[tuple[tuple[str, Choice], ...]]]
Stores = Mapping[str, frozenset[str]]

REDUCED = 0.02  # options that cost at least so much more of the step than the bound are left out


@dataclass(frozen=True)
class Settled:
    """A candidate that can be run: what every node does, over time.

    `problem` is at the sizes of one micro-batch. `programme_s` and `programme_bytes` are what the
    programme says of the assignment with its recomputation.
    """

    name: str
    problem: Problem
    mesh: Mesh
    pricer: Pricer
    variant: Variant
    assignment: Assignment
    recompute: tuple[Recompute, ...]
    step: Step
    timeline: Timeline
    roles: tuple[tuple[str, str], ...] = ()
    programme_s: float = 0.0
    programme_bytes: float = 0.0

    @property
    def option(self) -> Mapping[Node, Option]:
        return self.assignment.option


def room_after(made: Settled, room: float, memory_limit: float) -> float:
    """What to leave to a programme whose step took more than the limit within `room` bytes."""
    used = min(room, made.programme_bytes)
    return 0.999 * min(used - (made.timeline.peak_bytes - memory_limit), room)


def settle(
    name: str,
    problem: Problem,
    mesh: Mesh,
    family: Family,
    variant: Variant,
    memory_limit: float,
    near: Proposal | None = None,
    minimise_memory: bool = False,
    or_leanest: bool = False,
) -> Settled | None:
    """The best assignment on a mesh within the limit, or None; or the leanest, whatever the limit.

    The latter with `minimise_memory`, and with `or_leanest` where nothing is within the limit.

    With `near`, a candidate whose relaxation was solved, only options close to it are tried first.
    """
    pricer = Pricer(
        problem.cluster, mesh, problem.optimizer, family.never_gather, variant.micro_batches
    )
    given = problem.given_bytes(variant.micro_batches)  # which the programme does not have
    memory_limit -= given
    regions = problem.regions
    modes = dict.fromkeys(range(len(regions.copies)), variant.mode)
    overlap = overlap_of(problem.cluster, mesh)
    accounts = Accounts(pricer, regions, variant.micro_batches, modes, overlap)
    assignment = None
    tries: list[tuple[tuple[Keeps, Stores] | None, float]] = [(None, math.inf)]
    if near is not None and near.relaxed is not None:
        rounded = _rounded(problem, near, accounts, memory_limit)
        if rounded.agrees and rounded.assignment is None:
            return None
        assignment = rounded.assignment
        tries.insert(0, (_close(near), near.relaxed.time_s * (1 + REDUCED)))
    for keep, better_than_s in tries if assignment is None else ():
        options = _options(problem, mesh, pricer, family, keep)
        assignment = solve(
            problem.graph,
            problem.blocks,
            options,
            pricer,
            memory_limit,
            minimise_memory=minimise_memory,
            better_than_s=better_than_s,
            accounts=accounts,
        )
        if assignment is not None:
            break
    if assignment is None and or_leanest:
        assignment = solve(
            problem.graph,
            problem.blocks,
            options,
            pricer,
            memory_limit,
            minimise_memory=True,
            accounts=accounts,
        )
    if assignment is None:
        return None
    shared = Shared((), assignment.time_s, assignment.memory_bytes)
    if variant.mode != NONE:
        shared = share_recompute(
            problem.graph,
            problem.blocks,
            assignment.option,
            accounts,
            0.0 if minimise_memory else memory_limit,
        )
    made = settled(name, problem, mesh, pricer, variant, assignment, shared.recompute)
    return replace(
        made,
        roles=tuple(family.role.items()),
        programme_s=shared.time_s,
        programme_bytes=shared.memory_bytes + given,
    )


def _rounded(problem: Problem, near: Proposal, accounts: Accounts, memory_limit: float) -> Rounded:
    """What a solved relaxation becomes, solved again where the limit is another."""
    assert near.relaxation is not None and near.relaxed is not None
    relaxed: Relaxed | None = near.relaxed
    if relaxed is not None and relaxed.memory_bytes > memory_limit:
        relaxed = near.relaxation.solve(near.at, memory_limit)
    if relaxed is None:
        return Rounded(None, agrees=not near.relaxation.stalled)
    return round_off(problem, near.relaxation, near.at, relaxed, accounts, memory_limit)


def settled(
    name: str,
    problem: Problem,
    mesh: Mesh,
    pricer: Pricer,
    variant: Variant,
    assignment: Assignment,
    recompute: tuple[Recompute, ...] = (),
) -> Settled:
    """An assignment with its simulated step; what runs when is not recorded (`recorded`)."""
    step = step_of(problem.graph, problem.blocks, assignment.option, pricer, variant.micro_batches)
    step = with_given(step, problem.given_bytes(variant.micro_batches))
    modes = {r.block: (r.full, r.selective) for r in recompute}
    step = with_recompute(step, modes) if modes else step
    timeline = simulate(step, problem.cluster, how=How(record=False))
    return Settled(name, problem, mesh, pricer, variant, assignment, recompute, step, timeline)


def recorded(made: Settled) -> Timeline:
    """The whole timeline of a settled candidate: all spans, and memory at every moment."""
    return simulate(made.step, made.problem.cluster)


def _close(near: Proposal) -> tuple[Keeps, Stores]:
    """What each node may do, of the options whose reduced cost is small."""
    assert near.relaxed is not None and near.relaxation is not None
    relaxation, columns = near.relaxation, near.relaxation.columns
    reduced = relaxation.reduced(near.at, near.relaxed.weights)
    most = REDUCED * near.relaxed.time_s
    keeps: dict[str, frozenset[tuple[tuple[str, Choice], ...]]] = {}
    stores: dict[str, frozenset[str]] = {}
    for node, options in columns.options.items():
        first = columns.first[node]
        close = [o for i, o in enumerate(options) if reduced[first + i] <= most]
        if node.op == "placeholder":
            stores[node.name] = frozenset(str(o.gives[0]) for o in close)
        else:
            keeps[node.name] = frozenset(o.choices for o in close)
    return keeps, stores


def _options(
    problem: Problem,
    mesh: Mesh,
    pricer: Pricer,
    family: Family,
    keep: tuple[Keeps, Stores] | None,
) -> dict[Node, list[Option]]:
    if keep is None:
        return options_of(problem, mesh, pricer, family)
    keeps, stores = keep
    allowed: dict[tuple[str, str], set[Choice]] = {}
    for node, chosen in keeps.items():
        for choices in chosen:
            for axis, choice in choices:
                allowed.setdefault((node, axis), set()).add(choice)

    def near(node: Node, axis: str, choice: Choice) -> bool:
        return choice in allowed.get((node.name, axis), ())

    options = options_of(problem, mesh, pricer, replace(family, only=near))
    return {
        node: [
            o
            for o in found
            if node.op != "placeholder" or str(o.gives[0]) in stores.get(node.name, ())
        ]
        or found
        for node, found in options.items()
    }
