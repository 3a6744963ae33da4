"""Times of kernels, counted by hand."""

from __future__ import annotations

import pytest

from autopar.cost.cluster import Device, parse_cluster
from autopar.cost.curve import Curve
from autopar.cost.kernels import (
    Forms,
    adamw_forms,
    cross_entropy_forms,
    dropout_forms,
    form_times,
    int8_times,
    pack_forms,
    permute_forms,
)

DEVICE = Device(
    "toy", 1e9, 2.0, {"matmul": {"float32": Curve.constant(1.0)}}, {"default": Curve.constant(10.0)}
)


def test_a_launch_takes_its_overhead_and_its_bytes() -> None:
    assert form_times(DEVICE, "pack", Forms((40.0,), (20.0, 20.0))) == (2 + 4, 2 * 2 + 4)


def test_dropout_reads_and_writes_once_each_way_and_keeps_no_mask() -> None:
    plain = dropout_forms(100, 2, dims=3)
    assert plain.fused == (400, 400)
    assert plain.saved_bytes == 100
    # zeros, an index per dim, the hash, the comparison; to, mul_, mul_ each way
    assert len(plain.unfused) == 1 + 3 + 17 + 1 + 3 + 3
    residual = dropout_forms(100, 2, dims=3, after=1)
    assert residual.fused == (600, 600)
    assert len(residual.unfused) == len(plain.unfused) + 2
    read_again = dropout_forms(100, 2, dims=3, before=0, reads_inputs=True)
    assert read_again.fused == (400, 600)


def test_cross_entropy_reads_the_logits_once_and_writes_their_gradient() -> None:
    for divided in (True, False):
        made = cross_entropy_forms(4, 1000, 2, divided, in_place=True)
        assert made.fused == pytest.approx((8000, 16000), rel=0.01)
        assert sum(made.unfused) > 1.3 * sum(made.fused)
        assert made.saved_bytes == 8000
    kept = cross_entropy_forms(4, 1000, 2, True, in_place=False)
    assert kept.saved_bytes == 0
    cast = cross_entropy_forms(4, 1000, 2, True, True, prologue=True, wide_itemsize=4)
    assert cast.fused == made.fused
    assert cast.saved_bytes == 8000 + 16000


def test_packing_is_one_launch_where_torch_needs_some() -> None:
    many = pack_forms([100.0] * 130, 4, joins=False)
    assert (len(many.fused), len(many.unfused)) == (1, 3)
    assert sum(many.fused) == sum(many.unfused) == pytest.approx(2 * 4 * 130 * 100)
    assert len(pack_forms([100.0] * 130, 4, joins=True).unfused) == 130
    assert len(pack_forms([65536.0 * 640], 4, joins=False).unfused) == 2  # by its chunks


def test_adamw_is_one_launch() -> None:
    made = adamw_forms([10.0] * 73, 4)
    assert sum(made.fused) == sum(made.unfused) == pytest.approx(7 * 4 * 730)
    assert (len(made.fused), len(made.unfused)) == (1, 3)


def test_permute_moves_rows_once() -> None:
    made = permute_forms(10, 8, 4, scatters=True)
    assert made.fused == (640, 640)
    assert sum(made.unfused) == 2 * (640 + 640 + 320)


def test_int8_pays_between_hosts_and_not_inside_of_one() -> None:
    between = int8_times(parse_cluster("2x8xH100"), (1, 2), 1e8, 4, scatters=False)
    assert between[0] < between[1]
    inside = int8_times(parse_cluster("2xH100"), (2,), 1e4, 2, scatters=True)
    assert inside[0] > inside[1]
