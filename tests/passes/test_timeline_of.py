"""A plan over time: run serially, it takes what the search's additive account says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from autopar.cost.cluster import parse_cluster
from autopar.cost.schedules import Schedule
from autopar.cost.simulator import How
from autopar.passes.case import Case, make_case
from autopar.passes.timeline_of import step_of_case, timeline_of
from autopar.plan import Plan, Recompute
from tests.simulate import plan_of, zoo_subject

SERIAL = How(overlap=False, prefetch=0)


@cache
def planned(name: str, strategy: str) -> Plan:
    return plan_of(zoo_subject(name), 4, strategy)


def case_of(name: str, strategy: str, mode: str = "none") -> Case:
    """The plan on four GPUs, all its blocks recomputed in some way."""
    subject, plan = zoo_subject(name), planned(name, strategy)
    cluster = parse_cluster("4xH100")
    made = make_case(subject.graph, subject.capture.symbols, plan, cluster)
    if mode == "none":
        return made
    blocks = tuple(
        Recompute(first.name, n, *((n, 0) if mode == "full" else (0, n)))
        for first, _, n in made.blocks.regions
    )
    plan = replace(plan, recompute=blocks)
    return make_case(subject.graph, subject.capture.symbols, plan, cluster)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("gpt_outside", "data"), ("gpt_outside", "zero"), ("gpt_outside", "tensor"), ("resnet", "data")],
)  # fmt: skip
def test_run_serially_it_takes_the_sum(name: str, strategy: str, mode: str) -> None:
    case = case_of(name, strategy, mode)
    made = timeline_of(case, how=SERIAL)
    paid = case.paid
    total = paid.compute_s + paid.blocking_s + paid.parameters_s + paid.optimizer_s
    assert made.step_s == pytest.approx(total, rel=1e-6)
    assert (made.recompute_s > 0) == (mode != "none")
    beside = timeline_of(case)
    assert made.compute_s <= beside.compute_s + 1e-12  # a profile may slow it down
    assert beside.step_s <= made.step_s * (1 + 1e-9)
    assert made.memory[-1, 1] == pytest.approx(sum(step_of_case(case).state_bytes.values()))


def test_recomputation_needs_less_memory() -> None:
    peaks = [timeline_of(case_of("gpt_outside", "tensor", m)).peak_bytes for m in ("none", "full")]
    assert peaks[1] < peaks[0]


def test_on_stages() -> None:
    made = timeline_of(case_of("gpt_outside", "data"), schedule=Schedule(2))
    assert len(made.stages) == 2 and made.bubble_s > 0
