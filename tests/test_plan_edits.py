"""Plan files that were edited by hand: each is read, or said to be wrong where it is."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cli import main
from autopar.cost.timeline import StageUse, TimelineSummary
from autopar.errors import UserError
from autopar.ir.mesh import Axis, Mesh
from autopar.kernel_use import KernelUse
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
    plan_from_json,
)

FULL = Plan(
    fingerprint="f" * 64,
    mesh=Mesh((Axis("pp", 2, 1), Axis("tp", 4))),
    cluster="2x4xH100",
    strategy="auto",
    choices={"linear": {"tp": "b"}},
    params={
        "layers.0.weight": Storage("[-, tp]", False, "f32[8, 8]", 64, (1, 0)),
        "layers.0.bias": Storage("[-] ~tp", True, "f32[8]", 32, (0,)),
    },
    predicted=Prediction(0.1, 0.06, 0.03, 0.01, 1000, {"parameters": 1000}, {"send": 3}),
    alternatives=(Alternative("data", "dp=8", 0.2, None, "slower"),),
    notes=("a note",),
    hints={"b": 8},
    gap=0.01,
    recompute=(Recompute("linear", 4, 1, 2),),
    activations=(Activation("linear", "layers.{0..3}", "m.py:3", 4, "ik,kj", "", "f32", "[-]", 8),),
    traffic=(Traffic("all_reduce", "tp", "gradients", 2, 64),),
    micro_batches=4,
    memory_limit=2.0**30,
    timeline=TimelineSummary(
        0.1,
        0.06,
        {"tp": 0.03},
        0.0,
        0.01,
        1000,
        (("linear", "compute", 0.0, 0.1, "forward"),),
        ((0.0, 10.0), (0.1, 10.0)),
        (StageUse(0.05, 0.0, 0.0, 1000.0, 2.0, "layers.0"),) * 2,
    ),
    hinted=(HintPrice({"param": "*.weight"}, 0.1, 10),),
    model=(ModelPart("layers.{0..3}", 4, ("linear(%)  m.py:3",)),),
    pipeline=Pipeline("interleaved", ("a", "b", "c"), 2),
    kernels=(KernelUse("pack", ("tp",), "", 2, 0.001, 0.002, 8, ""),),
)
RAW = json.loads(FULL.to_json())
SHOWN = re.compile(r"\b\w+(Error|Exception)\b|NoneType|Traceback|object has no|unhashable")
TOO_LONG = "a number of 5000 digits"  # which Python's own JSON does not write

odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3.0, 2**63, -(2**70), 10**400, TOO_LONG]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, -0.5]),
    st.text(max_size=6),
    st.sampled_from(["[dp]", "[tp, tp]", "[-", "tp", "pp", "1f1b", "[-, 0:tp*0]", "\ud800"]),
    st.lists(st.none() | st.integers(-2, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none() | st.integers(0, 3), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside."""
    yield path
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*path, key))


PLACES = [path for path in places(RAW) if path]


@st.composite
def edited(draw: st.DrawFn) -> str:
    """The text of a valid plan after one to three changes to its structure."""
    raw = json.loads(json.dumps(RAW))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(PLACES))
        inside, key = raw, path[-1]
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took it
            for step in path[:-1]:
                inside = inside[step]
            change = draw(st.sampled_from(["drop", "replace", "add", "rename", "repeat"]))
            if change == "drop":
                del inside[key]
            elif change == "replace":
                inside[key] = draw(odd_values)
            elif change == "rename" and isinstance(inside, dict):
                inside[draw(st.sampled_from([key + "s", key[1:], ""]))] = inside.pop(key)
            elif isinstance(inside, list):
                inside.append(inside[key] if change == "repeat" else draw(odd_values))
            elif isinstance(inside, dict):
                inside[draw(st.text(max_size=4))] = draw(odd_values)
    text = json.dumps(raw)
    return text.replace(f'"{TOO_LONG}"', "9" * 5000)


def test_the_plan_that_is_edited_is_valid() -> None:
    assert plan_from_json(FULL.to_json()) == FULL


