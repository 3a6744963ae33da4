"""Plan files: what is written is read back, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.errors import UserError
from autopar.ir.mesh import Axis, Mesh
from autopar.plan import (
    Activation,
    Alternative,
    HintPrice,
    ModelPart,
    Pipeline,
    Plan,
    Prediction,
    Recompute,
    Storage,
    Traffic,
    load_plan,
    plan_from_json,
)

texts = st.text(max_size=12)
sizes = st.integers(0, 2**50)
times = st.floats(0, 1e6, allow_nan=False)
shardings = st.sampled_from(["[-, -]", "[dp, -]", "[-, 3:tp]", "[dp&tp] +tp", "[] max(dp) ~tp"])
counts = st.dictionaries(texts, sizes, max_size=3)
MESH = Mesh((Axis("dp", 2, 1), Axis("tp", 4)))

plans = st.builds(
    Plan,
    fingerprint=texts,
    mesh=st.just(MESH),
    cluster=texts,
    strategy=texts,
    choices=st.dictionaries(
        texts, st.dictionaries(st.sampled_from(["dp", "tp"]), texts, max_size=2), max_size=4
    ),
    params=st.dictionaries(
        texts, st.builds(Storage, shardings, st.booleans(), texts, sizes), max_size=4
    ),
    predicted=st.builds(Prediction, times, times, times, times, sizes, counts, counts),
    alternatives=st.lists(
        st.builds(Alternative, texts, texts, st.none() | times, st.none() | sizes, texts),
        max_size=3,
    ).map(tuple),
    notes=st.lists(texts, max_size=3).map(tuple),
    hints=counts,
    gap=times,
    recompute=st.lists(
        st.builds(
            lambda name, full, some: Recompute(name, full + some, full, some), texts, sizes, sizes
        ),
        max_size=2,
    ).map(tuple),
    activations=st.lists(
        st.builds(Activation, *[texts] * 3, sizes, *[texts] * 4, sizes), max_size=3
    ).map(tuple),
    hinted=st.lists(
        st.builds(HintPrice, st.dictionaries(texts, texts), st.none() | times, st.none() | sizes),
        max_size=2,
    ).map(tuple),
    model=st.lists(
        st.builds(ModelPart, texts, sizes, st.lists(texts, max_size=3).map(tuple)), max_size=2
    ).map(tuple),
    traffic=st.lists(st.builds(Traffic, texts, texts, texts, sizes, sizes), max_size=3).map(tuple),
)

PLAN = Plan(
    fingerprint="f" * 64,
    mesh=MESH,
    cluster="2x4xH100",
    strategy="auto",
    choices={"linear": {"dp": "b"}},
    params={"weight": Storage("[-, tp]", False, "f32[8, 8]", 64)},
    predicted=Prediction(0.1, 0.06, 0.03, 0.01, 1000),
)


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(PLAN.to_json()) | fields)


PIPED = replace(
    PLAN,
    mesh=Mesh((Axis("pp", 2, 1), Axis("tp", 4))),
    choices={"linear": {"tp": "b"}},
    params={"weight": replace(PLAN.params["weight"], stages=(1, 0))},
    pipeline=Pipeline("interleaved", ("a", "b", "c"), chunks=2),
    micro_batches=4,
)


def test_a_pipeline_is_read_back() -> None:
    assert plan_from_json(PIPED.to_json()) == PIPED
    assert PIPED.stages == 2 and PIPED.stage_mesh == Mesh((Axis("tp", 4),))
    assert PLAN.stages == 1 and PLAN.stage_mesh == PLAN.mesh


def piped(**fields: Any) -> str:
    return json.dumps(json.loads(PIPED.to_json()) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (piped(pipeline=None), "the mesh has the axis pp, and there is no pipeline"),
        (piped(pipeline={"schedule": "1f1b", "cuts": ["a", "b", "c"]}), "3 cuts make 4 pieces"),
        (piped(pipeline={"schedule": "dream", "cuts": ["a"]}), "unknown pipeline schedule 'dream'"),
        (piped(pipeline={"schedule": "1f1b"}), "cuts"),
        (
            piped(pipeline={"schedule": "gpipe", "cuts": ["a", "b", "c"], "chunks": 2}),
            "gpipe has one chunk per stage",
        ),
        (
            piped(pipeline={"schedule": "interleaved", "cuts": ["a", "b", "b"], "chunks": 2}),
            "two cuts are at the same node",
        ),
        (
            piped(mesh={"axes": [{"name": "tp", "size": 4, "level": 0}]}),
            "the first mesh axis of a pipeline is pp",
        ),
        (piped(choices={"linear": {"pp": "b"}}), "linear splits something on pp"),
        (piped(params={"w": {"sharding": "[-]"}}), "w is on no stage"),
        (piped(params={"w": {"sharding": "[-]", "stages": [2]}}), "stage 2 of 2 stages"),
        (piped(params={"w": {"sharding": "[-]", "stages": [0, 0]}}), "different stage numbers"),
        (piped(params={"w": {"sharding": "[pp]", "stages": [0]}}), "w is split on pp"),
        (changed(params={"w": {"sharding": "[-]", "stages": [0]}}), "there is no pipeline"),
        (
            changed(mesh={"axes": [{"name": "mb", "size": 2, "level": 0}]}, choices={}, params={}),
            "a mesh axis is called mb",
        ),
    ],
)
def test_a_pipeline_that_does_not_fit_the_plan(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_from_json(text)


@given(plans)
def test_json_round_trip(plan: Plan) -> None:
    assert plan_from_json(plan.to_json()) == plan


def test_a_saved_plan_is_loaded_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    PLAN.save(path)
    assert load_plan(path) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the plan"):
        PLAN.save(tmp_path / "none" / "plan.json")


def test_check_names_model_and_world() -> None:
    PLAN.check("f" * 64, 8)
    with pytest.raises(UserError, match="made for another model"):
        PLAN.check("e" * 64)
    with pytest.raises(UserError, match=r"for 8 devices .*, and 4 processes were started"):
        PLAN.check("f" * 64, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAN.to_json()[:200], "not complete JSON"),
        ("", "not complete JSON"),
        ("[]", "not an autopar plan"),
        ("{}", "not an autopar plan"),
        (changed(version=99), "has version 99, this autopar reads version 3"),
        (changed(colour="red"), "colour is not known"),
        (
            changed(recompute=[{"block": "b", "copies": 2, "full": 2, "selective": 1}]),
            "1 of 2 copies",
        ),
        (changed(gap="wide"), 'gap is "wide", not a number'),
        (
            changed(mesh={"axes": [{"name": "dp", "size": 0, "level": 0}]}),
            r"mesh.axes\[0\].size \(the mesh axis dp\) is 0, not a positive number",
        ),
        (changed(params={"w": {"sharding": "[x]"}}), r"params.w.sharding\[0\] names the axis 'x'"),
        (changed(params={"w": {"sharding": "dp"}}), "dp"),
        (changed(params={"w": {"sharding": 3}}), "params.w.sharding is 3, not a text"),
        (
            changed(choices={"n": {"pp": "b"}}),
            "choices.n.pp names the axis 'pp', which the mesh lacks",
        ),
        (changed(choices=None), "choices is null, not an object"),
        (changed(predicted={}), "predicted.time_s is missing"),
    ],
)
def test_a_file_that_is_not_a_plan(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_from_json(text, where="plan.json")
    assert caught.value.where == "plan.json"


def test_a_missing_field_is_named() -> None:
    raw = json.loads(PLAN.to_json())
    for name in raw:
        if name in ("version", "kernels"):  # older files of this version have no kernels
            continue
        kept = {key: value for key, value in raw.items() if key != name}
        with pytest.raises(UserError, match=name):
            plan_from_json(json.dumps(kept))


def test_an_edit_by_hand_is_read() -> None:
    edited = PLAN.to_json().replace('"[-, tp]"', '"[dp, tp]"')
    stored = replace(PLAN.params["weight"], sharding="[dp, tp]")
    assert plan_from_json(edited) == replace(PLAN, params={"weight": stored})
