from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from autopar.cost.cluster import COLLECTIVE_KINDS, Cluster, CollectiveCurve, Level, parse_cluster
from autopar.cost.comm import (
    collective_bytes,
    collective_time,
    fit_collective,
    level_time,
    reshard_time,
    wire_bytes,
    wire_factor,
)
from autopar.cost.curve import Curve
from autopar.ir.lowered import COLLECTIVES


def plain(alpha: float = 0.0, bandwidth: float = 1e9, hosts: int = 1) -> Cluster:
    """A cluster whose every curve is constant, so that times can be worked out by hand."""

    def level(name: str, size: int, rate: float, latency: float) -> Level:
        curve = (CollectiveCurve(4, latency, Curve.constant(rate)),)
        return Level(name, size, dict.fromkeys(COLLECTIVE_KINDS, curve))

    levels = [level("host", 4, bandwidth, alpha)]
    if hosts > 1:
        levels.append(level("network", 4 * hosts, bandwidth / 10, 10 * alpha))
    return Cluster("plain", parse_cluster("8xH100").device, tuple(levels))


W = 4e9  # bytes of the whole tensor, 4 s at 1 GB/s


@pytest.mark.parametrize(
    ("kind", "nbytes", "seconds"),
    [
        ("all_reduce", W, 6.0),  # 2 * 3/4 of the tensor
        ("all_gather", W, 3.0),  # 3/4 of the *gathered output*, not of the shard
        ("reduce_scatter", W, 3.0),  # 3/4 of the *input*
        ("all_to_all", W / 4, 0.75),  # 3/4 of the *local* tensor
        ("broadcast", W, 4.0),
    ],
)
def test_byte_conventions(kind: str, nbytes: float, seconds: float) -> None:
    assert collective_time(plain(), kind, nbytes, (4,)) == pytest.approx(seconds)
    assert collective_bytes(kind, W, 4) == nbytes
    assert wire_bytes(kind, W, 4) == pytest.approx(seconds * 1e9)


def test_all_reduce_is_a_reduce_scatter_and_a_gather() -> None:
    cluster = plain()
    parts = [collective_time(cluster, k, W, (4,)) for k in ("reduce_scatter", "all_gather")]
    assert collective_time(cluster, "all_reduce", W, (4,)) == pytest.approx(sum(parts))


def test_lowered_collectives_pay_their_own_direction() -> None:
    cluster = plain()
    times = {n: reshard_time(cluster, c, W, (4,)) for n, c in COLLECTIVES.items()}
    assert times["pvary"] == (0, pytest.approx(6))
    assert times["psum"] == (pytest.approx(6), 0)
    assert times["gather_vary"] == (pytest.approx(3), pytest.approx(3))
    assert times["gather_inv"] == (pytest.approx(3), 0)
    assert times["scatter_sum"] == (pytest.approx(3), pytest.approx(3))
    assert times["slice_inv"] == (0, pytest.approx(3))
    assert times["slice_vary"] == (0, 0)
    assert times["swap"] == (pytest.approx(0.75), pytest.approx(0.75))
    assert times["keep_first"] == (0, 0)


def test_alone_nothing_is_sent() -> None:
    assert collective_time(plain(alpha=1.0), "all_reduce", W, (1,)) == 0
    assert np.array_equal(collective_time(plain(), "all_reduce", np.ones(3), (1, 1)), np.zeros(3))


def test_groups_pay_the_slower_level() -> None:
    cluster = plain(alpha=1.0, hosts=2)
    inside = collective_time(cluster, "all_gather", W, (4, 1))
    across = collective_time(cluster, "all_gather", W, (1, 2))
    both = collective_time(cluster, "all_gather", W, (4, 2))
    assert inside == pytest.approx(1 + 3)
    assert across == pytest.approx(5 + 0.5 * 40)  # alpha of 4 scaled by log2(2)/log2(4)
    # Each device fetches its quarter over the network: 0.5 * W / 4 at a tenth of the rate.
    assert both == pytest.approx(1 + 5 + max(3.0, 0.5 * 10))


