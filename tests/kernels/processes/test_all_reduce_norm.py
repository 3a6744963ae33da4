"""All-reduce, residual and RMSNorm by four processes that wait for each other inside the kernel."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.runtime.kernels.all_reduce_norm import reference

from .ranks import CALLS, CASES, EPS, RANKS, Case, call_case, inputs

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]
GIVE_UP_S = 300.0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank has computed."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("ranks.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        texts = [process.communicate(timeout=GIVE_UP_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, texts, strict=True):
        assert process.returncode == 0, text
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def expected(case: Case, seed: int) -> tuple[Tensor, ...]:
    """The results and, by autograd of the reference in torch, the gradients."""
    partials, residual, weight, *grads = inputs(case, seed)
    leaves = [partials[0], residual, *([] if weight is None else [weight])]
    for leaf in leaves:
        leaf.requires_grad_()
    y, total, _ = reference(partials, residual, weight, EPS, case.epilogue, case.out)
    return (y.detach(), total.detach(), *torch.autograd.grad((y, total), leaves, grads))


def test_twenty_calls_one_after_the_other(ranks: list[dict[str, Any]]) -> None:
    """Of changing shapes, every rank late in turn: the sums of the reference bit for bit."""
    for call in range(CALLS):
        y, total, *_ = expected(call_case(call), call)
        for rank in ranks:
            got, summed = rank[f"call {call}"]
            assert torch.equal(summed, total)
            torch.testing.assert_close(got, y, rtol=1e-6, atol=1e-6)


def test_ranks_have_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for name in (*CASES, *(f"call {call}" for call in range(CALLS))):
        for rank in ranks[1:]:
            for mine, first in zip(rank[name], ranks[0][name], strict=True):
                assert torch.equal(mine, first)


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(ranks: list[dict[str, Any]], name: str) -> None:
    """Within some ulp of the reference: means are summed in another order, and a gradient in half
    precision is rounded from numbers that differ in their last bits."""
    case = CASES[name]
    wanted = expected(case, 100 + list(CASES).index(name))
    eps = max(torch.finfo(t.dtype).eps for t in wanted)
    for got, want in zip(ranks[0][name], wanted, strict=True):
        assert got.dtype is want.dtype and got.shape == want.shape
        scale = float(want.abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(got, want, rtol=4 * eps, atol=4 * eps * max(scale, 1.0))


def test_what_does_not_fit_is_done_in_torch(ranks: list[dict[str, Any]]) -> None:
    """With one warning; every other case ran the kernel."""
    for rank in ranks:
        assert rank["warnings"] == [
            "too large: kernel all_reduce_norm: a message of 144000 bytes does not fit its"
            " symmetric memory; its torch reference runs instead"
        ]