@settings(max_examples=400, deadline=None)
@given(edited())
def test_every_edit_is_read_or_said_to_be_wrong(text: str) -> None:
    plan, said = None, None
    try:
        plan = plan_from_json(text, "plan.json")
    except UserError as error:
        said = error
    if plan is not None:
        assert plan_from_json(plan.to_json()) == plan
    else:
        assert said is not None and said.where == "plan.json" and said.fix
        assert "plan" in said.what and not SHOWN.search(str(said)), str(said)


@settings(max_examples=25, deadline=None)
@given(edited())
def test_a_command_ends_with_2_and_one_message(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder) / "plan.json", Path(folder) / "other.json"
        path.write_text(text)
        FULL.save(other)
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stop,
        ):
            main(["compare", str(path), str(other)])
        code = stop.value.code or 0
        assert code in (0, 2), err.getvalue()
        if code == 2:
            assert not out.getvalue() and not SHOWN.search(err.getvalue()), err.getvalue()


def changed(*path: Any, to: Any) -> str:
    raw = json.loads(json.dumps(RAW))
    inside = raw
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = to
    return json.dumps(raw)


WEIGHT = ("params", "layers.0.weight")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(*WEIGHT, "sharding", to="[-, dp]"), "params.layers.0.weight.sharding[1] names"),
        (changed(*WEIGHT, "sharding", to=None), "params.layers.0.weight.sharding is null, not a t"),
        (changed(*WEIGHT, "sharding", to="[-, 3"), 'params.layers.0.weight.sharding is "[-, 3"'),
        (changed(*WEIGHT, "stages", to=[0, "1"]), 'stages[1] is "1", not a whole number'),
        (changed(*WEIGHT, "shardng", to=""), "params.layers.0.weight.shardng is not known"),
        (changed("params", "odd name", to={}), 'params["odd name"].sharding is missing'),
        (changed("predicted", "time_s", to=float("nan")), "predicted.time_s is nan, not a finite"),
        (changed("predicted", "comm_bytes", "send", to=10**400), "send is a number of about 400"),
        (changed("mesh", "axes", 1, "size", to=True), "mesh.axes[1].size is true, not a whole"),
        (changed("mesh", "axes", to={}), "mesh.axes is {}, not a list"),
        (changed("timeline", "memory", 1, to=[0.0]), "timeline.memory[1] has 1 entries, not 2"),
        (changed("timeline", "spans", 0, 2, to="x"), 'timeline.spans[0][2] is "x", not a number'),
        (changed("hinted", 0, "hint", to={"a": [float("inf")]}), "hinted[0].hint.a[0] is inf"),
        (changed("kernels", 0, "where", to=["dp"]), "kernels[0].where[0] names the axis 'dp'"),
        (changed("version", to="3"), 'has version "3", this autopar reads version 3'),
        (changed("pipeline", "chunks", to=-1), "pipeline.schedule: a pipeline of 2 stages with -1"),
        (changed("memory_limit", to="6GiB"), 'memory_limit is "6GiB", not a number'),
        (FULL.to_json().replace('"gap"', '"notes": [], "gap"'), 'the key "notes" is twice'),
        ("[" * 100_000, "nested too deeply"),
        ('{"version": ' + "9" * 5000 + "}", "a number that is too long"),
    ],
)
def test_the_place_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_from_json(text, "plan.json")
    assert message in caught.value.what
    assert caught.value.fix is not None


def test_fields_that_may_be_left_out_have_their_defaults() -> None:
    raw = json.loads(json.dumps(RAW))
    del raw["kernels"], raw["params"]["layers.0.bias"]["regather"], raw["pipeline"]["chunks"]
    raw["pipeline"] |= {"schedule": "1f1b", "cuts": ["a"]}
    made = plan_from_json(json.dumps(raw))
    assert made.kernels == () and not made.params["layers.0.bias"].regather
    assert made.pipeline == Pipeline("1f1b", ("a",))
    assert made == replace(
        FULL,
        kernels=(),
        pipeline=made.pipeline,
        params={
            **FULL.params,
            "layers.0.bias": replace(FULL.params["layers.0.bias"], regather=False),
        },
    )
