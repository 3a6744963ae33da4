"""The single-GPU accuracy benchmark, tried on CPU with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.accuracy import Row, main
from benchmarks.gpu.models import SUBJECTS


def test_rows_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    shared = ["--device", "cpu", "--tiny", "--steps", "1", "--mode", "eager", "--model"]
    loose = [*shared, "llama-1b", "--precision", "autocast", "--limit", "1e9", "--json", str(out)]
    assert main(loose) == 0
    (row,) = json.loads(out.read_text())
    assert (row["model"], row["precision"], row["mode"]) == ("llama-1b", "autocast", "eager")
    assert 0 < row["predicted_s"] < 1
    assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
    assert "above the limit" not in capsys.readouterr().out
    assert main([*shared, "gpt2-124m", "--precision", "bf16", "--limit", "0"]) == 1
    assert "<- above the limit" in capsys.readouterr().out


def test_error_is_relative_to_what_was_measured() -> None:
    assert Row("", "", "", 0.9, 1.0, 0, 0, 0).error == pytest.approx(-0.1)


@pytest.mark.parametrize(("name", "parameters"), [("gpt2-124m", 124e6), ("llama-1b", 1.236e9)])
def test_sizes(name: str, parameters: float) -> None:
    with torch.device("meta"):
        module = SUBJECTS[name].build()
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(parameters, rel=0.01)
