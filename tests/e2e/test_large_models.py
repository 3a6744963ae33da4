"""Models on ranks without any rank ever holding all of their parameters, with one device's values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import ShardingWarning
from autopar.ir.mesh import Axis, Mesh
from autopar.ir.parse import parse_sharding
from autopar.ir.sharding import Sharding
from autopar.runtime import world
from autopar.runtime.materialise import shard_deferred
from autopar.runtime.placements import local_shard
from tests.e2e.loops import batch, steps
from tests.e2e.pool import RankPool
from tests.zoo import ZOO
from tests.zoo.language import GPT

pytestmark = pytest.mark.multiprocess
RANKS = 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(RANKS) as pool:
        yield pool


def seed() -> None:
    """Rank 0's seed counts."""
    torch.manual_seed(3 + (100 * dist.get_rank() if dist.is_initialized() else 0))


# -- values ---------------------------------------------------------------------------------------

FLAT = Mesh((Axis("dp", 2, 0), Axis("tp", 2, 0)))
STAGES = Mesh((Axis("pp", 2, 0), Axis("tp", 2, 0)))
SHARDINGS = {
    FLAT: ("[dp, tp]", "[-, dp&tp]", "[2:tp, dp]", "[-, -]", "[tp, -]"),
    STAGES: ("[tp, -]", "[-, tp]", "[-, -]"),
}


def build_pieces(names: list[str]) -> list[str]:
    """What of the zoo's parameters is not bitwise the eager one, put together from the pieces."""
    wrong: list[str] = []
    for i, name in enumerate(names):
        torch.manual_seed(3)
        eager = dict(ZOO[name].build().named_parameters())
        seed()
        with autopar.deferred():
            model = ZOO[name].build()
        mesh = (FLAT, STAGES)[i % 2]
        texts = SHARDINGS[mesh]
        matrices = [n for n, p in eager.items() if p.dim() == 2 and not any(s % 4 for s in p.shape)]
        storage = {n: parse_sharding(texts[k % len(texts)]) for k, n in enumerate(matrices)}
        stages = {n: (k % 2,) for k, n in enumerate(eager)} if mesh is STAGES else {}
        here = mesh.coordinates(dist.get_rank())
        objects = {n: id(p) for n, p in model.named_parameters()}
        shard_deferred(model, storage, mesh, world.device_mesh(mesh, "cpu"), stages)
        for n, p in model.named_parameters():
            assert isinstance(p, DTensor) and isinstance(p, nn.Parameter) and id(p) == objects[n]
            wanted = eager[n].detach()
            if name == "rec":  # few and small: what DTensor makes of the pieces
                assert torch.equal(p.detach().full_tensor(), wanted)
            sharding = storage.get(n, Sharding.replicated(p.dim()))
            wanted = local_shard(wanted, sharding, mesh, dist.get_rank())
            if n in stages and p.dim() and stages[n][0] != here["pp"]:
                wanted = wanted[:0]
            piece = p.to_local().detach()
            if piece.dtype != wanted.dtype or not torch.equal(piece, wanted):
                wrong.append(f"{name}.{n}")
    return wrong


def test_pieces_are_those_of_one_device(ranks: RankPool) -> None:
    names = ["mlp", "rec", "gpt", "llama", "resnet", "moe_index"]  # all: tests/runtime
    assert ranks.run(build_pieces, names, timeout_s=300) == [[]] * RANKS


