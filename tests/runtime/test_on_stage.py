"""Parameters on the stages of a pipeline behave as one device's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from autopar.compat import fake_process_group
from autopar.ir.mesh import Mesh
from autopar.ir.parse import parse_sharding
from autopar.runtime import world
from autopar.runtime.on_stage import OnStage, StagedTensor, is_here, on_stage
from autopar.runtime.placements import placements_of, shard
from autopar.runtime.stage_placement import stage_mesh
from tests.e2e.loops import differences
from tests.e2e.pool import RankPool
from tests.e2e.weight_ops import differing
from tests.runtime.on_stage_cases import (
    CASES,
    MESHES,
    STORAGE,
    holds,
    misused,
    present_gradients,
    run_case,
    strided_pieces,
    traded_state,
    written_parts,
)
from tests.runtime.several_runs_cases import differing_ops

TOLERANCE = {"overflow": 1e-6, "muon": 1e-2}  # float32; matrix products in bfloat16
FEWER = {  # the mesh without stages: what only these tests see
    "stages": ("adamw_fused", "adafactor", "clip_2", "arithmetic", "overflow", "checkpoints"),
    "tensor": ("overflow", "arithmetic", "states", "clip_otherwise"),
}


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("mesh", "name"), [(mesh, name) for mesh in MESHES for name in FEWER.get(mesh, CASES)]
)
def test_is_as_on_one_device(mesh: str, name: str, four_ranks: RankPool) -> None:
    torch.set_num_threads(1)
    reference = run_case(name, None)
    results = four_ranks.run(run_case, name, mesh)
    for found in results:
        assert not list(differences(found, reference, TOLERANCE.get(name, 1e-9)))
        assert not list(differences(found, results[0], 0.0))  # ranks agree in every bit


@pytest.mark.multiprocess
def test_ranks_hold_what_is_on_their_stage(four_ranks: RankPool) -> None:
    everyone = four_ranks.run(holds, "stages and tensor")
    for name, (shape, _, stage) in STORAGE.items():
        if not shape:
            assert all(rank[name] == (1, True) for rank in everyone)
            continue
        assert [rank[name][1] for rank in everyone] == [r // 2 == stage for r in range(4)]
        stored = [rank[name][0] for rank in everyone]
        whole = torch.Size(shape).numel()
        assert sum(stored) == (2 * whole if name == "norm" else whole)  # which all of a stage have


@pytest.mark.multiprocess
@pytest.mark.parametrize("mesh", ["tensor", "stages and tensor"])
def test_pieces_of_several_runs(mesh: str, four_ranks: RankPool) -> None:
    assert four_ranks.run(strided_pieces, mesh) == [[True] * 3] * 4


@pytest.mark.multiprocess
@pytest.mark.parametrize("mesh", ["tensor", "stages and tensor"])
def test_ops_on_pieces_of_several_runs(mesh: str, four_ranks: RankPool) -> None:
    assert four_ranks.run(differing_ops, mesh) == [[]] * 4


@pytest.mark.multiprocess
def test_misuse_is_named(four_ranks: RankPool) -> None:
    for said in four_ranks.run(misused):
        assert "resize_.default changes the shape" in said


@pytest.mark.multiprocess
def test_parts_that_are_copies_are_written(four_ranks: RankPool) -> None:
    for found in four_ranks.run(written_parts):
        assert found and all(found)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ops_on_stages_of_several_devices(four_ranks: RankPool) -> None:
    assert four_ranks.run(differing, {"strategy": "pipeline+tensor", "stages": 2}) == [[]] * 4


@pytest.mark.multiprocess
def test_saved_with_its_placement(four_ranks: RankPool) -> None:
    assert four_ranks.run(traded_state) == [{"same": True}] * 4


@pytest.mark.multiprocess
def test_all_ranks_have_a_gradient_or_none_has(four_ranks: RankPool) -> None:
    everyone = four_ranks.run(present_gradients)
    for rank in everyone:
        assert [has for _, has in rank] == [i != 1 for i in range(len(rank))]
    assert not all(given for given, _ in everyone[0])


def test_placement_is_a_value() -> None:
    assert OnStage(1) == OnStage(1) != OnStage(2)
    assert len({OnStage(1), OnStage(1), OnStage(2)}) == 2
    assert OnStage(1) not in (Replicate(), Shard(0))
    assert repr(pickle.loads(pickle.dumps(copy.deepcopy(OnStage(3))))) == "OnStage(3)"


@pytest.mark.parametrize("rank", [0, 3])
def test_one_rank_of_two_stages(rank: int) -> None:
    mesh = Mesh.of(pp=2, tp=2)
    sharding = parse_sharding("[2:tp, -]")
    with fake_process_group(4, rank):
        live = world.device_mesh(mesh, "cpu")
        made = shard(torch.arange(16.0).view(8, 2), sharding, mesh, live, rank, stage=1)
        assert isinstance(made, StagedTensor) and made.shape == (8, 2)
        assert made.placements[0] == OnStage(1)
        assert made.placements == placements_of(sharding, mesh, 1)
        rows = made.to_local()[:, 0].tolist()
        assert rows == ([] if rank == 0 else [4.0, 6.0, 12.0, 14.0])
        assert is_here(made) == (rank == 3)
        assert (made * 2).placements == made.placements
        norm = made.norm()  # of a stage of this world, not of an equal one before it
        assert norm.placements[0] == OnStage(1)
        assert stage_mesh(live, 0) is stage_mesh(live, 0)
        assert stage_mesh(live, 0).get_group() is live.get_group("tp")
        with pytest.raises(ValueError, match="cannot be kept on one stage"):
            on_stage(made, 0, 0)
