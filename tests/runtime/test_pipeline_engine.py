"""The pipeline engine on real ranks, with pieces that are plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.runtime.pipeline_engine import PipelineEngine, schedule_for
from autopar.runtime.step_parts import BodyPart, Crossing
from tests.e2e.pool import RankPool

ROWS, WIDTH = 3, 8
F64 = torch.float64


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as made:
        yield made


@cache
def weights(pieces: int) -> tuple[tuple[nn.Parameter, ...], ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((WIDTH, WIDTH), (WIDTH,), (WIDTH, WIDTH))
    return tuple(
        tuple(nn.Parameter(torch.randn(s, generator=generator, dtype=F64) / 3) for s in shapes)
        for _ in range(pieces)
    )


def piece(
    params: Sequence[Tensor], h: Tensor, skip: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A residual block; `skip` goes all the way, `ids` are integers that cross, too."""
    first, bias, second = params
    grown = torch.tanh(torch.ops.aten.linear.default(h, first, bias))
    return h + torch.ops.aten.mm.default(grown, second) * (ids % 2), skip + 0 * h, ids + 1


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + k)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=F64)
    return x, torch.randint(0, 9, (ROWS, 1), generator=generator)


def objective(h: Tensor, skip: Tensor) -> Tensor:
    return (h * skip).sin().sum()


def alone(pieces: int, micro_batches: int) -> tuple[list[Tensor], list[Tensor]]:
    """Objectives and gradients of all parameters on one device."""
    params = [[p.detach().clone().requires_grad_() for p in w] for w in weights(pieces)]
    losses = []
    for k in range(micro_batches):
        x, ids = batch(k)
        h, skip = x * params[0][1], x
        for own in params:
            h, skip, ids = piece(own, h, skip, ids)
        losses.append(objective(h, skip))
        losses[-1].backward()
    return [x.detach() for x in losses], [p.grad for w in params for p in w if p.grad is not None]


def part_of(index: int, pieces: int, kept: dict[int, Tensor]) -> BodyPart:
    leaves = tuple(nn.Parameter(p.detach().clone()) for p in weights(pieces)[index])
    floating = Crossing((ROWS, WIDTH), F64, requires_grad=True)
    wire = (floating, floating, Crossing((ROWS, 1), torch.int64, requires_grad=False))

    def run(k: int, received: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x, ids = batch(k)
        given = (x * leaves[1], x, ids) if index == 0 else received
        results = piece(leaves, *given)
        if index < pieces - 1:
            return results
        kept[k] = objective(results[0], results[1])
        return (kept[k],)

    first, last = index == 0, index == pieces - 1
    return BodyPart(index, leaves, run, () if first else wire, () if last else wire)


def train(kind: str, chunks: int, counts: Sequence[int]) -> list[tuple[list[float], list[Tensor]]]:
    """One engine through steps of so many micro-batches, an evaluation between two."""
    group = dist.group.WORLD
    assert group is not None
    engine = PipelineEngine(kind, chunks, group, torch.device("cpu"))
    pieces = chunks * engine.stages
    steps = []
    for m in counts:
        kept: dict[int, Tensor] = {}
        parts = [part_of(i, pieces, kept) for i in range(engine.stage, pieces, engine.stages)]
        engine.train(parts, m)
        losses = [float(kept[k].detach()) for k in sorted(kept)]
        gradients = []
        for leaf in (leaf for part in parts for leaf in part.leaves):
            assert leaf.grad is not None
            gradients.append(leaf.grad.clone())
        kept.clear()
        engine.evaluate(parts, m)
        assert losses == [float(kept[k]) for k in sorted(kept)]
        steps.append((losses, gradients))
    return steps


def check(pool: RankPool, kind: str, chunks: int, counts: Sequence[int]) -> None:
    told = pool.run(train, kind, chunks, counts)
    pieces = chunks * pool.size
    for step, m in enumerate(counts):
        losses, gradients = alone(pieces, m)
        found: dict[int, list[Tensor]] = {}
        for rank, steps in enumerate(told):
            made = iter(steps[step][1])
            for index in range(rank, pieces, pool.size):
                found[index] = [next(made) for _ in weights(pieces)[index]]
        mine = [g for index in range(pieces) for g in found[index]]
        torch.testing.assert_close(told[-1][step][0], [float(x) for x in losses])
        torch.testing.assert_close(mine, gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)]
)
def test_schedules_have_the_gradients_of_one_device(pool: RankPool, kind: str, chunks: int) -> None:
    check(pool, kind, chunks, counts=(4, 2, 1, 5, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 3), ("zero_bubble", 1)]
)
def test_four_stages(kind: str, chunks: int) -> None:
    with RankPool(4) as pool:
        check(pool, kind, chunks, counts=(8, 4, 2, 12))


def order_of_work(kind: str) -> list[str]:
    """What this rank does, in order, with weights' gradients told apart."""
    from autopar.runtime import pipeline_stage

    group = dist.group.WORLD
    assert group is not None
    told: list[str] = []
    stage = pipeline_stage.PieceStage

    def telling(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def run(self: object, k: int, *args: object, **kwargs: object) -> object:
            told.append(f"{name}{k}")
            return method(self, k, *args, **kwargs)

        return run

    class Told(stage):
        forward_one_chunk = telling("F", stage.forward_one_chunk)
        backward_one_chunk = telling("B", stage.backward_one_chunk)
        backward_weight_one_chunk = telling("W", stage.backward_weight_one_chunk)

    pipeline_stage_of = PipelineEngine.train.__globals__
    before = pipeline_stage_of["PieceStage"]
    pipeline_stage_of["PieceStage"] = Told
    try:
        engine = PipelineEngine(kind, 1, group, torch.device("cpu"))
        kept: dict[int, Tensor] = {}
        engine.train([part_of(engine.stage, engine.stages, kept)], 4)
    finally:
        pipeline_stage_of["PieceStage"] = before
    return told


def waits(told: list[str]) -> bool:
    return any(told.index(f"W{k}") > told.index(f"B{k}") + 1 for k in range(4))


def test_zero_bubble_leaves_weights_for_later(pool: RankPool) -> None:
    apart = pool.run(order_of_work, "zero_bubble")
    assert any(waits(told) for told in apart), apart
    assert not any(waits(told) for told in pool.run(order_of_work, "1f1b"))


def test_what_cannot_be_scheduled_runs_with_all_forwards_first() -> None:
    assert schedule_for("1f1b", 4, 1, 4) == "1f1b"
    assert schedule_for("1f1b", 4, 1, 3) == "gpipe"
    assert schedule_for("interleaved", 2, 2, 5) == "gpipe"
    assert schedule_for("zero_bubble", 2, 1, 5) == "1f1b"
    assert schedule_for("interleaved", 2, 2, 6) == "interleaved"
