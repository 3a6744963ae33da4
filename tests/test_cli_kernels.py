"""`autopar kernels`, as commands of their own: compiling wants a process without the interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autopar.cli import main

from .cli_helpers import run_command, run_main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

MODEL = """
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)
        self.norm, self.head = nn.LayerNorm(256), nn.Linear(256, 512)

    def forward(self, x, targets):
        y = x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, True)
        return F.cross_entropy(self.head(y), targets)


def make():
    return Net(), (torch.zeros(4096, 256), torch.zeros(4096, dtype=torch.long))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for two GPUs, one for two CPU ranks, and the model of both."""
    found = tmp_path_factory.mktemp("kernels")
    (found / "net.py").write_text(MODEL)
    for cluster, strategy in (("2xH100", "zero"), ("cpu:2", "zero")):
        out = found / f"{cluster.replace(':', '')}.json"
        saved = [*sys.path]
        sys.modules.pop("net", None)
        arguments = ["--cluster", cluster, "--strategy", strategy, "--json", str(out)]
        with pytest.raises(SystemExit):
            main(["plan", f"{found}/net.py:make", *arguments])
        sys.path[:] = saved
    return found


def run(folder: Path, *arguments: str, plan: str = "2xH100.json", **environment: str) -> Any:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "autopar.cli", "kernels", str(folder / plan)]
    return subprocess.run(
        [*command, f"{folder}/net.py:make", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**inherited, "TRITON_CACHE_DIR": str(folder / "cache"), **environment},
        check=False,
    )


@pytest.mark.slow
def test_the_plan_s_triton(folder: Path) -> None:
    sources = folder / "sources"
    made = run(folder, "--json", str(folder / "found.json"), "--out", str(sources))
    assert made.returncode == 0, made.stderr
    assert "kernels for sm_90 of dp=2 on 2xH100, rank 0" in made.stdout
    assert max(map(len, made.stdout.splitlines())) <= 100
    found = json.loads((folder / "found.json").read_text())
    own = [row for row in found["kernels"] if row["by"] == "autopar"]
    inductor = [row for row in found["kernels"] if row["by"] == "inductor"]
    planned = {use["kernel"] for use in json.loads((folder / "2xH100.json").read_text())["kernels"]}
    assert {row["use"] for row in own} == planned >= {"dropout", "cross_entropy"}
    assert {row["use"] for row in inductor} == {"forward", "backward"}
    assert any("gelu" in row["name"] for row in inductor)
    assert any(re.search("(mm|addmm)", name) for name in found["library_calls"])
    for row in found["kernels"]:
        assert row["registers"] > 0 and row["spilled_bytes"] == 0
        assert f"def {row['name']}(" in row["source"] and "@triton.jit" in row["source"]
    residual = next(row for row in own if row["name"] == "dropout")
    # What is folded into the kernel is in its source, and in nothing of Inductor's.
    assert "a0 = tl.load(a0_ptr + i)" in residual["source"]
    assert residual["wide_loads"] > 0 and residual["wide_stores"] > 0
    files = sorted(p.name for p in sources.iterdir())
    assert len(files) == len(found["kernels"])
    assert (sources / files[0]).read_text() == found["kernels"][0]["source"]


def test_sources_are_printed_and_amd_has_no_inductor(folder: Path) -> None:
    made = run(folder, "--arch", "gfx942")
    assert made.returncode == 0, made.stderr
    assert "Inductor's: none" in made.stdout
    assert "shown for NVIDIA's architectures alone" in made.stdout
    assert "def cross_entropy(" in made.stdout and "@triton.jit" in made.stdout


@pytest.mark.parametrize(
    ("arguments", "plan", "environment", "message"),
    [
        (("--arch", "sm_70"), "2xH100.json", {}, "unknown architecture 'sm_70'"),
        ((), "cpu2.json", {}, "the plan is for cpu:2, which is no GPU"),
        ((), "2xH100.json", {"TRITON_INTERPRET": "1"}, "cannot be compiled under Triton's inter"),
        (("--json", "/nowhere/x.json"), "2xH100.json", {}, "its folder does not exist"),
    ],
)
def test_bad_input(
    folder: Path,
    arguments: tuple[str, ...],
    plan: str,
    environment: dict[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = set(folder.iterdir())
    target = f"{folder}/net.py:make"
    code, out, err = run_main(capsys, "kernels", str(folder / plan), target, *arguments)
    assert code == 2 and message in err and not out
    assert set(folder.iterdir()) == before


def test_without_triton(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name)
    )
    arguments = (str(folder / "2xH100.json"), f"{folder}/net.py:make")
    code, out, err = run_main(capsys, "kernels", *arguments)
    assert code == 2 and not out
    assert "Triton is not installed" in err and "autopar[kernels]" in err


def test_help() -> None:
    assert "without a GPU" in run_command("kernels", "--help").stdout