def build_differently() -> tuple[list[str], float]:
    seed()
    with autopar.deferred():
        model = nn.Linear(8, 8)
        if dist.get_rank() == 1:
            nn.init.ones_(model.weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shard_deferred(
            model, {"weight": parse_sharding("[dp, -]")}, FLAT, world.device_mesh(FLAT, "cpu")
        )
    whole: Any = model.weight.detach()
    told = [str(w.message) for w in caught if w.category is ShardingWarning]
    return told, float(whole.full_tensor().sum())


def test_rank_zero_counts_where_ranks_build_differently(ranks: RankPool) -> None:
    torch.manual_seed(3)
    wanted = nn.Linear(8, 8).weight.sum().item()
    for told, total in ranks.run(build_differently):
        assert total == pytest.approx(wanted, rel=1e-6)
        assert len(told) == 1 and "computed on rank 0" in told[0]


# -- memory ---------------------------------------------------------------------------------------

WIDTH, DEPTH, ROWS = 2048, 4, 16
WHOLE_BYTES = DEPTH * WIDTH * (WIDTH + 1) * 4  # of all parameters: 64 MiB
# Parameters, gradients and AdamW's two moments are three times what one rank may have.
LIMIT_BYTES = 4 * WHOLE_BYTES / 3


class Deep(nn.Module):
    """Most of its bytes are four matrices that are initialised twice."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(DEPTH))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) + x
        return x.square().mean()


def rows(step: int, width: int = WIDTH) -> Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(step))


def resident(name: str) -> int:
    """Bytes of this process in memory now ("VmRSS"), or at most since it was reset ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def train_too_large(width: int = WIDTH) -> tuple[list[float], int, int]:
    """Losses of three steps; most bytes beyond those at the start, built, and after a step."""
    options: dict[str, Any] = {"memory_limit": LIMIT_BYTES} if dist.is_initialized() else {}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the most
    seed()
    model: Any = autopar.parallelize(**options)(Deep)(width)
    built = resident("VmHWM") - before
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    after = 0
    for step in range(3):
        loss = model(rows(step, width))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after = after or resident("VmHWM") - before
    return losses, built, after


def test_a_model_three_times_too_large_is_built_and_trained(ranks: RankPool) -> None:
    ranks.run(train_too_large, 32, timeout_s=300)  # what is imported late takes memory too
    answers = ranks.run(train_too_large, timeout_s=300)
    wanted, _, _ = train_too_large()
    for losses, built, after in answers:
        assert losses == pytest.approx(wanted, rel=1e-5)
        # Without, each rank has the whole parameters, twice where they are initialised twice. The
        # largest is a quarter of them: its place in the memory for a moment is what is needed.
        assert built < 0.75 * WHOLE_BYTES
        # All that a rank has of the step, its imports and its buffers for messages included.
        assert after < LIMIT_BYTES + 48 * 2**20


# -- checkpoints ----------------------------------------------------------------------------------


def gpt() -> nn.Module:
    return GPT(101, dropout=0.0, layers=1, context=16)  # its head is tied to its embedding


def train(model: Any) -> list[float]:
    return steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)


def train_from(folder: str, kind: str) -> dict[str, Any]:
    """Losses and state of a model that starts with a checkpoint, and is saved to another."""
    if kind == "meta":
        with torch.device("meta"):
            model: Any = gpt()
        model = autopar.parallelize(model, strategy="tensor", checkpoint=folder)
    else:
        model = autopar.parallelize(strategy="zero")(GPT)(101, dropout=0.0, layers=1, context=16)
        model.autopar.prepare(*batch(0))
        autopar.load_checkpoint(model, folder)
    losses = train(model)
    autopar.save_checkpoint(model, f"{folder}-{kind}")
    return {"losses": losses, **{n: v.clone() for n, v in model.state_dict().items()}}


@pytest.mark.parametrize("kind", ["meta", "planned"])
def test_ranks_start_from_a_checkpoint_and_write_one(
    tmp_path: Path, ranks: RankPool, kind: str
) -> None:
    torch.manual_seed(7)
    source = gpt()
    autopar.save_checkpoint(source, tmp_path / "start")
    losses = train(source)
    answers = ranks.run(train_from, str(tmp_path / "start"), kind, timeout_s=300)
    for answer in answers:
        assert answer.pop("losses") == pytest.approx(losses, rel=1e-5)
        for name, value in source.state_dict().items():
            torch.testing.assert_close(answer[name], value, rtol=1e-4, atol=1e-5)
    saved = tmp_path / f"start-{kind}"
    assert len(list(saved.glob("*.safetensors"))) == RANKS
    with autopar.deferred():
        again = gpt()
    autopar.load_checkpoint(again, saved)
    for name, value in again.state_dict().items():
        assert torch.equal(torch.tensor(value.tolist()), answers[0][name]), name
