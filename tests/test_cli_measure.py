"""`autopar measure-rank`, as a user types it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autopar.cli_measure import _prices, mismatch_of
from autopar.cli_plan import plan_target
from autopar.errors import UserError
from autopar.ir.mesh import Axis, Mesh
from autopar.plan import Pipeline, load_plan

from .cli_helpers import MODEL, run_main

FIGURES = ("step_s", "forward_s", "backward_s", "optimizer_s", "memory_bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans of `small_gpt.py`, which is beside them, for CPU ranks and for many GPUs."""
    folder = tmp_path_factory.mktemp("measure")
    (folder / "small_gpt.py").write_text(MODEL)
    (folder / "other_gpt.py").write_text(MODEL.replace("layers=3", "layers=2"))
    paths = [*sys.path]
    for name, cluster, batch, strategy in (
        ("cpu.json", "cpu:8", 64, "zero"),
        ("gpu.json", "128x8xH100", 2048, "data+tensor"),
    ):
        sys.modules.pop("small_gpt", None)
        target = f"{folder}/small_gpt.py:make"
        plan_target(target, cluster, batch, (), strategy, None, "adamw", folder / name)
    sys.path[:] = paths
    return folder


@pytest.fixture
def target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("small_gpt", "other_gpt"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return f"{folder}/small_gpt.py:make"


def test_tables_and_json(folder: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "rank.json"
    shared = ["measure-rank", str(folder / "cpu.json"), target, "--device", "cpu"]
    threads = torch.get_num_threads()
    code, text, _ = run_main(capsys, *shared, "--steps", "2", "--rank", "5", "--json", str(out))
    assert code == 0
    assert torch.get_num_threads() == threads
    for wanted in (
        "rank 5 of 8 (dp=8) alone on cpu, medians of 2 steps",
        "predicted",
        "peak memory",
        "memory-bound",
        "of stand-ins for collectives",
        "the prediction is for the busiest rank, 0",
    ):
        assert wanted in text
    assert "not meaningful" not in text
    found = json.loads(out.read_text())
    assert (found["rank"], found["world_size"], found["comparable"]) == (5, 8, True)
    for name in FIGURES:
        predicted, measured = found["predicted"][name], found["measured"][name]
        assert predicted > 0
        assert measured > 0
        assert found["ratio"][name] == pytest.approx(measured / predicted)
    families = found["predicted"]["families"]
    assert set(families) == set(found["measured"]["families"])
    assert sum(families.values()) == pytest.approx(found["predicted"]["step_s"])


def test_a_rank_of_1024_gpus_on_another_device(
    folder: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["measure-rank", str(folder / "gpu.json"), target, "--device", "cpu", "--steps", "1"]
    code, text, _ = run_main(capsys, *shared, "--json", "-")
    assert code == 0
    found = json.loads(text)
    assert (found["rank"], found["world_size"], found["comparable"]) == (0, 1024, False)
    assert found["mismatch"].startswith("the plan's cluster is H100 (128x8xH100); measuring on cpu")
    assert set(found["ratio"].values()) == {None}
    assert found["measured"]["step_s"] > 0


def test_a_profile_of_any_size_prices_a_rank(folder: Path) -> None:
    plan = load_plan(folder / "gpu.json")
    priced, name = _prices(plan, "cpu:4")
    assert (priced.device.name, name) == ("cpu", "cpu:4")
    assert priced.size == 1024
    own, name = _prices(plan, None)
    assert (own.device.name, name) == ("H100", plan.cluster)
    elsewhere = replace(plan, cluster="1024xcpu")  # as `calibrate` names what it measures
    assert _prices(elsewhere, "cpu:4")[0].size == 1024
    with pytest.raises(UserError, match="which is not a shipped one"):
        _prices(elsewhere, None)


def test_whose_device_is_priced(folder: Path) -> None:
    plan = load_plan(folder / "gpu.json")
    assert mismatch_of(plan, "H100", plan.cluster, "NVIDIA H100 80GB HBM3") == ""
    assert "not meaningful" in mismatch_of(plan, "H100", plan.cluster, "NVIDIA H200")
    assert mismatch_of(plan, "cpu, 4 threads", "cpu:4", "cpu") == ""
    said = mismatch_of(plan, "A100", "a100.json", "NVIDIA H100 80GB HBM3")
    assert said.startswith("the profile is A100 (a100.json)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "8"], "there is no rank 8: the plan has the ranks 0 to 7"),
        (["--rank", "-1"], "there is no rank -1"),
        (["--steps", "0"], "--steps 0 is too few"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--profile", "9xZ9"], "cannot read the cluster '9xZ9'"),
        (["--optimizer", "lion"], "unknown optimizer 'lion'"),
        (["--json", "/no/such/folder/a.json"], "its folder does not exist"),
    ],
)
def test_bad_input(
    folder: Path,
    target: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    code, out, error = run_main(
        capsys, "measure-rank", str(folder / "cpu.json"), target, *arguments
    )
    assert (code, out) == (2, "")
    assert message in error


def test_a_pipeline_is_refused(
    folder: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage has nothing to begin with, and the whole model is not what a rank runs."""
    plan = load_plan(folder / "cpu.json")
    mesh = Mesh((Axis("pp", 2), *Mesh.of(dp=4).axes))
    params = {name: replace(stored, stages=(0,)) for name, stored in plan.params.items()}
    staged = replace(plan, mesh=mesh, pipeline=Pipeline("1f1b", ("linear",)), params=params)
    file = folder / "staged.json"
    file.write_text(staged.to_json())
    code, out, error = run_main(capsys, "measure-rank", str(file), target, "--device", "cpu")
    assert (code, out) == (2, "")
    assert "the plan has a pipeline of 2 stages" in error and "--strategy data+tensor" in error


def test_another_model(folder: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = target.replace("small_gpt", "other_gpt")
    code, _, error = run_main(
        capsys, "measure-rank", str(folder / "cpu.json"), other, "--device", "cpu"
    )
    assert code == 2
    assert "the plan was made for another model" in error


def test_too_large(
    folder: Path,
    target: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autopar.runtime.measure_rank.free_bytes", lambda device: 100 * 1024.0)
    code, _, error = run_main(
        capsys, "measure-rank", str(folder / "cpu.json"), target, "--device", "cpu"
    )
    assert code == 2
    assert "rank 0 needs about" in error
    assert "cpu has 95 KiB free" in error
    assert "too little" in error
