"""`autopar timeline` and `autopar simulate`, as a user types them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autopar.cli_timeline import Changes, simulated
from autopar.cost.cluster import parse_cluster
from autopar.cost.schedules import Schedule
from autopar.cost.timeline import Timeline, TimelineSummary
from autopar.errors import UserError
from autopar.questions import Question, ask
from autopar.timeline_tables import memory_chart

from .cli_helpers import MODEL, run_main


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of a small GPT for sixteen devices; its model is `small_gpt.py` beside it."""
    from autopar.cli_plan import plan_target

    folder = tmp_path_factory.mktemp("timeline")
    (folder / "small_gpt.py").write_text(MODEL)
    saved, paths = folder / "plan.json", [*sys.path]
    sys.modules.pop("small_gpt", None)
    plan_target(f"{folder}/small_gpt.py:make", "2x8xH100", 64, (), "zero", None, "adamw", saved)
    sys.path[:] = paths
    return saved


@pytest.fixture
def target(plan: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "small_gpt", raising=False)
    return f"{plan.parent}/small_gpt.py:make"


@pytest.fixture(scope="module")
def question(plan: Path) -> Question:
    paths = [*sys.path]
    sys.modules.pop("small_gpt", None)
    asked = ask(plan, f"{plan.parent}/small_gpt.py:make")
    sys.path[:] = paths
    return asked


def made(question: Question, schedule: Schedule | None = None, **changes: Any) -> Timeline:
    return simulated(question, Changes(**changes), schedule)[2]


def test_timeline(plan: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    trace, saved = plan.with_name("trace.json"), plan.with_name("timeline.json")
    code, text, _ = run_main(
        capsys, "timeline", str(plan), target, "--trace", str(trace), "--json", str(saved)
    )
    assert code == 0
    for wanted in (
        "simulated step of dp=16 on 2x8xH100",
        "waiting for collectives",
        "reduce_scatter",
        "longest ops and collectives",
        "memory over time: peak",
    ):
        assert wanted in text
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads(trace.read_text())["traceEvents"]
    found = json.loads(saved.read_text())
    parts = (found["compute_s"], sum(found["exposed_s"].values()), found["optimizer_s"])
    assert found["step_s"] == pytest.approx(sum(parts))
    short = TimelineSummary.from_json(found)
    assert short.spans and short.memory
    names = {span[0] for span in short.spans}
    assert "linear" in names and len(short.spans) < 200


def test_changes(question: Question) -> None:
    here = made(question)
    serial = made(question, overlap=False)
    assert serial.step_s > here.step_s
    assert serial.compute_s == pytest.approx(here.compute_s - here.slowdown_s)
    assert serial.exposed_s == pytest.approx(serial.busy_s)
    assert made(question, slowdown=0.5).slowdown_s > 0
    twice = made(question, batch=128)
    assert twice.compute_s > here.compute_s and twice.peak_bytes > here.peak_bytes
    elsewhere = made(replace(question, cluster=parse_cluster("2x8xA100")))
    assert elsewhere.compute_s > here.compute_s


def test_micro_batches(question: Question) -> None:
    four = made(question, micro_batches=4)
    assert four.micro_batches == 4 and four.peak_bytes < made(question).peak_bytes
    piped = made(question, Schedule(3, 1, "gpipe"), micro_batches=4)
    assert len(piped.stages) == 3 and piped.bubble_s > 0
    with pytest.raises(UserError, match="does not divide into"):
        made(question, micro_batches=5)
    with pytest.raises(UserError, match="need 99 layers, the model has 3"):
        made(question, Schedule(99))


def test_simulate(plan: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("simulate", str(plan), target, "--micro-batches", "4", "--stages", "3")
    code, text, _ = run_main(capsys, *arguments)
    assert code == 0
    assert "pipeline stages" in text and "(1f1b, 3 stages, 4 micro-batches)" in text
    code, text, _ = run_main(capsys, *arguments, "--schedule", "gpipe", "--json", "-")
    found = json.loads(text)
    assert found["schedule"] == "gpipe, 3 stages" and len(found["stages"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--micro-batches", "0"), "--micro-batches 0 is not positive"),
        (("--schedule", "1f1b"), "a pipeline schedule needs stages"),
        (("--stages", "2", "--schedule", "fast"), "unknown pipeline schedule 'fast'"),
        (("--slowdown", "-1"), "is not a share of compute time"),
        (("--prefetch", "-1"), "--prefetch -1 is negative"),
        (("--cluster", "cpu:4"), "16 devices"),
        (("--trace", "/nowhere/trace.json"), "its folder does not exist"),
        (("--json", "/nowhere/figures.json"), "its folder does not exist"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...],
    message: str,
    plan: Path,
    target: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = set(plan.parent.iterdir())
    code, out, err = run_main(capsys, "simulate", str(plan), target, *arguments)
    assert code == 2 and message in err and not out
    assert {p for p in plan.parent.iterdir() if p.name != "__pycache__"} <= before


def test_the_memory_chart_as_text() -> None:
    points = np.array([[0.0, 1024.0], [2.0, 3072.0], [5.0, 2048.0], [8.0, 1024.0], [10.0, 1024.0]])
    assert memory_chart(points, width=20, height=4) == [
        "     3 KiB    ███████",
        "              ███████",
        "              █████████████",
        "     1 KiB    █████████████",
        "           0               10 s",
    ]
