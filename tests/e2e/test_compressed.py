"""Training with gradients as int8 stays near one device; without the option nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.cost.cluster import parse_cluster
from autopar.errors import UserError
from autopar.plan import plan_from_json
from autopar.planning import make_plan
from tests.e2e.pool import RankPool
from tests.e2e.training import distance, whole_gradients

pytestmark = pytest.mark.multiprocess

STEPS = 20
# Of two roundings to int8 in blocks of 256: each is off by top / 127 / sqrt(12) on average, where
# a block's top is about 3 of its standard deviations: 0.7 percent of its norm.
GRADIENT, LOSS = 0.02, 0.01


class Net(nn.Module):
    """Two matrices above the smallest that is compressed, and norms and biases below it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.down(self.norm(self.up(x)).relu()) - y).square().mean()


@dataclass
class Run:
    losses: list[float]
    gradients: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    kernels: int = 0
    micro_batches: int = 1


def trained(compress: str | None, strategy: str, plan: str | None = None) -> Run:
    torch.manual_seed(0)
    given = plan_from_json(plan) if plan is not None else None
    net = autopar.parallelize(Net().double(), strategy=strategy, compress=compress, plan=given)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    torch.manual_seed(1)
    run = Run([], {})
    for step in range(STEPS):
        loss = net(torch.randn(16, 64).double(), torch.randn(16, 64).double())
        loss.backward()
        if not step:
            run.gradients = dict(whole_gradients(net))
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
    session = net.autopar.session
    if session is not None:
        run.notes, run.micro_batches = net.autopar.plan.notes, net.autopar.plan.micro_batches
        calls = [n for made in session.programs for n in made.calls()]
        run.kernels = sum(n.kwargs.get("kernel") == "int8" for n in calls)
    return run


def in_micro_batches(strategy: str, count: int) -> str:
    batch = (torch.zeros(16, 64).double(), torch.zeros(16, 64).double())
    plan = make_plan(Net().double(), batch, {}, parse_cluster("cpu:2"), strategy=strategy)
    return replace(plan, micro_batches=count).to_json()


def worst(mine: Run, reference: Run) -> float:
    pairs = zip(mine.losses, reference.losses, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def alone() -> Run:
    return trained(None, "auto")


@pytest.mark.parametrize(("strategy", "micro_batches"), [("data", 1), ("zero", 1), ("zero", 2)])
def test_near_one_device(pool: RankPool, alone: Run, strategy: str, micro_batches: int) -> None:
    plan = in_micro_batches(strategy, micro_batches) if micro_batches > 1 else None
    first, second = pool.run(trained, "int8", strategy, plan)
    assert first.losses == second.losses and first.micro_batches == micro_batches
    assert worst(first, alone) < LOSS
    error = distance(first.gradients, alone.gradients)
    assert 1e-4 < error < GRADIENT
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name])
        if gradient.dim() == 1:  # norms and biases are not rounded
            assert distance({name: gradient}, {name: alone.gradients[name]}) < 1e-12
    assert any(
        note.startswith("compress: gradients along dp travel as int8") for note in first.notes
    )


def test_without_the_option_nothing_changes(pool: RankPool, alone: Run) -> None:
    plain = pool.run(trained, None, "data")[0]
    assert worst(plain, alone) < 1e-12 and distance(plain.gradients, alone.gradients) < 1e-12
    assert plain.kernels == 0 and not any("int8" in note for note in plain.notes)
    assert pool.run(trained, "int8", "data")[0].kernels > 0


def test_an_unknown_compression() -> None:
    with pytest.raises(UserError, match="unknown compression 'int4'") as found:
        autopar.parallelize(Net(), compress="int4")
    assert found.value.fix == "use 'int8', or leave it out"


def test_the_launcher_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_COMPRESS", "int3")
    with pytest.raises(UserError, match="unknown compression 'int3'"):
        autopar.parallelize(Net())
