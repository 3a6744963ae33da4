"""Formulas at many settings at once."""

from __future__ import annotations

import numpy as np
import pytest
import sympy

from autopar.cost.cluster import group_span, make_mesh, parse_cluster
from autopar.cost.comm import collective_bytes, collective_time
from autopar.cost.evaluate import CHUNK, Settings, compiled, with_bandwidth
from autopar.cost.formula import collective
from autopar.errors import PassError

PODS = parse_cluster("4x8xH100")
CPU = parse_cluster("cpu:4")
B = sympy.Symbol("b", integer=True, positive=True)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def test_collectives_cost_what_they_cost_on_every_mesh() -> None:
    shapes = [(1, 1), (2, 2), (4, 8), (8, 4), (16, 2), (2, 16), (32, 1)]
    batch = np.arange(1, len(shapes) + 1) * 1000
    axes = {"dp": [dp for dp, _ in shapes], "tp": [tp for _, tp in shapes]}
    formulas = [collective(kind, 64 * B, axis) for kind in KINDS for axis in axes]
    found = compiled(formulas, PODS)(Settings({"b": batch}, axes))
    want = []
    for kind in KINDS:
        for axis in axes:
            row = []
            for (dp, tp), b in zip(shapes, batch, strict=True):
                span = group_span(PODS, make_mesh(PODS, {"dp": dp, "tp": tp}), (axis,))
                nbytes = collective_bytes(kind, 64.0 * b, int(np.prod(span)))
                row.append(float(collective_time(PODS, kind, nbytes, span)))
            want.append(row)
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_bandwidth_scales_transfers_and_not_latencies() -> None:
    formula = collective("all_reduce", B, "dp")
    settings = Settings(
        {"b": [1e3, 1e9, 1e9, 1e9]},
        {"dp": [4, 4, 16, 16]},
        {"host": [2.0, 2.0, 1.0, 0.5], "network": [1.0, 3.0, 3.0, 3.0]},
    )
    found = compiled([formula], PODS)(settings)[0]
    for i, seconds in enumerate(found):
        factors = {name: float(np.asarray(v)[i]) for name, v in settings.bandwidth.items()}
        scaled = with_bandwidth(PODS, factors)
        n, b = int(np.asarray(settings.axes["dp"])[i]), float(np.asarray(settings.sizes["b"])[i])
        span = group_span(scaled, make_mesh(scaled, {"dp": n}), ("dp",))
        assert seconds == pytest.approx(float(collective_time(scaled, "all_reduce", b, span)))
    slow = with_bandwidth(PODS, {"host": 0.5})
    once, twice = (float(collective_time(c, "all_reduce", 1e9, (4,))) for c in (PODS, slow))
    empty = float(collective_time(PODS, "all_reduce", 1e-6, (4,)))
    assert twice - empty == pytest.approx(2 * (once - empty), rel=1e-6)


def test_small_messages_pay_their_share_of_a_bucket() -> None:
    bucket = 2.0**20
    formula = collective("all_gather", B, "dp", bucketed=True)
    sizes = [64.0, bucket / 2, bucket, 4 * bucket]
    found = compiled([formula], CPU, bucket)(Settings({"b": sizes}, {"dp": 4}))[0]
    full = [float(collective_time(CPU, "all_gather", max(n, bucket), (4,))) for n in sizes]
    np.testing.assert_allclose(
        found, [f * min(n / bucket, 1) for f, n in zip(full, sizes, strict=True)]
    )


def test_a_mesh_of_one_runs_on_the_single_device() -> None:
    assert CPU.single is not None
    x = sympy.Function("bandwidth_pointwise")(B)
    found = compiled([x], CPU)(Settings({"b": [2e6, 2e6]}, {"dp": [1, 4]}))[0]
    want = [d.bandwidth_curve("pointwise")(2e6) for d in (CPU.single, CPU.device)]
    np.testing.assert_allclose(found, want)


def test_chunks_and_broadcasting() -> None:
    n = 2 * CHUNK + 5
    sizes = np.arange(1, n + 1)
    found = compiled([B + 1, sympy.Integer(7)], CPU)(Settings({"b": sizes}, {"dp": 2}))
    assert found.shape == (2, n)
    assert (found[0] == sizes + 1).all() and (found[1] == 7).all()


def test_a_size_without_a_value_is_our_error() -> None:
    with pytest.raises(PassError, match="b has no value"):
        compiled([B], CPU)(Settings({}, {"dp": 2}))
