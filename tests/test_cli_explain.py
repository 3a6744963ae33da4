"""`autopar explain`, as a user types it."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cli_helpers import run_main

MODEL = """
import torch
import torch.nn.functional as F
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x, y):
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(x, y)


def make():
    return Net(), (torch.zeros(64, 64), torch.zeros(64, 64))


def other():
    net = Net()
    net.layers.append(Layer())
    return net, (torch.zeros(64, 64), torch.zeros(64, 64))
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A plan file and its model."""
    from autopar.cli_plan import plan_target

    folder = tmp_path_factory.mktemp("explain")
    (folder / "net.py").write_text(MODEL)
    path = list(sys.path)
    target, plan = f"{folder / 'net.py'}:make", folder / "plan.json"
    plan_target(target, "cpu:4", None, [], "zero", None, "adamw", plan)
    yield str(plan), target
    sys.path[:] = path
    sys.modules.pop("net", None)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    code, out, err = run_main(capsys, *arguments, "--json", "-")
    assert code == 0, err
    found: dict[str, object] = json.loads(out)
    return found


def test_the_step_is_a_sum_of_terms(
    planned: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    step = answer(capsys, "explain", *planned)["step"]
    assert isinstance(step, dict)
    seconds = sum(t["value"] for t in step["terms"] if t["unit"] == "s")
    memory = sum(t["value"] for t in step["terms"] if t["unit"] == "B")
    assert seconds == pytest.approx(step["time_s"])
    assert memory == pytest.approx(step["memory_bytes"])
    assert step["sizes"]["b"] == 64
    assert any("rate_matmul_float32" in t["formula"] for t in step["terms"])


def test_the_step_in_words(planned: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_main(capsys, "explain", *planned)
    assert code == 0
    assert "one training step on one device, at b = 64" in out
    assert "op_overhead_s + " in out and "memory per device" in out


def test_an_op_with_its_alternatives(
    planned: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_main(capsys, "explain", *planned, "--op", "layers.1.up.linear", "--formula")
    assert code == 0
    assert "layers.{1,2}.up" in out and "net.py:13" in out and "rule" in out
    assert "alternatives, everything else as planned" in out
    assert "replicated" in out and "max(" in out
    # The first layer stands alone: no gradient flows to its input.
    found = answer(capsys, "explain", *planned, "--op", "layers.#.up")["ops"]
    assert isinstance(found, list)
    assert [(op["module"], op["copies"]) for op in found] == [
        ("layers.0.up", 1),
        ("layers.{1,2}.up", 2),
    ]
    (chosen,) = [c for c in found[0]["alternatives"] if c["chosen"]]
    assert chosen["delta_s"] == 0


def test_a_parameter_with_its_alternatives(
    planned: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_main(capsys, "explain", *planned, "--param", "layers.*.up.weight")
    assert code == 0
    assert "parameter layers.1.up.weight × 2" in out and "[-, -]" in out


def test_where_others_win(planned: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "explain", *planned, "--crossover", "batch")
    spans = found["spans"]
    assert isinstance(spans, list) and isinstance(found["plans"], dict)
    assert {s["winner"] for s in spans} <= {None, *found["plans"]}
    assert all(a["high"] < b["low"] for a, b in itertools.pairwise(spans))
    inside = [s for s in spans if s["low"] <= 64 <= s["high"]]
    times = {name: p["time_s"] for name, p in found["plans"].items()}
    if inside:
        assert times[inside[0]["winner"]] == pytest.approx(min(times.values()))
    assert len(found["sentences"]) == len(spans)


@pytest.mark.parametrize("variable", ["memory", "bandwidth"])
def test_crossovers_in_words(
    planned: tuple[str, str], capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    arguments = ("--crossover", variable, "--against", planned[0])
    code, _, err = run_main(capsys, "explain", *planned, *arguments)
    assert code == 2 and "no other plan" in err
    plan = json.loads(Path(planned[0]).read_text())
    plan["params"] = {n: {**p, "sharding": "[-, -]" if "weight" in n else "[-]", "regather": False}
                      for n, p in plan["params"].items()}  # fmt: skip
    other = Path(planned[0]).with_name("whole.json")
    other.write_text(json.dumps(plan))
    code, out, _ = run_main(
        capsys, "explain", *planned, "--crossover", variable, "--against", str(other)
    )
    assert code == 0
    assert " wins " in out and ("no plan fits up to memory" in out or variable == "bandwidth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "layers.0.upp"), "no op called 'layers.0.upp'"),
        (("--param", "layers.0.up.wieght"), "layers.0.up.weight"),
        (("--op", "linear", "--param", "x"), "both --op and --param"),
        (("--crossover", "colour"), "unknown variable 'colour'"),
        (("--crossover", "sequence"), "fixed sequence length"),
        (("--crossover", "batch", "--op", "linear"), "about whole plans"),
        (("--crossover", "bandwidth", "--level", "moon"), "no level 'moon'"),
        (("--against", "x.json"), "without --crossover"),
        (("--cluster", "cpu:2"), "the plan is for 4 devices"),
        (("--optimizer", "magic"), "unknown optimizer"),
        (("--memory", "0"), "not positive"),
        (("--json", "/nowhere/x.json"), "its folder does not exist"),
    ],
)
def test_bad_input(
    planned: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    code, out, err = run_main(capsys, "explain", *planned, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_the_answer_is_written_and_inputs_are_not_overwritten(
    planned: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answer.json"
    code, said, _ = run_main(capsys, "explain", *planned, "--json", str(out))
    assert code == 0 and "answer.json" in said
    assert json.loads(out.read_text())["step"]["terms"]
    code, _, err = run_main(capsys, "explain", *planned, "--json", planned[0])
    assert code == 2 and "would be overwritten" in err


def test_another_model_is_refused(
    planned: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan, target = planned
    code, _, err = run_main(capsys, "explain", plan, target.replace(":make", ":other"))
    assert code == 2 and "another model" in err
