"""What else an op or a parameter could do, and what it would cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch.fx

from autopar.cost.cluster import make_mesh
from autopar.passes.alternatives import op_alternatives, storage_alternatives, why_chosen
from autopar.passes.case import Case, make_case
from autopar.plan import Plan, Prediction, Storage
from tests.simulate import cpu

from .helpers import graph_of

B = sympy.Symbol("b", integer=True, positive=True)
TWO_LINEAR = """
%w1: param f32[512, 256] grad "w1"
%w2: param f32[256, 512] grad "w2"
%x: input f32[b, 256] "x"
%h: f32[b, 512] = aten.linear(%x, %w1)
%g: f32[b, 512] = aten.gelu(%h)
%y: f32[b, 256] = aten.linear(%g, %w2)
%s: f32[] = aten.sum(%y)
return %s
"""


def case(choices: dict[str, str], stored: str = "[-, -]", batch: int = 1024) -> Case:
    cluster = cpu(4)
    plan = Plan(
        "f",
        make_mesh(cluster, {"dp": 4}),
        "cpu:4",
        "auto",
        {node: {"dp": choice} for node, choice in choices.items()},
        {"w1": Storage(stored), "w2": Storage("[-, -]")},
        Prediction(1.0, 1.0, 0.0, 0.0, 1),
    )
    return make_case(graph_of(TWO_LINEAR), {B: batch}, plan, cluster)


def node(case: Case, name: str) -> torch.fx.Node:
    return next(n for n in case.concrete.fx.nodes if n.name == name)


def data_parallel() -> Case:
    """Every op splits the first dim of its first input."""
    rules = case({}).rules
    return case({name: rules[name].inputs[0][0][0] for name in "hgys"})


def test_the_chosen_option_changes_nothing() -> None:
    made = data_parallel()
    (mine,) = [c for c in op_alternatives(made, node(made, "h")) if c.chosen]
    assert (mine.delta_s, mine.own_delta_s, mine.reshard_delta_s, mine.delta_bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ["h", "g", "y"])
def test_every_alternative_costs_what_a_plan_with_it_costs(name: str) -> None:
    made = data_parallel()
    costs = op_alternatives(made, node(made, name))
    assert len(costs) >= 3
    assert [c.delta_s for c in costs] == sorted(c.delta_s for c in costs)
    for cost in costs:
        choices = {**made.plan.choices, name: {a: str(c) for a, c in cost.option.choices}}
        plan = replace(made.plan, choices=choices)
        other = make_case(made.symbolic, made.hints, plan, made.cluster)
        assert cost.delta_s == pytest.approx(other.time_s - made.time_s, abs=1e-12)
        assert cost.delta_bytes == pytest.approx(other.memory_bytes - made.memory_bytes, abs=1)
        assert cost.delta_s == pytest.approx(cost.own_delta_s + cost.reshard_delta_s, abs=1e-12)


def test_every_way_to_store_a_parameter_costs_what_a_plan_with_it_costs() -> None:
    made = data_parallel()
    costs = storage_alternatives(made, node(made, "w1"))
    assert {str(c.option.gives[0]) for c in costs} >= {"[-, -]", "[dp, -]"}
    for cost in costs:
        stored = Storage(str(cost.option.gives[0]), cost.option.regather)
        plan = replace(made.plan, params={**made.plan.params, "w1": stored})
        other = make_case(made.symbolic, made.hints, plan, made.cluster)
        assert cost.delta_s == pytest.approx(other.time_s - made.time_s, abs=2e-9)
        assert cost.delta_bytes == pytest.approx(other.memory_bytes - made.memory_bytes, abs=1)


def test_the_reason_names_what_the_next_best_loses() -> None:
    made = data_parallel()
    costs = op_alternatives(made, node(made, "g"))
    assert costs[0].chosen
    assert why_chosen(costs, 1e9).startswith("the next best makes the step ")
    assert "resharding around it" in why_chosen(costs, 1e9)


def test_a_bad_choice_is_called_one() -> None:
    whole = data_parallel()
    worse = {**whole.plan.choices, "g": {}}
    made = make_case(whole.symbolic, whole.hints, replace(whole.plan, choices=worse), whole.cluster)
    costs = op_alternatives(made, node(made, "g"))
    assert not costs[0].chosen and costs[0].delta_s < 0
    assert "another option would make the step" in why_chosen(costs, 1e12)
    needy = [replace(costs[0], delta_bytes=2**21), *costs[1:]]
    assert "needs 2 MiB more, which do not fit" in why_chosen(needy, 2**20)
    assert why_chosen([c for c in costs if c.chosen], 0) == "nothing else is legal here"
