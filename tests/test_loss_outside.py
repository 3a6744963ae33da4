"""Pipelines of a model whose loss is computed in the loop: the two lines to change are said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli_helpers import run_command, run_main

NET = """
import torch
from torch import nn

import autopar


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

    def forward(self, x):
        return self.net(x)


def make():
    return Net(), (torch.zeros(8, 16),), {}
"""
LOOP = """
import torch

import autopar
from net import Net

model = autopar.parallelize(Net(), strategy="pipeline", stages=2)
loss = torch.nn.functional.mse_loss(model(torch.zeros(8, 16)), torch.zeros(8, 16))
loss.backward()
"""
SAID = (
    "pipelines need the loss inside of the module",
    "def forward(self, x, y)",
    "return loss_fn(self.net(x), y)",
)


def says_the_change(text: str) -> bool:
    whole = " ".join(text.split())
    return all(part in whole for part in SAID)


@pytest.mark.parametrize("asked", [("--strategy", "pipeline"), ("--stages", "2")])
def test_a_plan_that_is_asked_for(
    asked: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NET)
    out = tmp_path / "plan.json"
    arguments = (f"{tmp_path}/net.py:make", "--cluster", "cpu:4", *asked, "--json", str(out))
    code, _, err = run_main(capsys, "plan", *arguments)
    assert code == 2 and says_the_change(err), err
    assert not out.exists()


def test_the_best_plan_says_why_it_has_no_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NET)
    out = tmp_path / "plan.json"
    arguments = (f"{tmp_path}/net.py:make", "--cluster", "cpu:4", "--json", str(out))
    code, _, err = run_main(capsys, "plan", *arguments)
    assert code == 0, err
    assert says_the_change(out.read_text())


@pytest.mark.multiprocess
def test_a_loop_that_asks_for_stages(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "loop.py").write_text(LOOP)
    done = run_command("run", tmp_path / "loop.py", "--nproc", "2")
    assert done.returncode != 0
    assert says_the_change(done.stderr), done.stderr[-2000:]
