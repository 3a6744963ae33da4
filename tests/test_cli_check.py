"""`autopar plan` with hints and limits, `autopar check`, and what both say of bad input."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar.plan import load_plan

from .cli_helpers import MODEL, run_main

ODD = """

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 7)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).square().mean()


def odd():
    return Odd(), (torch.zeros(1, 7),)


def empty():
    return Odd(), (torch.zeros(0, 7),)
"""

CPU = json.loads((Path(autopar.__file__).parent / "profiles" / "cpu-gloo.json").read_text())
Capsys = pytest.CaptureFixture[str]
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "small", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(MODEL + ODD)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plan file's text."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.delitem(sys.modules, "small", raising=False)
        with pytest.raises(SystemExit) as stop:
            autopar_main(
                "plan", f"{folder / 'small.py'}:make", "--cluster", "cpu:2",
                "--strategy", "tensor", "--json", str(folder / "plan.json"),
            )  # fmt: skip
    assert not stop.value.code
    return (folder / "plan.json").read_text()


def autopar_main(*arguments: str) -> None:
    from autopar.cli import main

    main(list(arguments))


def refused(capsys: Capsys, *arguments: str) -> str:
    """What a command that must fail says; nothing is written."""
    before = {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()}
    code, out, err = run_main(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("autopar: ") and "Traceback" not in err
    assert {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()} == before
    return err


# -- plan ------------------------------------------------------------------------------------------


def test_hints_of_a_file_are_kept_and_their_price_is_shown(folder: Path, capsys: Capsys) -> None:
    hints = [{"param": "blocks.*.up.weight", "split": {"0": "tp"}, "gather": False}]
    (folder / "hints.json").write_text(json.dumps(hints))
    code, text, err = run_main(
        capsys, "plan", "small.py:make", "--cluster", "cpu:2", "--hints", "hints.json",
        "--json", "plan.json", "--recompute", "none", "--micro-batches", "1",
    )  # fmt: skip
    assert code == 0, err
    assert 'hint blocks.*.up.weight split={"0": "tp"} gather=false costs' in " ".join(text.split())
    plan = load_plan("plan.json")
    assert plan.params["blocks.1.up.weight"].sharding == "[tp, -]"
    assert plan.hinted[0].hint == hints[0] and plan.hinted[0].time_s


def test_a_plan_can_be_printed_as_json(folder: Path, capsys: Capsys) -> None:
    code, text, _ = run_main(
        capsys, "plan", "small.py:make", "--cluster", "cpu:2", "--strategy", "data", "--json", "-"
    )
    assert code == 0 and json.loads(text)["strategy"] == "data"
    assert [p.name for p in folder.iterdir() if p.is_file()] == ["small.py"]


def test_recomputation_and_micro_batches_are_what_was_asked_for(
    folder: Path, capsys: Capsys
) -> None:
    code, text, err = run_main(
        capsys, "plan", "small.py:make", "--cluster", "cpu:2", "--micro-batches", "4",
        "--recompute", "full", "--json", "-",
    )  # fmt: skip
    assert code == 0, err
    plan = json.loads(text)
    assert plan["micro_batches"] == 4


def test_a_model_in_which_nothing_can_be_split_has_a_plan_that_says_so(
    folder: Path, capsys: Capsys
) -> None:
    code, text, _ = run_main(capsys, "plan", "small.py:odd", "--cluster", "8xH100")
    assert code == 0
    assert "nothing is split: each of the 8 devices does the whole step" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["small.py:empty"], ["an input of forward is empty: its shape is [0, 7]"]),
        (["small.py:odd", "--micro-batches", "2"], ["2 micro-batches need a batch that can be"]),
        (
            ["small.py:make", "--micro-batches", "3"],
            ["3 micro-batches do not divide the batch of 8"],
        ),
        (
            ["small.py:make", "--micro-batches", "0,1"],
            ["numbers of micro-batches '0,1'", "positive"],
        ),
        (["small.py:make", "--micro-batches", "-2"], ["numbers of micro-batches '-2'"]),
        (
            ["small.py:make", "--recompute", "some"],
            ["unknown recomputation 'some'", "none,selective"],
        ),
        (
            ["small.py:make", "--strategy", "data", "--recompute", "full"],
            ["are for 'auto' and pipelines, not 'data'"],
        ),
        (["small.py:make", "--memory", "0"], ["the memory limit '0' is not positive"]),
        (["small.py:make", "--memory", "-1GiB"], ["the memory limit '-1GiB' is not positive"]),
        (["small.py:make", "--memory", "30KiB"], ["fits on no plan", "KiB short"]),
        (["small.py:make", "--cluster", "cpu:0"], ["the cluster 'cpu:0' has no devices"]),
        (["small.py:make", "--cluster", "2x0xH100"], ["has no devices"]),
        (["small.py:make", "--cluster", "16xH100"], ["16 devices in one host", "2x8xH100"]),
        (["small.py:make", "--hints", "none.json"], ["cannot read the hints none.json"]),
        (["small.py:make", "--hints", "small.py"], ["the hints small.py are not JSON"]),
        (["small.py:make", "--json", "small.py/plan.json"], ["folder does not exist"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("small") else "",
)
def test_bad_limits_are_refused(
    folder: Path, capsys: Capsys, arguments: list[str], messages: list[str]
) -> None:
    saves = [] if "--json" in arguments else ["--json", "plan.json"]
    err = refused(capsys, "plan", *arguments, *saves)
    for message in messages:
        assert message in err


@pytest.mark.parametrize(
    ("hints", "messages"),
    [
        ({}, ["are not a list"]),
        ([{"split": 0}], ["hint 0 of hints.json must name either a param or an op"]),
        ([{"param": "head.weight", "split": 0, "whole": 0}], ["dim 0 is both split and whole"]),
        ([{"param": "haed.weight", "split": 0}], ["nearest: head.weight"]),
        ([{"param": "head.weight", "split": 2}], ["names dim 2, and head.weight is f32[64, 32]"]),
        ([{"param": "head.weight", "split": {"0": "x"}}], ["names the mesh axis 'x'"]),
        (
            [{"param": "*.weight", "replicated": True}, {"param": "head.*", "sharded": True}],
            ["contradict each other: both are for head.weight"],
        ),
        ([{"op": "*.layer_norm", "split": 2}], ["cannot be kept: of layer_norm", "dims 0, 1 can be"]),
        (
            [{"param": "head.weight", "split": {"0": "cp"}, "gather": False},
             {"op": "gelu", "split": {"2": "ep"}}],
            ["no plan for 2 devices keeps the hints together"],
        ),
    ],
)  # fmt: skip
def test_bad_hints_are_refused(
    folder: Path, capsys: Capsys, hints: object, messages: list[str]
) -> None:
    (folder / "hints.json").write_text(json.dumps(hints))
    arguments = ["small.py:make", "--cluster", "cpu:2", "--hints", "hints.json"]
    err = refused(capsys, "plan", *arguments, "--json", "plan.json")
    for message in messages:
        assert message in err


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["device"].pop("memory_bytes"), "device has no 'memory_bytes'"),
        (
            lambda d: d["device"]["memory_bytes"].update(value=0),
            "device.memory_bytes.value is 0, not",
        ),
        (
            lambda d: d["device"]["op_overhead_s"].update(value="x"),
            "device.op_overhead_s.value is 'x'",
        ),
        (lambda d: d["device"]["rates"].pop("matmul"), "device.rates has no 'matmul'"),
        (lambda d: d["device"]["bandwidth"].pop("default"), "device.bandwidth has no 'default'"),
        (
            lambda d: d["levels"][0].update(size=-4),
            "levels[0].size is -4, not a positive whole number",
        ),
        (
            lambda d: d["levels"][0]["collectives"].pop("all_gather"),
            "collectives has no 'all_gather'",
        ),
        (
            lambda d: d["levels"][0]["collectives"]["all_reduce"][0]["alpha_s"].update(value=-1),
            "levels[0].collectives.all_reduce[0].alpha_s.value is -1, not a positive number",
        ),
        (
            lambda d: d["levels"][0]["collectives"]["all_reduce"][0]["bandwidth"].update(points=[]),
            "all_reduce[0].bandwidth.points is not a list",
        ),
        (lambda d: d.update(levels=[]), "levels is not a list of levels"),
    ],
)
def test_a_cluster_with_missing_figures_is_refused(
    folder: Path, capsys: Capsys, edit: Edit, message: str
) -> None:
    document = copy.deepcopy(CPU)
    edit(document)
    (folder / "mine.json").write_text(json.dumps(document))
    err = refused(capsys, "plan", "small.py:make", "--cluster", "mine.json", "--json", "plan.json")
    assert message in err and "mine.json" in err


# -- check -----------------------------------------------------------------------------------------


def test_an_edit_is_checked_and_priced(made: str, folder: Path, capsys: Capsys) -> None:
    raw = json.loads(made)
    raw["params"]["head.weight"]["sharding"] = "[-, -]"
    (folder / "edited.json").write_text(json.dumps(raw))
    command = ["check", "edited.json", "small.py:make", "--batch", "16"]
    code, text, err = run_main(capsys, *command, "--out", "new.json", "--json", "answer.json")
    assert code == 0, err
    assert "everything in the plan can be run (on cpu:2, for b=16)" in text
    answer, new = json.loads(Path("answer.json").read_text()), load_plan("new.json")
    assert answer["stored"]["time_s"] == raw["predicted"]["time_s"]
    assert answer["predicted"]["time_s"] == new.predicted.time_s
    assert new.hints == {"b": 16} and new.params["head.weight"].sharding == "[-, -]"
    code, text, _ = run_main(capsys, "check", "new.json", "small.py:make", "--json", "-")
    again = json.loads(text)
    assert code == 0 and again["stored"] == again["predicted"]


@pytest.mark.parametrize(
    ("edit", "messages"),
    [
        (
            lambda d: (d["choices"].update(gelu={"tp": "z"}), d["choices"].update(nothing={"tp": "a"})),
            ["the model has no op 'nothing'", "choices: gelu (small.py:", "tp is 'z'; allowed by"],
        ),
        (lambda d: d["choices"].update(gelu={"pp": "a"}), ["choices.gelu.pp names the axis", "it has tp"]),
        (lambda d: d["params"].pop("head.weight"), ["params: head.weight is missing"]),
        (
            lambda d: d["params"]["head.weight"].update(sharding="[tp, x"),
            ['params.head.weight.sharding is "[tp, x"'],
        ),
        (
            lambda d: d["mesh"]["axes"][0].update(size=4),
            ["the plan is for 4 devices, and cpu:2 has 2"],
        ),
        (lambda d: d["mesh"]["axes"][0].update(size=0), ["mesh.axes[0].size (the mesh axis tp) is 0, not a"]),
        (lambda d: d.update(micro_batches=5), ["micro_batches is 5, which does not divide"]),
        (lambda d: d.update(micro_batches=-1), ["micro_batches is -1, not a positive number"]),
        (lambda d: d.update(fingerprint="0" * 64, params={
            n: s for n, s in d["params"].items() if "blocks.2" not in n
        }), ["made for another model", "the model has 3 blocks.* blocks, the plan 2"]),
    ],
)  # fmt: skip
def test_illegal_edits_are_named(
    made: str, folder: Path, capsys: Capsys, edit: Edit, messages: list[str]
) -> None:
    raw = json.loads(made)
    edit(raw)
    (folder / "edited.json").write_text(json.dumps(raw))
    err = refused(capsys, "check", "edited.json", "small.py:make", "--out", "new.json")
    for message in messages:
        assert message in err


def test_bad_settings_of_check_are_refused(made: str, folder: Path, capsys: Capsys) -> None:
    (folder / "plan.json").write_text(made)
    for arguments, message in (
        (["--batch", "0"], "the batch size 0 is not positive"),
        (["--cluster", "cpu:1"], "the plan is for 2 devices, and cpu:1 has 1"),
        (["--cluster", "cpu:4"], "is of 2 devices, and cpu:4 has 4"),
        (["--json", "plan.json"], "plan.json is read, and would be overwritten"),
    ):
        assert message in refused(capsys, "check", "plan.json", "small.py:make", *arguments)
