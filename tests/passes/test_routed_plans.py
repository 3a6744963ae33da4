"""What the planner makes of ordinary mixtures of experts and embedding tables on clusters."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from autopar.cost.cluster import parse_cluster
from autopar.passes.search import search
from autopar.plan import Plan
from tests.simulate import subject_of
from tests.zoo.routed_experts import (
    Dispatch,
    MaskDispatch,
    RoutedMoE,
    ScatterDispatch,
    SortDispatch,
)


def planned(module: nn.Module, batch: tuple[Tensor, ...], cluster: str) -> Plan:
    made = subject_of(module, batch, {}).capture
    return search(made.graph, made.fingerprint, made.symbols, parse_cluster(cluster))


def moe_plan(dispatch: Dispatch, cluster: str, experts: int, dim: int, batch: int) -> Plan:
    with torch.device("meta"):
        build = partial(RoutedMoE, dispatch, dim, 4 * dim, experts, vocab=32000)
        module = build(layers=1).bfloat16()
    ids = torch.zeros(batch, 512, dtype=torch.long)
    return planned(module, (ids, ids), cluster)


def axis_of_experts(plan: Plan) -> str:
    """The axis that owns whole experts; fails if a stack of weights is kept in any other way."""
    stacks = {n: p.sharding for n, p in plan.params.items() if ".inner." in n}
    (sharding,) = set(stacks.values())
    axis, *rest = sharding.strip("[]").split(", ")
    assert axis != "-" and rest == ["-", "-"], stacks
    return axis


def sent(plan: Plan, kind: str, text: str) -> int:
    return sum(t.sent_bytes for t in plan.traffic if t.collective == kind and text in t.purpose)


@pytest.mark.parametrize(
    ("dispatch", "cluster", "experts", "dim", "batch"),
    [
        (MaskDispatch, "8xH100", 64, 1024, 64),
        (ScatterDispatch, "8xH100", 64, 1024, 64),
        (SortDispatch, "8xH100", 64, 1024, 64),
        (ScatterDispatch, "4x8xH100", 128, 2048, 256),
    ],
)
def test_tokens_travel_and_experts_stay(
    dispatch: Dispatch, cluster: str, experts: int, dim: int, batch: int
) -> None:
    plan = moe_plan(dispatch, cluster, experts, dim, batch)
    axes = axis_of_experts(plan)
    assert plan.mesh.size == parse_cluster(cluster).size
    products = [a for a in plan.activations if a.op == "bmm"]
    assert products and all(a.sharding.startswith(f"[{axes}, ") for a in products), products
    # Both ways, forward and backward, at least the tokens' own bytes each.
    tokens = batch * 512 * dim * 2 / plan.mesh.size
    there_and_back = sum(
        t.sent_bytes
        for t in plan.traffic
        if t.collective == "all_to_all" and ("experts" in t.purpose or "routed" in t.purpose)
    )
    assert there_and_back >= 2 * 2 * 2 * 0.8 * tokens, plan.traffic
    # What is gathered of parameters would not hold one layer's experts.
    layer = 2 * experts * dim * 4 * dim * 2
    assert sent(plan, "all_gather", "parameters") < layer / 4
    assert not any("bmm" in t.purpose for t in plan.traffic if t.collective == "all_gather")
    slower = {a.name: a.time_s for a in plan.alternatives if a.name in ("data", "zero")}
    assert all(t is None or t > 1.5 * plan.predicted.time_s for t in slower.values()), slower


def test_small_experts_are_computed_where_the_tokens_are() -> None:
    """Every sequence has slots of its own, so that gradients of the experts are all there is."""
    with torch.device("meta"):
        module = RoutedMoE(MaskDispatch, 64, 64, 4, layers=1, vocab=1000).bfloat16()
    ids = torch.zeros(1024, 128, dtype=torch.long)
    plan = planned(module, (ids, ids), "8xH100")
    moved = [t for t in plan.traffic if t.collective == "all_to_all" and "experts" in t.purpose]
    assert not moved, plan.traffic


class Table(nn.Module):
    """A table looked up by every item of a history; a network per item, then the mean (or before)."""

    def __init__(self, rows: int, width: int, pool_first: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.net = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))
        self.pool_first = pool_first

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        rows = self.table(ids)
        y = self.net(rows.mean(1)) if self.pool_first else self.net(rows).mean(1)
        return nn.functional.mse_loss(y.squeeze(-1), target)


Case = tuple[int, int, int, int, bool]  # rows, width, batch, history, mean before the network

# What the lookup does is a factor of its rule, ab,cd->cdb.
TABLES: dict[str, tuple[str, Case, set[str]]] = {
    "a small table is whole": ("8xH100", (100, 64, 65536, 1, False), {"c", "d"}),
    "a wide one is split by columns": ("8xH100", (1_000_000, 64, 65536, 1, False), {"b"}),
    "means of a narrow one are summed over its rows": (
        "4x8xH100",
        (10_000_000, 1, 65536, 8, True),
        {"a"},
    ),
    "rows of a narrow one are sent": (
        "4x8xH100",
        (40_000_000, 4, 65536, 200, False),
        {"c", "c>a"},
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(case: str) -> None:
    cluster, (rows, width, batch, history, pool_first), expected = TABLES[case]
    with torch.device("meta"):
        module = Table(rows, width, pool_first)
    ids, target = torch.zeros(batch, history, dtype=torch.long), torch.zeros(batch)
    plan = planned(module, (ids, target), cluster)
    (chosen,) = (c for name, c in plan.choices.items() if name.startswith("embedding"))
    assert set(chosen.values()) <= expected, (chosen, plan.params["table.weight"])
    if "c>a" in expected:
        assert "c>a" in chosen.values()
        assert sent(plan, "all_to_all", "activations routed by embedding") > 0
