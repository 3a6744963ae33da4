"""Four ranks equal one device: a representative part of `make verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e.pool import RankFailure, RankPool
from tests.e2e.training import Outcome, make_reference, train_and_compare
from tests.e2e.verify import LIMIT_FLOAT64, LIMIT_LOSS_FLOAT32, main

pytestmark = pytest.mark.multiprocess
STEPS = 4
CASES = (
    ("mlp", "auto"),
    ("mlp", "data"),
    ("rec", "tensor"),
    ("resnet", "data+tensor"),
    ("moe", "tensor"),
    ("gpt_attention_dropout", "zero"),
    ("gpt_attention_dropout", "data+tensor"),
    ("llama", "tensor"),
    ("hf_gpt2", "zero"),
)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.parametrize(("model", "strategy"), CASES)
def test_float64_equals_one_device(
    model: str, strategy: str, four_ranks: RankPool, tmp_path: Path
) -> None:
    outcome = compare(model, strategy, "float64", four_ranks, tmp_path / "reference")
    assert outcome.loss <= LIMIT_FLOAT64
    assert outcome.gradient <= LIMIT_FLOAT64, outcome.worst
    assert outcome.parameter <= LIMIT_FLOAT64, outcome.worst


def test_float32_losses_equal_one_device(four_ranks: RankPool, tmp_path: Path) -> None:
    outcome = compare("llama", "data+tensor", "float32", four_ranks, tmp_path / "reference")
    assert outcome.loss <= LIMIT_LOSS_FLOAT32


def compare(model: str, strategy: str, dtype: str, pool: RankPool, file: Path) -> Outcome:
    torch.set_num_threads(1)
    make_reference(model, dtype, STEPS, file)
    outcome = pool.run(train_and_compare, model, strategy, dtype, STEPS, str(file))[0]
    assert outcome.mesh and not outcome.inapplicable
    assert isinstance(outcome, Outcome)
    return outcome


def fail_on(rank: int) -> int:
    import os

    import torch.distributed as dist

    if dist.get_rank() == rank:
        os._exit(3)
    return dist.get_rank()


def test_a_dead_rank_is_a_failure_and_the_pool_goes_on() -> None:
    with RankPool(2) as pool:
        with pytest.raises(RankFailure, match="exit code 3"):
            pool.run(fail_on, 1)
        assert pool.run(fail_on, 2) == [0, 1]
        assert pool.starts == 2


@pytest.mark.slow
def test_verify_prints_a_table_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = ["--models", "mlp", "--strategies", "tensor", "--steps", "2", "--dtype", "float64"]
    command += ["--json", str(tmp_path / "rows.json")]
    assert main(command) == 0
    assert "1 of 1 hold" in capsys.readouterr().out
    assert "gradient" in (tmp_path / "rows.json").read_text()
    monkeypatch.setattr("tests.e2e.verify.LIMIT_FLOAT64", -1.0)
    assert main(command) == 1
    assert "loss differs by" in capsys.readouterr().out
