"""Mixtures of experts and tables by rows with the permute kernel: what one device computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopar.ir.lowered import ROUTED_GATHER, ROUTED_SCATTER
from autopar.ir.mesh import Mesh
from autopar.kernel_use import Places
from autopar.passes.rules_of import rules_of
from autopar.runtime.kernels import launch
from tests.routed_plans import routing
from tests.simulate import (
    assert_equivalent,
    concrete,
    lower_all,
    simulate,
    single_device,
    zoo_loss,
    zoo_subject,
)
from tests.zoo import ZOO

PERMUTE = Places({"permute": None})

# Routed with a kernel: the vocabulary's rows and, in two layers, the ways to experts and back; how
# many of these are weighted sums, and how many of those add the residual.
MODELS = {"moe_mask": (1, 0, 0), "moe_scatter": (5, 4, 2), "moe_sort": (11, 4, 0)}


@pytest.mark.parametrize("model", MODELS)
def test_equal_to_one_device(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, entry = zoo_subject(model), ZOO[model]
    graph = concrete(subject)
    decisions = routing(graph, rules_of(graph), Mesh.of(dp=2), "dp")
    program = lower_all(graph, {}, decisions, kernels=PERMUTE)[0]
    routed = [n for n in program.calls() if n.target in (ROUTED_GATHER, ROUTED_SCATTER)]
    by_kernel = [n for n in routed if n.kwargs.get("kernel")]
    more = [sum(name in n.kwargs for n in by_kernel) for name in ("weight", "epilogue")]
    assert (len(by_kernel), *more) == MODELS[model]
    launched: list[str] = []
    original = launch.launch

    def counted(kernel: Any, *rest: Any, **constants: Any) -> None:
        launched.append(kernel.name)
        original(kernel, *rest, **constants)

    for module in ("permute", "combine"):
        monkeypatch.setattr(f"autopar.runtime.kernels.{module}.launch", counted)
    args, kwargs = entry.inputs(0, torch.float64, None)
    loss = zoo_loss(entry)
    got = simulate(subject, args, kwargs, loss, decisions, kernels=PERMUTE)
    assert_equivalent(got, single_device(subject.module, args, kwargs, loss), model)
    rows, sums, _ = MODELS[model]
    wanted = {"permute"} | ({"sum_segments"} if rows > 1 else set())
    wanted |= {"combine", "combine_backward"} if sums else set()
    assert set(launched) == wanted