@pytest.mark.parametrize("spec", ["cpu:4", "8xH100", "32x8xH100", "4x8xB200", "8xMI300X"])
@pytest.mark.parametrize("kind", COLLECTIVE_KINDS)
def test_more_bytes_never_take_less_time(spec: str, kind: str) -> None:
    cluster = parse_cluster(spec)
    sizes = np.geomspace(1e3, 1e9, 200)
    for span in spans(cluster):
        times = collective_time(cluster, kind, sizes, span)
        assert np.all(np.diff(times) >= -1e-3 * times[:-1]), (spec, kind, span)


def spans(cluster: Cluster) -> Iterator[tuple[int, ...]]:
    outer = (1,) * (len(cluster.levels) - 1)
    yield (2, *outer)
    yield (cluster.host_size, *outer)
    if outer:
        hosts = cluster.size // cluster.host_size
        yield (1, hosts)
        yield (cluster.host_size, hosts)


@pytest.mark.parametrize("spec", ["cpu:4", "8xH100", "2x8xH100"])
@pytest.mark.parametrize("kind", COLLECTIVE_KINDS)
def test_arrays_give_what_numbers_give(spec: str, kind: str) -> None:
    cluster = parse_cluster(spec)
    sizes = np.array([1.0, 1e3, 3e5, 7e7, 5e9])
    for span in spans(cluster):
        many = collective_time(cluster, kind, sizes, span)
        one = [collective_time(cluster, kind, float(size), span) for size in sizes]
        np.testing.assert_allclose(many, one, rtol=1e-12)


def test_group_sizes_between_measured_ones_lie_between() -> None:
    curves = (
        CollectiveCurve(2, 1.0, Curve.constant(1e9)),
        CollectiveCurve(8, 3.0, Curve.constant(1e9)),
    )
    level = Level("host", 16, {"all_gather": curves})
    alpha, transfer = level_time(level, "all_gather", 1e9, 4)
    assert alpha == pytest.approx(2.0)
    assert 0.5 < transfer < 7 / 8
    alpha, transfer = level_time(level, "all_gather", 1e9, 16)
    assert alpha == pytest.approx(4.0)
    assert transfer == pytest.approx(wire_factor("all_gather", 16))


def test_fit_gives_back_the_measured_times_without_their_spikes() -> None:
    measured = [(1e3, 1e-3), (1e5, 9e-3), (1e6, 2e-3), (1e8, 0.1)]
    level = Level("host", 4, {"all_gather": (fit_collective("all_gather", 4, measured, "test"),)})
    for nbytes, seconds in [(1e3, 1e-3), (1e5, 2e-3), (1e6, 2e-3), (1e8, 0.1)]:
        assert sum(level_time(level, "all_gather", nbytes, 4)) == pytest.approx(seconds)


def test_h100_ring_over_hosts_matches_its_source() -> None:
    """nccl_model_constants: AG/RS, 4 nodes x 8, Simple: 145.6 us + bytes / 396.4 GB/s."""
    cluster = parse_cluster("4x8xH100")
    time = collective_time(cluster, "all_gather", 4e9, (8, 4))
    assert time == pytest.approx(145.6e-6 + 4e9 / 396.4e9, rel=0.15)


def test_levels_of_cpu_ranks_follow_each_other() -> None:
    cluster = parse_cluster("2xcpu:2")
    inside = collective_time(cluster, "all_gather", 1e8, (2, 1))
    across = collective_time(cluster, "all_gather", 0.5e8, (1, 2))
    assert collective_time(cluster, "all_gather", 1e8, (2, 2)) == pytest.approx(inside + across)
    # A link of 1 Gbit/s carries half of what each of the two ranks of a host needs for it.
    assert across == pytest.approx(1e-3 + 0.5e8 / (1e9 / 8 * 1448 / 1538), rel=1e-6)
