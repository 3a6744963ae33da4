"""`autopar calibrate --device cuda`: measure one GPU and write a cluster profile with it.

One process has one GPU: everything that needs no other device is measured (medians of device time,
`device_clock`). Collectives, what compute loses beside them and the padding of narrow products come
from the shipped profile of the same model, and every such figure says so in its source.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from autopar.cost.cluster import Cluster, Device, Level
from autopar.cost.curve import Curve
from autopar.cost.profile import save_profile, shipped_profile, shipped_profiles
from autopar.errors import UserError

from .calibrate_cuda_ops import FULL, QUICK, Amount, device_work
from .device_clock import DeviceClock

CALLS = {False: 15, True: 5}  # of a callable, by `quick`
Sample = tuple[str, float, float]  # key, x (flops or bytes), seconds


def calibrate_cuda(
    out: Path | None = None,
    quick: bool = False,
    links: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Cluster:
    """Measure this process's GPU; write the profile to `out` and return the cluster.

    `links` is the shipped profile that the collectives are taken from, by default that of the GPU's
    model. Raises UserError where there is no GPU, or no profile of its model.
    """
    if not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use", fix="use cpu")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: its folder does not exist", fix="make the folder")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    shipped = shipped_profile(links or profile_for(name))
    samples = measure_device(DeviceClock(device, CALLS[quick], report), QUICK if quick else FULL)
    memory = float(torch.cuda.get_device_properties(device).total_memory)
    version = torch.__version__.split("+")[0]
    source = f"autopar calibrate --device cuda: one {name}, torch {version}, CUDA {cuda_version()}"
    cluster = with_links(gpu_from_samples(samples, memory, source, shipped.device), shipped)
    if out is not None:
        save_profile(cluster, out)
    return cluster


def cuda_version() -> str:
    """Of the CUDA that torch was built with."""
    return str(torch.version.cuda or "unknown")


def profile_for(gpu: str) -> str:
    """The shipped profile of a GPU by its driver's name; raises UserError where there is none.

    "NVIDIA A100-SXM4-40GB" is `a100-40gb`, "NVIDIA H100 80GB HBM3" is `h100`.
    """
    words = gpu.lower().replace("-", " ").split()
    fitting = [n for n in shipped_profiles() if all(part in words for part in n.split("-"))]
    if not fitting:
        known = ", ".join(n for n in shipped_profiles() if "cpu" not in n)
        raise UserError(
            f"no shipped profile has the links of {gpu!r}, and one GPU cannot measure them",
            fix=f"say whose to take: --links with one of {known}",
        )
    return max(fitting, key=lambda n: len(n.split("-")))


def measure_device(clock: DeviceClock, amount: Amount) -> list[Sample]:
    """(key, flops or bytes, seconds) of everything, on the clock's device."""
    found: list[Sample] = []
    with clock.device, torch.no_grad():
        for work in device_work(amount):
            clock.report(work.key)
            found.append((work.key, work.x, clock(work.fn, work.times) / work.times))
            if work.key == "overhead":
                found.append(("host", 1.0, clock.host(work.fn) / work.times))
    return found


def gpu_from_samples(
    samples: Sequence[Sample], memory_bytes: float, source: str, shipped: Device
) -> Device:
    """The device's curves; the op overhead is taken out of every one of them.

    `shipped` gives what one GPU cannot measure: what collectives cost compute, and narrow products.
    """
    figures = {key: seconds for key, _, seconds in samples if key in ("overhead", "host")}
    optimizer = next((t for key, _, t in samples if key == "optimizer"), 0.0)
    overhead = figures["overhead"]
    rates: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for key, x, seconds in samples:
        family, _, name = key.partition(":")
        if name:
            rates[family][name].append((x, x / max(seconds - overhead, 0.2 * seconds)))
    bandwidth = _curves(rates.pop("bandwidth"), source)
    taken = f"not measured with one GPU; as the shipped {shipped.name}"
    told = f"{source}; the host queues an op in {figures.get('host', 0.0) * 1e6:.1f} us"
    return Device(
        shipped.name,
        memory_bytes,
        overhead,
        {family: _curves(points, source) for family, points in rates.items()},
        {**bandwidth, "default": bandwidth["pointwise"]},
        Curve(shipped.narrow.points, f"{taken}: {shipped.narrow.source}"),
        optimizer,
        0.0,  # rates are measured with the traffic of their products
        shipped.overlap_slowdown,
        {
            "memory_bytes": source,
            "op_overhead_s": told,
            "optimizer_overhead_s": source,
            "overlap_slowdown": f"{taken}: {shipped.sources.get('overlap_slowdown', '')}",
        },
    )


def _curves(points: Mapping[str, Iterable[tuple[float, float]]], source: str) -> dict[str, Curve]:
    return {name: Curve.of(smoothed(found), source) for name, found in points.items()}


def smoothed(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point per power of two of x: the median rate at the geometric mean.

    Products of alike flops and unlike shapes have unlike rates; a curve has one.
    """
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for x, y in points:
        bins[round(math.log2(x))].append((x, y))
    return [
        (
            math.exp(statistics.fmean(math.log(x) for x, _ in found)),
            statistics.median(y for _, y in found),
        )
        for found in bins.values()
    ]


def with_links(device: Device, shipped: Cluster) -> Cluster:
    """The shipped cluster with a measured device; its collectives say where they are from."""

    def level(of: Level) -> Level:
        curves = {
            kind: tuple(
                replace(c, bandwidth=Curve(c.bandwidth.points, _shipped(shipped, c.bandwidth)))
                for c in found
            )
            for kind, found in of.collectives.items()
        }
        return replace(of, collectives=curves)

    return replace(shipped, device=device, levels=tuple(map(level, shipped.levels)))


def _shipped(cluster: Cluster, curve: Curve) -> str:
    return f"not measured: shipped profile of {cluster.name}: {curve.source}"
