"""Meshes of three axes: solved, lowered for eight ranks, and equal to one device."""

from __future__ import annotations

import math

import pytest

from autopar.cost.cluster import Cluster, make_mesh, parse_cluster
from autopar.passes.frame import Variant
from autopar.passes.problem import problem_of
from autopar.passes.propose import Roles
from autopar.passes.settle import Settled, settle
from tests.simulate import (
    Decisions,
    check_zoo,
    zoo_subject,
)

SEQUENCE: Roles = (("dp", "batch"), ("cp", "sequence"), ("tp", "feature"))
EXPERT: Roles = (("dp", "batch"), ("ep", "expert"), ("tp", "feature"))
SHARDED: Roles = (("dp", "batch"), ("fsdp", "batch"), ("tp", "feature"))


def cluster() -> Cluster:
    return parse_cluster("2x4xH100")


def settled(name: str, roles: Roles, limit: float = math.inf) -> Settled | None:
    """The best assignment of 2 x 2 x 2 devices with the axes' roles; the leanest for no limit."""
    subject = zoo_subject(name)
    problem = problem_of(subject.graph, subject.capture.symbols, cluster(), "adamw")
    mesh = make_mesh(cluster(), {axis: 2 for axis, _ in roles})
    family = problem.family("auto", dict(roles))
    lean = limit == 0
    return settle("auto", problem, mesh, family, Variant(), limit, minimise_memory=lean)


def decided(made: Settled) -> Decisions:
    """What an assignment decides, as the lowering takes it."""
    params = {n.name: o for n, o in made.option.items() if n.meta.get("role") == "param"}
    return Decisions(
        made.mesh,
        {n.name: dict(o.choices) for n, o in made.option.items() if o.choices},
        {name: o.gives[0] for name, o in params.items()},
        frozenset(name for name, o in params.items() if o.regather),
    )


def splitting(made: Settled) -> set[str]:
    """Axes that some op's choice or some parameter's storage uses."""
    used = {axis for o in made.option.values() for axis, choice in o.choices if choice.factor}
    stored = [o.gives[0] for n, o in made.option.items() if n.meta.get("role") == "param"]
    return used | {axis for s in stored for axis in s.used_axes()}


CASES = [
    ("gpt_outside", SEQUENCE, 0.0),
    ("moe_scatter", EXPERT, 0.0),
    ("gpt_outside", SHARDED, 0.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eight_ranks_equal_one_device(case: tuple[str, Roles, float]) -> None:
    name, roles, limit = case
    made = settled(name, roles, limit)
    assert made is not None
    if limit == 0:  # the leanest leaves no axis without work
        assert splitting(made) == {axis for axis, _ in roles}
    check_zoo(name, decided(made), what=" x ".join(role for _, role in roles))
