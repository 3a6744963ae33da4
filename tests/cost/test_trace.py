"""Traces have the fields that viewers need, with times in microseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autopar.cost.schedules import Schedule
from autopar.cost.simulate import simulate
from autopar.cost.step import COMPUTE, Part, Segment, Step
from autopar.cost.trace import write_trace
from autopar.errors import UserError

GRADIENT = Part(
    "w:dp", "", "", 0.0, 0.5, "all_reduce", "dp", 1, backward_sent_bytes=64.0,
    output_bytes=2.0**25, param="w", once=True,
)  # fmt: skip
LAYER = Segment(
    "layer",
    (GRADIENT, Part("mlp", "layers.0", COMPUTE, 1.0, 2.0, saved_bytes=8.0, deps=(0,))),
    copies=4,
    block="layer",
)
STEP = Step((LAYER,), 0.25, {"parameters": 10.0}, 2)


def events_of(path: Path) -> list[dict[str, Any]]:
    made = json.loads(path.read_text())
    assert set(made) == {"traceEvents", "displayTimeUnit"}
    events: list[dict[str, Any]] = made["traceEvents"]
    return events


def check(events: list[dict[str, Any]]) -> None:
    known = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    for event in events:
        assert event["ph"] in "MXC" and isinstance(event["name"], str)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0 and (event["pid"], event["tid"]) in known
    assert [e["ph"] for e in events] == sorted((e["ph"] for e in events), key="MXC".index)


def test_a_device(tmp_path: Path) -> None:
    made = simulate(STEP)
    write_trace(made, tmp_path / "trace.json", "rank 0")
    events = events_of(tmp_path / "trace.json")
    check(events)
    names = [(e["name"], e["tid"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names == [
        ("process_name", 0, "rank 0"),
        ("thread_name", 0, "compute"),
        ("thread_name", 1, "level 1 dp"),
    ]
    spans = [e for e in events if e["ph"] == "X"]
    assert spans[0] == {
        "ph": "X", "name": "mlp", "cat": "forward", "ts": 0.0, "dur": 1e6, "pid": 0, "tid": 0,
        "args": {"phase": "forward", "segment": "layer", "copy": 0},
    }  # fmt: skip
    assert {e["args"]["bytes"] for e in spans if e["tid"] == 1} == {64.0}
    assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(made.step_s * 1e6)
    counters = [e for e in events if e["ph"] == "C"]
    assert max(e["args"]["bytes"] for e in counters) == made.peak_bytes
    assert [e["ts"] for e in counters] == sorted(e["ts"] for e in counters)


def test_a_pipeline_has_a_process_per_stage(tmp_path: Path) -> None:
    write_trace(simulate(STEP, schedule=Schedule(2)), tmp_path / "trace.json")
    events = events_of(tmp_path / "trace.json")
    check(events)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "device stage 0", 1: "device stage 1"}
    assert len([e for e in events if e["ph"] == "X"]) == 2 * 2 * 2


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the trace"):
        write_trace(simulate(STEP), tmp_path / "missing" / "trace.json")
    assert not list(tmp_path.iterdir())
