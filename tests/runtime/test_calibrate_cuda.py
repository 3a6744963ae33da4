"""From device timings to a profile: the work is tried on CPU at tiny sizes."""

from __future__ import annotations

import pytest
import torch

from autopar.cost.compute import LocalOp, forward_time
from autopar.cost.local_op import TensorSpec
from autopar.cost.profile import cluster_from_json, cluster_to_json, shipped_profile
from autopar.errors import UserError
from autopar.runtime.calibrate_cuda import (
    calibrate_cuda,
    gpu_from_samples,
    measure_device,
    profile_for,
    smoothed,
    with_links,
)
from autopar.runtime.calibrate_cuda_ops import TINY
from autopar.runtime.device_clock import DeviceClock


def test_a_profile_from_tiny_work() -> None:
    shipped = shipped_profile("h100")
    clock = DeviceClock(torch.device("cpu"), 2, flush_bytes=1 << 16)
    device = gpu_from_samples(measure_device(clock, TINY), 8e10, "timings", shipped.device)
    cluster = with_links(device, shipped)
    assert cluster_from_json(cluster_to_json(cluster)) == cluster
    assert set(device.rates) == {"matmul", "matmul_backward", "attention", "attention_backward"}
    assert set(device.rates["matmul"]) == {"bfloat16", "float32", "tf32"}
    assert {"pointwise", "norm_backward", "softmax", "embedding", "adamw", "copy", "matmul"} <= set(
        device.bandwidth
    )
    assert (
        cluster.levels[0]
        .collectives["all_reduce"][0]
        .bandwidth.source.startswith("not measured: shipped profile of")
    )
    assert "the host queues an op" in device.sources["op_overhead_s"]
    assert "not measured with one GPU" in device.narrow.source


def test_times_come_back_from_the_profile() -> None:
    samples = [
        ("overhead", 1.0, 2e-6),
        ("matmul:bfloat16", 2.0 * 1024**3, 102e-6),
        ("bandwidth:matmul", 1e6, 3e-6),
        ("bandwidth:pointwise", 3e6, 5e-6),
    ]
    device = gpu_from_samples(samples, 8e10, "", shipped_profile("h100").device)
    half = [TensorSpec((1024, 1024), torch.bfloat16)] * 2
    product = LocalOp("linear", tuple(half), (half[0],))
    assert forward_time(device, product) == pytest.approx(102e-6)
    single = [TensorSpec((250_000,), torch.float32)] * 2
    assert forward_time(device, LocalOp("add", tuple(single), (single[0],))) == pytest.approx(5e-6)


def test_one_point_per_power_of_two() -> None:
    points = [(1000.0, 1.0), (1100.0, 5.0), (1050.0, 2.0), (4096.0, 7.0)]
    (x, y), last = sorted(smoothed(points))
    assert 1000 < x < 1100
    assert (y, last) == (2.0, pytest.approx((4096.0, 7.0)))


@pytest.mark.parametrize(
    ("gpu", "profile"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_the_links_of_a_gpu(gpu: str, profile: str) -> None:
    assert profile_for(gpu) == profile


def test_what_cannot_be_calibrated() -> None:
    with pytest.raises(UserError, match="no shipped profile has the links of 'NVIDIA T4'"):
        profile_for("NVIDIA T4")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            calibrate_cuda()
