"""Batch normalisation in the micro-batches of a pipeline: every stage keeps its own statistics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from autopar.capture import capture
from autopar.ir.text import print_graph
from tests.e2e.loops import Values, differences, seed, state
from tests.e2e.micro_loops import made
from tests.e2e.piped_plans import piped_plan
from tests.e2e.pool import RankPool

pytestmark = pytest.mark.multiprocess
MICRO_BATCHES, STEPS = 4, 3


class Block(nn.Module):
    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x)).relu()


class Normed(nn.Module):
    """Batch norms in every stage; the first one reads the input alone, and has no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.BatchNorm1d(8, affine=False)
        self.blocks = nn.ModuleList(Block(m) for m in (0.1, 0.3, 0.2, 0.1, 0.5, 0.1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x), y)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(4, (16,), generator=generator)


def trained(plan: str | None) -> Values:
    """A few steps, then an evaluation: under a plan, or micro-batch after micro-batch."""
    seed(0)
    plain = Normed().double()
    model = made(plain, plan, micro_batch_statistics=True) if plan is not None else plain
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        x, y = batch_of(step)
        if plan is not None:
            loss = model(x, y)
            loss.backward()
            losses.append(loss.item())
        else:
            chunks = zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True)
            parts = [model(*chunk) / MICRO_BATCHES for chunk in chunks]
            torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
            losses.append(sum(part.item() for part in parts))
        optimizer.step()
        optimizer.zero_grad()
    values = state(model)
    counts = {n: values.pop(n) for n in list(values) if n.endswith("num_batches_tracked")}
    # One device counts calls of forward; under a plan there is one per step.
    per_step = 1 if plan is not None else MICRO_BATCHES
    counts = {n: torch.as_tensor(c).double() / per_step for n, c in counts.items()}
    model.eval()
    with torch.no_grad():
        evaluated = model(*batch_of(99)).item()
    return {"losses": losses, "evaluated": evaluated, **values, **counts}


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.parametrize(
    ("stages", "family", "schedule"),
    [
        (4, "data", "1f1b"),
        (2, "tensor", "zero_bubble"),
        pytest.param(2, "data", "interleaved", marks=pytest.mark.slow),
    ],
)
def test_every_stage_hands_back_its_statistics(
    stages: int, family: str, schedule: str, four_ranks: RankPool
) -> None:
    torch.set_num_threads(1)
    module = Normed().double()
    plan = piped_plan(
        capture(module, batch_of(0), {}), stages, 4, family, schedule, MICRO_BATCHES
    ).to_json()
    reference = trained(None)
    assert any("num_batches_tracked" in name for name in reference)
    for rank, found in enumerate(four_ranks.run(trained, plan, timeout_s=300)):
        wrong = list(differences(found, reference, 1e-9))
        assert not wrong, f"rank {rank}: {wrong}"


def programs(plan: str) -> tuple[list[tuple[int, str]], list[str]]:
    seed(0)
    model = made(Normed().double(), plan, micro_batch_statistics=True)
    model(*batch_of(0)).backward()
    session = model.autopar.session
    return (
        [(stage.piece, stage.name) for stage in session.stages],
        [print_graph(graph) for graph in session.programs],
    )


def test_a_session_has_the_programs_of_its_pieces(four_ranks: RankPool) -> None:
    """What every pass left, piece by piece, and what runs: each block on one rank."""
    module = Normed().double()
    plan = piped_plan(capture(module, batch_of(0), {}), 4, 4, "data", "1f1b", MICRO_BATCHES)
    found = four_ranks.run(programs, plan.to_json(), timeout_s=300)
    for rank, (stages, texts) in enumerate(found):
        names = [name for _, name in stages]
        assert {piece for piece, _ in stages} == {rank}
        assert names[0] == "capture" and {"propagate", "split_step", "localise_shapes"} <= {*names}
        assert len(texts) == 1
        assert ("received" in texts[0]) == (rank > 0)
        assert ("cross_entropy" in texts[0]) == (rank == 3)
    for block in range(6):
        weight = f"blocks_{block}_linear_weight"
        assert sum(weight in texts[0] for _, texts in found) == 1
