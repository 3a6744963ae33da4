from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autopar.cost.cluster import COLLECTIVE_KINDS, Cluster, Level
from autopar.cost.comm import collective_time
from autopar.cost.compute import LocalOp, TensorSpec, forward_time, optimizer_time
from autopar.cost.profile import load_profile
from autopar.errors import UserError
from autopar.runtime.calibrate import calibrate
from autopar.runtime.calibrate_collectives import KINDS, collective_call, group_sizes
from autopar.runtime.calibrate_curves import (
    collectives_from_samples,
    device_from_samples,
    skew_of,
)
from autopar.runtime.calibrate_ops import compute_work, optimizer_work
from autopar.runtime.thread_world import ThreadWorld, run_threads


def test_curves_give_back_the_timings() -> None:
    samples = [
        ("overhead", 1.0, 1e-6),
        ("matmul:float32", 2.0 * 512**3, 0.01 + 1e-6),
        ("narrow:8", 2.0 * 8 * 512 * 512, 1e-3 + 1e-6),
        ("bandwidth:matmul", 1e6, 1e-4),
        ("bandwidth:pointwise", 12e6, 2e-3 + 1e-6),
    ]
    device = device_from_samples("cpu", samples, 1e9, "test")
    square = LocalOp("mm", (TensorSpec((512, 512)),) * 2, (TensorSpec((512, 512)),))
    assert forward_time(device, square) == pytest.approx(0.01 + 1e-6)
    wide = TensorSpec((1000, 1000))
    add = LocalOp("add", (wide, wide), (wide,))
    assert forward_time(device, add) == pytest.approx(2e-3 + 1e-6)
    skinny = LocalOp("mm", (TensorSpec((8, 512)), TensorSpec((512, 512))), (TensorSpec((8, 512)),))
    assert forward_time(device, skinny) == pytest.approx(1e-3 + 1e-6)


def test_collective_curves_give_back_the_timings() -> None:
    samples = [
        (f"collective:{kind}:{members}", nbytes, 1e-3 + nbytes / 1e9)
        for kind in COLLECTIVE_KINDS
        for members in (2, 4)
        for nbytes in (1e3, 1e6, 1e8)
    ]
    samples += [(key.replace("collective", "network"), x, 9 * t) for key, x, t in samples]
    curves = collectives_from_samples(samples, "test")
    network = collectives_from_samples(samples, "test", "network")
    device = device_from_samples(
        "cpu",
        [("overhead", 1, 1e-6), ("matmul:float32", 1, 1), ("bandwidth:pointwise", 1, 1)],
        1,
        "",
    )
    cluster = Cluster("test", device, (Level("host", 4, curves),))
    for kind in COLLECTIVE_KINDS:
        for members in (2, 4):
            assert collective_time(cluster, kind, 1e6, (members,)) == pytest.approx(2e-3)
    several = replace(cluster, levels=(*cluster.levels, Level("network", 16, network)))
    assert collective_time(several, "all_reduce", 1e6, (1, 4)) == pytest.approx(18e-3)


def test_group_sizes() -> None:
    assert [group_sizes(n) for n in (2, 4, 6, 8)] == [[2], [2, 4], [2, 4, 6], [2, 4, 8]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"nproc": 1}, "cannot calibrate 1 rank"),
        ({"nproc": 4, "device": "tpu"}, "cannot calibrate the device 'tpu'"),
        ({"nproc": 4, "out": Path("/no/such/folder/p.json")}, "its folder does not exist"),
    ],
)
def test_what_cannot_be_calibrated(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(**kwargs)  # type: ignore[arg-type]


def test_every_workload_runs() -> None:
    for work in compute_work(quick=True):
        if work.x < 1e7:
            assert all(tensor.numel() for tensor in work.hot or ())
            work.fn()


def test_the_optimizer_steps_on_every_parameter() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    (work,) = optimizer_work(parameters)
    work.fn()
    assert work.times == 4
    assert all((p < 1).all() and p.grad is None for p in parameters)


@pytest.mark.parametrize("nbytes", [1 << 10, 1 << 16, 1 << 24])
def test_collectives_run_in_every_form(nbytes: int) -> None:
    world = ThreadWorld(2)

    def run(rank: int) -> None:
        for kind in KINDS:
            collective_call(kind, world.group(rank), nbytes)()

    run_threads(world, run)


def test_the_last_rank_sets_the_rates() -> None:
    samples = [
        ("overhead", 1.0, 1e-6),
        ("matmul:float32", 1e9, 0.1),
        ("bandwidth:pointwise", 12e6, 2e-3),
        ("optimizer", 1.0, 3e-5),
    ]
    alone = device_from_samples("cpu", samples, 1e9, "")
    apart = device_from_samples("cpu", [*samples, *(("skew", w, 0.25) for w in (1, 2, 3))], 1e9, "")
    assert skew_of(samples) == 0.0
    assert apart.peak("float32") == pytest.approx(alone.peak("float32") / 1.25)
    assert apart.op_overhead_s == pytest.approx(1.25 * alone.op_overhead_s)
    assert optimizer_time(apart, 0.0) == pytest.approx(1.25 * 3e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_quick_calibration_of_two_ranks(tmp_path: Path) -> None:
    cluster = calibrate(2, out=tmp_path / "here.json", quick=True)
    assert load_profile(tmp_path / "here.json") == cluster
    assert cluster.size == 2 and cluster.single is not None
    assert {"matmul", "conv", "attention", "conv_backward"} <= set(cluster.device.rates)
    assert [f.name for f in tmp_path.iterdir()] == ["here.json"]
