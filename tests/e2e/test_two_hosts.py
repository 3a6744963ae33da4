"""One script on two "hosts": ranks of this machine that AUTOPAR_HOST keeps apart."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from autopar.errors import UserError
from autopar.nodes import check_nodes, meet
from autopar.runtime.shared_memory import make_group
from tests.cli_helpers import run_main
from tests.e2e.pool import RankPool
from tests.e2e.test_equivalence import compare
from tests.e2e.verify import LIMIT_FLOAT64

SCRIPT = """
import warnings
warnings.simplefilter("ignore")
import os, torch, autopar

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)

    def forward(self, x, y):
        return torch.nn.functional.mse_loss(self.down(torch.relu(self.up(x))), y)

torch.manual_seed(0)
net = autopar.parallelize(Net(), strategy=os.environ.get("STRATEGY", "auto"))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
losses = []
for step in range(3):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
    loss = net(x, x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(round(loss.item(), 5))
if os.environ.get("RANK", "0") == "0":
    plan = net.autopar.plan
    print(losses, plan.cluster if plan else "one process", flush=True)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def on_two_hosts(
    *commands: list[str], timeout_s: float = 120, **environment: str
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of a command on each host, started at once."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    started = [
        subprocess.Popen(
            command,
            env={**clean, "OMP_NUM_THREADS": "1", "AUTOPAR_HOST": f"host{i}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, command in enumerate(commands)
    ]
    try:
        told = [process.communicate(timeout=timeout_s) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, told, strict=True)]


def take_host(first: str, second: str) -> str:
    """Move this rank of a pool of four to one of two hosts."""
    os.environ["AUTOPAR_HOST"] = first if dist.get_rank() < 2 else second
    return type(make_group()).__name__


@pytest.fixture(scope="module")
def two_by_two() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        assert pool.run(take_host, "left", "right") == ["TwoLevelGroup"] * 4
        yield pool


CASES = (("rec", "tensor"), ("moe", "zero"))
SLOW = (
    ("gpt_attention_dropout", "data+tensor"),
    ("mlp", "auto"),
    ("resnet", "data"),
    ("llama", "tensor"),
)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("model", "strategy"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_two_hosts_equal_one_device(
    model: str, strategy: str, two_by_two: RankPool, tmp_path: Path
) -> None:
    outcome = compare(model, strategy, "float64", two_by_two, tmp_path / "reference")
    assert outcome.loss <= LIMIT_FLOAT64
    assert outcome.gradient <= LIMIT_FLOAT64, outcome.worst
    assert outcome.parameter <= LIMIT_FLOAT64, outcome.worst


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.multiprocess
def test_the_same_script_under_autopar_run_and_torchrun(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(script))
    losses, _, where = capsys.readouterr().out.strip().partition("] ")
    assert where == "one process"
    ours = [sys.executable, "-m", "autopar.cli", "run", str(script), "--nnodes", "2"]
    place = ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    here = [*ours, "--nproc-per-node", "1", *place]
    done = on_two_hosts([*here, "--node-rank", "0"], [*here, "--node-rank", "1"], STRATEGY="data")
    assert [code for code, _, _ in done] == [0, 0], done
    assert done[0][1] == f"{losses}] 2xcpu:1\n" and not done[1][1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    there = [*torchrun, "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    done = on_two_hosts(
        *([*there, "--nproc-per-node", "1", "--node-rank", str(i), str(script)] for i in range(2))
    )
    assert [code for code, _, _ in done] == [0, 0], done
    assert done[0][1] == f"{losses}] 2xcpu:1\n" and not done[1][1]


def test_a_host_that_does_not_come() -> None:
    nodes = check_nodes(2, 1, f"127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"did not answer at 127\.0\.0\.1:.*Connection refused"):
        meet(nodes, timeout_s=0.1)


def test_bad_options_are_told_before_anything_starts(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_main(capsys, "run", str(script), "--nproc", "2", "--nnodes", "2")
    assert code == 2 and "several hosts need a place to meet" in err
    code, _, err = run_main(
        capsys, *("calibrate", "--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:1")
    )
    assert code == 2 and "which host is this?" in err
