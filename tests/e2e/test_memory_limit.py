"""A limit on memory: what is measured keeps to it, and the run says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli_helpers import run_command

SCRIPT = """
import os
import torch
from torch import nn

import autopar


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(512, 2048), nn.Linear(2048, 512)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x))).square().mean()


torch.manual_seed(0)
model = autopar.parallelize(Net())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
x = torch.randn(256, 512)
for step in range(4):
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
model(x[:16])
if os.environ["RANK"] == "0":
    print("limit", model.autopar.plan.memory_limit)
"""


@pytest.mark.multiprocess
def test_a_run_keeps_to_its_limit_and_shows_the_peak(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run_command("run", script, "--nproc", "2", "--memory", "30MiB")
    assert done.returncode == 0, done.stderr
    assert f"limit {30 * 2.0**20}" in done.stdout
    found = re.findall(r"([\d.]+) MiB predicted, ([\d.]+) MiB measured", done.stderr)
    assert len(found) == 1, done.stderr  # rank 0's
    predicted, measured = map(float, found[0])
    assert measured <= 30
    assert predicted == pytest.approx(measured, rel=0.1)
