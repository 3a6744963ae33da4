"""A priced step adds up to what the search says of its plan, in time and in memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from autopar.cost.step import Part, Step
from autopar.errors import UserError
from autopar.passes.assignment_of import assignment_of
from autopar.passes.blocks import find_blocks
from autopar.passes.price import Pricer
from autopar.passes.rules_of import rules_of
from autopar.passes.search import predict
from autopar.passes.step_of import step_of
from autopar.plan import Plan, Prediction
from tests.simulate import concrete, cpu, plan_of, zoo_subject

RANKS = 4
CASES = [
    ("mlp", "tensor"),
    ("gpt_outside", "data"),
    ("gpt_outside", "zero"),
    ("gpt_outside", "tensor"),
    ("gpt_outside", "data+tensor"),
    ("resnet", "data"),
]


@cache
def made(name: str, strategy: str) -> tuple[Plan, Step, Prediction]:
    subject = zoo_subject(name)
    plan = plan_of(subject, RANKS, strategy)
    graph = concrete(subject)
    blocks, pricer = find_blocks(graph), Pricer(cpu(RANKS), plan.mesh)
    option = assignment_of(graph, rules_of(graph), plan, pricer, blocks)
    return plan, step_of(graph, blocks, option, pricer), predict(graph, option, pricer)


def seconds(part: Part) -> float:
    return part.forward_s * (2 if part.regather else 1) + part.backward_s


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_the_assignment_of_a_plan_costs_what_the_plan_says(name: str, strategy: str) -> None:
    plan, _, predicted = made(name, strategy)
    # The search adds a nanosecond per parameter that is gathered twice (1 % for rounding).
    slack = 1.01e-9 * len(plan.params)
    assert predicted.time_s == pytest.approx(plan.predicted.time_s, rel=1e-9, abs=slack)
    assert predicted.memory_parts == plan.predicted.memory_parts
    assert predicted.comm_bytes == plan.predicted.comm_bytes


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_times_add_up(name: str, strategy: str) -> None:
    _, step, predicted = made(name, strategy)
    compute = comm = 0.0
    for segment, part in step.parts():
        own = " over " in part.name
        if part.is_compute or own:  # the search counts what an op communicates itself with the op
            compute += segment.copies * seconds(part)
        else:
            comm += segment.copies * seconds(part)
    assert compute == pytest.approx(predicted.compute_s, rel=1e-9)
    assert comm == pytest.approx(predicted.comm_s, rel=1e-9)
    assert step.optimizer_s == predicted.optimizer_s


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_bytes_add_up(name: str, strategy: str) -> None:
    _, step, predicted = made(name, strategy)
    saved = sum(s.copies * p.saved_bytes for s, p in step.parts())
    total = sum(step.state_bytes.values()) + saved
    assert total == pytest.approx(predicted.memory_bytes, abs=8)
    gradients = sum(s.copies * p.gradient_bytes for s, p in step.parts())
    assert gradients == pytest.approx(step.state_bytes["gradients"])
    for segment in step.segments:
        for i, part in enumerate(segment.parts):
            assert all(-1 <= dep < i for dep in part.deps), part
            assert i <= part.freed_by <= len(segment.parts), part
            assert sum(n for _, n in part.saved_from) <= part.saved_bytes * (1 + 1e-12)


def test_bytes_sent_add_up() -> None:
    for name, strategy in CASES[:4]:
        _, step, predicted = made(name, strategy)
        sent: dict[str, float] = {}
        for segment, part in step.parts():
            forward = part.sent_bytes * (2 if part.regather else 1)
            for kind, n in ((part.kind, forward), (part.backward_kind, part.backward_sent_bytes)):
                if n:
                    sent[kind] = sent.get(kind, 0.0) + segment.copies * n
        assert sent == pytest.approx(dict(predicted.comm_bytes), rel=1e-6, abs=4)


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
