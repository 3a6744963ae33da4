"""What a search does for a model does not grow with the copies of its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopar.cost.cluster import parse_cluster
from autopar.cost.simulator import Machine
from autopar.passes.grid import GridPricer
from autopar.passes.prepare import prepare
from autopar.passes.search import search
from autopar.passes.segment_builder import SegmentBuilder
from autopar.planning import capture_training
from tests.zoo.language import Llama

COUNTED = (
    (Machine, "forward"),
    (Machine, "backward"),
    (GridPricer, "call"),
    (SegmentBuilder, "segment"),
)


def work_of(layers: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often copies were simulated, ops priced on meshes, and pieces of a step made."""
    ids = torch.zeros(64, 32, dtype=torch.int64)
    made = capture_training(Llama(512, layers=layers), (ids, ids), {})
    found: Counter[str] = Counter()
    with monkeypatch.context() as patched:
        for owner, name in COUNTED:
            patched.setattr(owner, name, _counted(getattr(owner, name), found))
        cluster = parse_cluster("2x8xH100")
        search(prepare(made.graph), made.fingerprint, made.symbols, cluster, memory_limit=1e12)
    return found


def _counted(function: Callable[..., Any], found: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        found[function.__name__] += 1
        return function(*arguments)

    return call


def test_work_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = work_of(12, monkeypatch), work_of(24, monkeypatch)
    assert all(few[name] for _, name in COUNTED)
    assert few == many
