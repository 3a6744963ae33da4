"""What a user says of kernels, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import autopar
from autopar.cli_run import run_script
from autopar.errors import UserError
from autopar.kernel_options import checked_kernels


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown kernels 'fast'") as caught:
        autopar.parallelize(nn.Linear(2, 2), kernels="fast")
    assert "'auto', 'off', 'all', 'interpret'" in str(caught.value.fix)
    monkeypatch.setenv("AUTOPAR_KERNELS", "slow")
    with pytest.raises(UserError, match="unknown kernels 'slow'"):
        autopar.parallelize(nn.Linear(2, 2))
    script = tmp_path / "script.py"
    script.write_text("")
    with pytest.raises(UserError, match="unknown kernels 'x'"):
        run_script(script, 1, [], kernels="x")


def test_the_interpreter_must_be_chosen_before_triton_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="needs TRITON_INTERPRET=1") as caught:
        checked_kernels("interpret")
    assert "TRITON_INTERPRET=1 autopar run" in str(caught.value.fix)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    with pytest.raises(UserError, match="comes too late"):
        checked_kernels("interpret")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert checked_kernels("interpret") == "interpret"


def test_without_triton_the_fix_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton, which is not installed") as caught:
        checked_kernels("interpret")
    assert "pip install triton" in str(caught.value.fix)
    assert checked_kernels("auto") == "auto"


def test_one_process_runs_with_any_kernels() -> None:
    model = autopar.parallelize(nn.Linear(2, 2), kernels="all")
    assert model(torch.ones(1, 2)).shape == (1, 2)
