"""Stages of parameters, and the cuts of a plan in another capture of its model."""

from __future__ import annotations

import pytest

from autopar.errors import UserError
from autopar.ir.mesh import Axis, Mesh
from autopar.passes.pipeline_plan import matching_cuts, stages_of, with_pipeline
from autopar.plan import Plan, Prediction, Storage, plan_from_json

from .helpers import graph_of

CHAIN = """
%table: param f32[4, 4] grad "table"
%w1: param f32[4, 4] grad "w1"
%w2: param f32[4, 4] grad "w2"
%unread: param f32[4] grad "unread"
%x: input f32[8, 4] "x"
%a: f32[8, 4] = aten.mm(%x, %table)
%b: f32[8, 4] = aten.mm(%a, %w1)
%drop: f32[8, 4] = aten.dropout(%b, 0.5, True)
%c: f32[8, 4] = aten.mm(%drop, %w2)
%d: f32[8, 4] = aten.mm(%c, %table)
return %d
"""
# Without the dropout, and with other names.
OTHER = """
%table: param f32[4, 4] grad "table"
%w1: param f32[4, 4] grad "w1"
%w2: param f32[4, 4] grad "w2"
%x: input f32[8, 4] "x"
%k: f32[8, 4] = aten.mm(%x, %table)
%l: f32[8, 4] = aten.mm(%k, %w1)
%m: f32[8, 4] = aten.relu(%l)
%n: f32[8, 4] = aten.mul.Tensor(%l, %m)
%o: f32[8, 4] = aten.mm(%n, %w2)
%p: f32[8, 4] = aten.mm(%o, %table)
return %p
"""

NAMES = ("table", "w1", "w2", "unread")
FLAT = Plan(
    fingerprint="f",
    mesh=Mesh((Axis("dp", 2),)),
    cluster="c",
    strategy="data",
    choices={},
    params={name: Storage("[-, -]") for name in NAMES},
    predicted=Prediction(0.1, 0.06, 0.03, 0.01, 1000),
)


def piped() -> Plan:
    return with_pipeline(FLAT, graph_of(CHAIN), 2, ["drop"], 4)


def test_a_plan_of_a_stage_becomes_one_of_a_pipeline() -> None:
    plan = piped()
    assert plan_from_json(plan.to_json()) == plan
    assert str(plan.mesh) == str(Mesh((Axis("pp", 2), Axis("dp", 2))))
    assert {name: plan.params[name].stages for name in NAMES} == {
        "table": (0, 1),
        "w1": (0,),
        "w2": (1,),
        "unread": (0,),
    }


def test_pieces_of_one_stage_share_its_parameters() -> None:
    used = stages_of(graph_of(CHAIN), ["b", "c", "d"], 2)
    assert used == {"table": (0, 1), "w1": (1,), "w2": (0,), "unread": (0,)}


def test_cuts_are_found_again_where_parameters_change_stages() -> None:
    plan = piped()
    assert matching_cuts(graph_of(CHAIN), plan) == ("drop",)
    # One value crosses before %l and before %o, two between: the first narrow place is taken.
    assert matching_cuts(graph_of(OTHER), plan) == ("m",)


def test_a_model_that_reads_one_stage_only_cannot_be_cut() -> None:
    shorter = OTHER.replace("%n, %w2", "%n, %w1").replace("%o, %table", "%o, %w1")
    with pytest.raises(UserError, match="cannot be cut into 2 pieces"):
        matching_cuts(graph_of(shorter), piped())


def test_a_last_stage_that_has_a_tied_parameter_alone_is_found_again() -> None:
    plan = with_pipeline(FLAT, graph_of(CHAIN), 2, ["d"], 4)
    assert plan.params["table"].stages == (0, 1)
    assert matching_cuts(graph_of(OTHER), plan) == ("p",)
