"""A priced step adds up to what the search says of its plan, in time and in memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from autopar.cost import staging
from autopar.cost.sent import sent_bytes
from autopar.cost.step import Part, Step
from autopar.errors import UserError
from autopar.passes.accounts import Paid
from autopar.passes.assignment_of import assignment_of
from autopar.passes.case import make_case
from autopar.passes.price import Pricer
from autopar.passes.rules_of import rules_of
from autopar.passes.step_of import step_of
from autopar.plan import Plan
from tests.autocast import Autocast
from tests.simulate import Subject, concrete, cpu, plan_of, subject_of, zoo_subject
from tests.zoo import ZOO

RANKS = 4
CASES = [
    ("mlp", "tensor"),
    ("gpt_outside", "data"),
    ("gpt_outside", "zero"),
    ("gpt_outside", "tensor"),
    ("gpt_outside", "data+tensor"),
    ("resnet", "data"),
]
AUTOCAST = [("mlp:autocast", s) for s in ("zero", "data", "zero+tensor")]


def worn(name: str) -> bool:
    return name.endswith(":autocast")


@cache
def under_autocast(name: str) -> Subject:
    torch.manual_seed(0)
    args, kwargs = ZOO[name.partition(":")[0]].inputs(0, torch.float32)
    return subject_of(Autocast(ZOO[name.partition(":")[0]].build()), args, kwargs)


@cache
def made(name: str, strategy: str) -> tuple[Plan, Step, Paid]:
    """A plan, its step, and what the search's account says that it costs."""
    subject = under_autocast(name) if worn(name) else zoo_subject(name)
    plan = plan_of(subject, RANKS, strategy)
    case = make_case(subject.graph, subject.capture.symbols, plan, cpu(RANKS))
    step = step_of(case.concrete, case.blocks, case.option, case.pricer, 1)
    assert not plan.recompute and case.accounts.micro_batches == 1
    return plan, step, case.paid


def seconds(part: Part) -> float:
    return part.forward_s * (2 if part.regather else 1) + part.backward_s


@pytest.mark.parametrize(("name", "strategy"), CASES + AUTOCAST)
def test_times_add_up(name: str, strategy: str) -> None:
    _, step, paid = made(name, strategy)
    compute = comm = 0.0
    for segment, part in step.parts():
        own = " over " in part.name
        if part.is_compute or own:  # the search counts what an op communicates itself with the op
            compute += segment.copies * seconds(part)
        else:
            comm += segment.copies * seconds(part)
    assert compute == pytest.approx(paid.compute_s, rel=1e-9)
    assert comm == pytest.approx(paid.blocking_s + paid.parameters_s, rel=1e-9)
    assert step.optimizer_s == pytest.approx(paid.optimizer_s, rel=1e-9)


@pytest.mark.parametrize(("name", "strategy"), CASES + AUTOCAST)
def test_bytes_add_up(name: str, strategy: str) -> None:
    _, step, paid = made(name, strategy)
    saved = sum(s.copies * p.saved_bytes for s, p in step.parts())
    total = sum(step.state_bytes.values()) + saved - step.state_bytes.get(staging.NAME, 0.0)
    assert total == pytest.approx(paid.memory_bytes, abs=8)
    gradients = sum(s.copies * p.gradient_bytes for s, p in step.parts())
    assert gradients == pytest.approx(step.state_bytes["gradients"])
    for segment in step.segments:
        for i, part in enumerate(segment.parts):
            assert all(-1 <= dep < i for dep in part.deps), part
            assert i <= part.freed_by <= len(segment.parts), part
            assert sum(n for _, n in part.saved_from) <= part.saved_bytes * (1 + 1e-12)


@pytest.mark.parametrize(("name", "strategy"), CASES[:5] + AUTOCAST)
def test_bytes_sent_add_up(name: str, strategy: str) -> None:
    """The collectives of the step send what the plan's own table of them says."""
    plan, step, _ = made(name, strategy)
    sent: dict[str, float] = {}
    for t in plan.traffic:
        sent[t.collective] = sent.get(t.collective, 0.0) + t.sent_bytes
    own = {p.name for _, p in step.parts() if " over " in p.name}
    assert not own or sum(sent_bytes(step).values()) >= sum(sent.values()) - 16
    if not own:
        assert sent_bytes(step) == pytest.approx(
            sent, rel=2e-3, abs=16
        )  # it counts the largest shard


def test_layers_are_copies_of_one_segment() -> None:
    _, step, _ = made("gpt_outside", "data")
    assert [(s.copies, bool(s.block)) for s in step.segments] == [(1, False), (2, True), (1, False)]
    assert step.segments[1].input_bytes > 0


def test_parameters_that_are_gathered_twice() -> None:
    _, step, _ = made("gpt_outside", "zero")
    gathers = [p for _, p in step.parts() if p.regather]
    assert gathers
    assert {(p.kind, p.backward_kind, p.once) for p in gathers} == {
        ("all_gather", "reduce_scatter", False)
    }
    _, data, _ = made("gpt_outside", "data")
    assert {(p.kind, p.backward_kind, p.once) for _, p in data.parts() if p.param} == {
        ("", "all_reduce", True)
    }


def test_an_impossible_choice_is_named() -> None:
    subject = zoo_subject("mlp")
    plan = plan_of(subject, RANKS, "data")
    graph = concrete(subject)
    node = next(n for n, c in plan.choices.items() if n.startswith("linear"))
    wrong = replace(plan, choices={**plan.choices, node: {"dp": "z"}})
    with pytest.raises(UserError, match=f"the plan lets {node} do what it cannot: dp: z"):
        assignment_of(graph, rules_of(graph), wrong, Pricer(cpu(RANKS), plan.mesh))
    lacking = replace(plan, params=dict(list(plan.params.items())[1:]))
    with pytest.raises(UserError, match="does not say how to store the parameter"):
        assignment_of(graph, rules_of(graph), lacking, Pricer(cpu(RANKS), plan.mesh))
