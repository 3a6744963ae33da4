"""Loops that were written for one device give one device's numbers, unchanged."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import autopar
from autopar.compat import TORCH_VERSION
from autopar.errors import UserError
from autopar.runtime.single import SingleProcess
from tests.e2e.loops import (
    LOOPS,
    VOCAB,
    Decorated,
    batch,
    differences,
    gated,
    gpt,
    plain_gpt,
    run_loop,
    steps,
)
from tests.e2e.pool import RankPool
from tests.zoo.language import GPT

pytestmark = pytest.mark.multiprocess
SLOW = {"inductor_gpt", "inductor", "huggingface"}
TOLERANCE = {"autocast": 2e-2, "scaled": 1e-2}
# Each loop under one strategy is enough for most; those about storage see all of them.
STRATEGIES = {
    "clipped": ("tensor", "zero"),
    "recurrent": ("data", "zero"),
    "checkpointed": ("tensor", "zero"),
    "adamw_fused": ("tensor", "zero"),
    "batch_sizes": ("data", "zero", "tensor"),
    "dropout_masks": ("data", "tensor"),
    "decorated_class": ("auto",),
    "scaled": ("tensor", "zero"),
    "frozen": ("zero", "tensor"),
    "inductor": ("tensor",),
    "gradient_penalty": ("data", "zero", "tensor"),
    "inductor_gpt": ("tensor", "data"),
}
CASES = [
    pytest.param(name, strategy, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in LOOPS
    for strategy in STRATEGIES.get(name, ("tensor",))
]


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_loop_is_unchanged(name: str, strategy: str, two_ranks: RankPool) -> None:
    if name == "inductor_gpt" and TORCH_VERSION < (2, 12):
        pytest.skip("torch.compile of 2.11 cannot differentiate attention in float64 on CPUs")
    torch.set_num_threads(1)
    reference = run_loop(name, strategy)
    first, second = two_ranks.run(run_loop, name, strategy, timeout_s=300)
    tolerance = TOLERANCE.get(name, 1e-9)
    assert not list(differences(first, reference, tolerance))
    assert not list(differences(second, first, 0.0))  # ranks agree in every bit


def test_ranks_without_rows_gather_with_the_others(two_ranks: RankPool) -> None:
    torch.set_num_threads(1)
    reference = gated({})
    options = {"strategy": "zero", "micro_batches": 2}
    for mine in two_ranks.run(gated, options, timeout_s=60):
        assert not list(differences(mine, reference, 1e-9))


def models_share_groups(strategy: str) -> tuple[int, int]:
    """How many process groups there are after one parallel model, and after four."""
    counts = []
    for _ in range(4):
        steps(gpt(strategy), torch.optim.SGD([torch.zeros(1)]), 1)
        counts.append(dist.get_pg_count())
    return counts[0], counts[-1]


@pytest.mark.slow
def test_models_of_one_run_share_their_groups(two_ranks: RankPool) -> None:
    for strategy in ("zero", "tensor"):
        for first, last in two_ranks.run(models_share_groups, strategy):
            assert first == last


def hold_old_parameters() -> str:
    model = plain_gpt()
    kept = list(model.parameters())
    autopar.parallelize(model)
    try:
        model(*batch(0))
    except UserError as error:
        return f"{len(kept)}: {error}"
    return "nothing"


def test_parameters_kept_from_before_are_an_error(two_ranks: RankPool) -> None:
    for said in two_ranks.run(hold_old_parameters):
        assert "something still holds the old ones" in said


def pickle_parallel_module() -> str:
    try:
        pickle.dumps(gpt("data"))
    except UserError as error:
        return str(error)
    return "nothing"


def test_a_parallel_module_is_saved_by_its_state_dict(two_ranks: RankPool) -> None:
    for said in two_ranks.run(pickle_parallel_module):
        assert "save its state_dict()" in said


@pytest.mark.parametrize("make", [lambda: gpt("auto"), lambda: Decorated(VOCAB)])
def test_one_process_copies_and_pickles(make: Callable[[], Any]) -> None:
    model = make()
    assert type(model).__name__ in ("GPT", "Decorated") and isinstance(model, GPT)
    assert isinstance(model.autopar.single, SingleProcess)
    loss = model(*batch(0))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, GPT) and type(other).__name__ == type(model).__name__
        assert torch.equal(other(*batch(0)), loss)
        assert other.autopar is not model.autopar and other.autopar.module is other
        assert other.state_dict().keys() == model.state_dict().keys()


def test_one_process_runs_the_plain_forward() -> None:
    """After its first call nothing takes the ops of a module without dropout, and nothing hooks."""
    modes = []

    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append(torch._C._len_torch_function_stack())
            return super().forward(x)

    model: Any = autopar.parallelize(Model(3, 3))
    for _ in range(3):
        model(torch.ones(2, 3))
    assert modes == [1, 0, 0]  # the first call looks for dropout
    assert not model._forward_hooks and not model._forward_pre_hooks


SCRIPT = """
import os, sys
import torch
import autopar

torch.manual_seed(int(os.environ.get("RANK", "0")))
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
model = autopar.parallelize(model, strategy="data+tensor" if sys.argv[1] == "4" else "data")
optimizer = torch.optim.AdamW(model.parameters())
for step in range(3):
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
with open(f"loss.{os.environ.get('RANK', 'single')}", "w") as file:
    file.write(repr(loss.item()))
if sys.argv[2:] == ["fail"]:
    model(torch.zeros(3))
loss = model(x)  # a forward without its backward when the script ends
"""


def torchrun(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, *(launcher if ranks > 1 else []), "script.py", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip


def test_torchrun_trains_and_ends_cleanly(tmp_path: Path) -> None:
    assert torchrun(tmp_path, 1).returncode == 0
    done = torchrun(tmp_path, 4)
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr and "Traceback" not in done.stderr
    single = float((tmp_path / "loss.single").read_text())
    losses = {float((tmp_path / f"loss.{rank}").read_text()) for rank in range(4)}
    assert len(losses) == 1 and losses.pop() == pytest.approx(single, rel=1e-5)


def test_torchrun_ends_cleanly_after_a_user_error(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "fail")
    assert done.returncode != 0
    assert "UserError" in done.stderr or "RuntimeError" in done.stderr
    assert "terminate called" not in done.stderr and "Fatal" not in done.stderr
