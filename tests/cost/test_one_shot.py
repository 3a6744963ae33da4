"""The all-reduce in one step wins with small messages inside a host, and nowhere else."""

from __future__ import annotations

import math

import pytest

from autopar.cost.cluster import parse_cluster
from autopar.cost.comm import collective_time
from autopar.cost.one_shot import MOST_BYTES, all_reduce_norm_times, one_shot_time_s
from autopar.runtime.kernels import all_reduce_norm as kernel


def test_limits_are_the_kernels() -> None:
    assert MOST_BYTES == kernel.PROGRAMS * kernel.REGION_BYTES
    cluster = parse_cluster("2x8xH100")
    assert one_shot_time_s(cluster, MOST_BYTES, (8, 1)) < math.inf
    assert one_shot_time_s(cluster, MOST_BYTES + 1, (8, 1)) == math.inf
    assert one_shot_time_s(cluster, 1024, (8, 2)) == math.inf  # over two hosts
    assert one_shot_time_s(cluster, 1024, (1, 2)) == math.inf
    assert one_shot_time_s(cluster, 1024, (1, 1)) == 0.0


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_member_gets_the_others_whole_messages(ranks: int) -> None:
    """The bytes of an all-to-all in which every pair has a message, at the latency of one pair."""
    cluster = parse_cluster("8xH100")

    def exchanged(nbytes: int) -> float:
        return float(collective_time(cluster, "all_to_all", nbytes * ranks, (ranks,)))

    def shot(nbytes: int) -> float:
        return one_shot_time_s(cluster, nbytes, (ranks,))

    assert shot(1 << 22) - shot(1 << 10) == pytest.approx(exchanged(1 << 22) - exchanged(1 << 10))
    assert shot(0) == pytest.approx(one_shot_time_s(cluster, 0, (2,)))


def test_one_launch_instead_of_three_until_bytes_rule() -> None:
    cluster = parse_cluster("8xH100")

    def gain(elements: int, trained: bool) -> float:
        fused, unfused = all_reduce_norm_times(cluster, elements, 2, (8,), trained)
        return unfused - fused

    assert gain(4096, False) > 0
    assert gain(1 << 21, False) < gain(4096, False)
    assert gain(1 << 21, False) < 0
    # The backward is in torch, of more launches than those that it stands for.
    assert gain(4096, True) < gain(4096, False)
    fused, unfused = all_reduce_norm_times(cluster, 1 << 24, 2, (8,), False)
    assert fused == math.inf > unfused
