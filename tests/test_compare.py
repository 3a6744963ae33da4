"""Two plans side by side: what differs, collapsed over layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from autopar.compare import Difference, OpChange, TrafficChange, compare_plans, expanded
from autopar.plan import Pipeline, Plan, Recompute, Storage, Traffic

from .html.plans import KIB, PLAN
from .test_plan import plans


def test_a_plan_is_identical_to_itself() -> None:
    c = compare_plans(PLAN, PLAN)
    assert c.identical and c.same_model
    assert not (c.settings or c.parameters or c.ops or c.choices or c.traffic)
    assert not (c.notes_only_a or c.notes_only_b)


@given(plans)
def test_any_plan_is_identical_to_itself(plan: Plan) -> None:
    c = compare_plans(plan, plan)
    assert c.identical
    assert not (c.settings or c.parameters or c.ops or c.choices or c.traffic)


@given(plans, plans)
def test_comparison_is_symmetric(a: Plan, b: Plan) -> None:
    there, back = compare_plans(a, b), compare_plans(b, a)
    assert sorted((p.name, p.count) for p in there.parameters) == sorted(
        (p.name, p.count) for p in back.parameters
    )
    assert {(d.what, d.a, d.b) for d in there.settings} == {
        (d.what, d.b, d.a) for d in back.settings
    }
    assert there.notes_only_a == back.notes_only_b


def test_settings_and_figures() -> None:
    other = replace(
        PLAN,
        strategy="zero",
        hints={"b": 16},
        recompute=(Recompute("linear", 4, full=1, selective=2),),
        predicted=replace(
            PLAN.predicted, time_s=0.025, memory_parts={"saved activations": 128 * KIB}
        ),
    )
    c = compare_plans(PLAN, other)
    assert not c.identical and c.same_model
    assert c.settings == (
        Difference("strategy", "auto", "zero"),
        Difference("sizes", "b=8", "b=16"),
        Difference("recomputed: block of linear", "", "1 in full, 2 selectively, of 4"),
    )
    figures = {f.name: f for f in c.figures}
    assert figures["step"].ratio == pytest.approx(2.0)
    assert figures["saved activations"].ratio == pytest.approx(0.5)
    assert figures["gathered parameters"].b is None
    assert figures["gathered parameters"].ratio is None


def test_every_field_of_a_plan_counts() -> None:
    """A field that no section shows is still named, whatever will be added to plans."""
    (difference,) = compare_plans(PLAN, replace(PLAN, version=4)).settings
    assert difference == Difference("version", "3", "4")
    (difference,) = compare_plans(PLAN, replace(PLAN, pipeline=Pipeline("1f1b", ("h",)))).settings
    assert difference == Difference("pipeline", "None", "1f1b, 2 pieces from h")
    fewer = replace(PLAN, alternatives=PLAN.alternatives[:2])
    assert compare_plans(PLAN, fewer).settings == (
        Difference("alternatives", "3 listed", "2 listed"),
    )


def test_parameters_are_collapsed_over_layers() -> None:
    whole = Storage("[-, -]", False, "f32[256, 64]", 64 * KIB)
    changed = {**PLAN.params, **{f"blocks.{i}.up.weight": whole for i in (0, 1, 3)}}
    del changed["wte.weight"]
    c = compare_plans(PLAN, replace(PLAN, params=changed))
    assert [(p.name, p.count, p.b) for p in c.parameters] == [
        ("wte.weight", 1, None),
        ("blocks.{0,1,3}.up.weight", 3, whole),
    ]


def test_ops_are_collapsed_where_layers_differ_alike() -> None:
    """One plan has one line for four layers, the other two: only one layer differs."""
    up = PLAN.activations[1]
    other = (
        PLAN.activations[0],
        replace(up, module="blocks.{0,1,3}.up", count=3),
        replace(up, module="blocks.2.up", count=1, splits="dp:0", sharding="[dp, -]"),
        *PLAN.activations[2:],
    )
    c = compare_plans(PLAN, replace(PLAN, activations=other))
    assert c.ops == (
        OpChange(
            "blocks.2.up", "linear", "gpt.py:9", 1, "dp:0 tp:1", "dp:0", "[dp, tp]", "[dp, -]"
        ),
    )


def test_an_op_that_only_one_plan_has() -> None:
    c = compare_plans(PLAN, replace(PLAN, activations=PLAN.activations[:-1]))
    assert c.ops == (OpChange("", "sum", "gpt.py:12", 1, "dp:sum", "", "[] +dp", ""),)


def test_choices_are_compared_within_one_model_only() -> None:
    edited = replace(PLAN, choices={"linear": {"dp": "b", "tp": "n"}, "linear_1": {"tp": "n"}})
    assert compare_plans(PLAN, edited).choices == (
        Difference("linear × 1", "dp:b", "dp:b tp:n"),
        Difference("linear × 1", "whole", "tp:n"),
    )
    c = compare_plans(PLAN, replace(edited, fingerprint="e" * 64))
    assert not c.same_model and c.choices == ()
    assert c.settings[0] == Difference(
        "model", "fingerprint " + "f" * 12, "fingerprint " + "e" * 12
    )


def test_traffic_is_summed_per_collective_and_axis() -> None:
    more = (*PLAN.traffic, Traffic("all_reduce", "dp", "activations at sum", 1, KIB))
    assert compare_plans(PLAN, replace(PLAN, traffic=more)).traffic == (
        TrafficChange("all_reduce", "dp", 99 * KIB, 100 * KIB, 9, 10),
    )


def test_notes() -> None:
    a, b = replace(PLAN, notes=("x", "y")), replace(PLAN, notes=("y", "z"))
    c = compare_plans(a, b)
    assert c.notes_only_a == ("x",) and c.notes_only_b == ("z",)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("head", ["head"]),
        ("a.{0..2,5}.w", ["a.0.w", "a.1.w", "a.2.w", "a.5.w"]),
        ("a.{0,1}.e.{3,4}", ["a.0.e.3", "a.0.e.4", "a.1.e.3", "a.1.e.4"]),
        ("a.{x}", ["a.x"]),
    ],
)
def test_expanded(name: str, names: list[str]) -> None:
    assert expanded(name) == names
