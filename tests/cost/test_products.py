"""Products: several in one einsum, and traffic that arithmetic does not hide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sympy

from autopar.cost.cluster import Device
from autopar.cost.compute import (
    LocalOp,
    TensorSpec,
    backward_time,
    forward_time,
    op_flops,
    optimizer_time,
)
from autopar.cost.curve import Curve
from autopar.cost.flops import contractions

DEVICE = Device(
    "plain",
    1e9,
    0.0,
    {"matmul": {"float32": Curve.constant(1e9)}},
    {"default": Curve.constant(1e6)},
)


def einsum(equation: str, *shapes: tuple[int, ...], out: tuple[int, ...]) -> LocalOp:
    specs = tuple(map(TensorSpec, shapes))
    return LocalOp("einsum", specs, (TensorSpec(out),), info={"equation": equation})


def test_an_einsum_of_three_runs_as_two_products() -> None:
    op = einsum("eth,ehd,te->td", (4, 8, 16), (4, 16, 32), (8, 4), out=(8, 32))
    first, second = contractions(op)
    assert first.info["equation"] == "eth,ehd->etd"
    assert first.outputs[0].shape == (4, 8, 32)
    assert second.info["equation"] == "etd,te->td"
    assert op_flops(op) == 2 * (4 * 8 * 16 * 32) + 2 * (4 * 8 * 32)
    assert forward_time(DEVICE, op) == forward_time(DEVICE, first) + forward_time(DEVICE, second)
    assert backward_time(DEVICE, op) == backward_time(DEVICE, first) + backward_time(DEVICE, second)


def test_gradients_flow_only_where_they_are_wanted() -> None:
    op = einsum("ab,bc,cd->ad", (4, 4), (4, 4), (4, 4), out=(4, 4))
    first, second = contractions(replace(op, grads=(False, False, True)))
    assert (first.grads, second.grads) == ((False, False), (False, True))


def test_dims_under_dots_are_dims_of_every_product() -> None:
    op = einsum("...a,ab,bc->...c", (5, 6, 2), (2, 3), (3, 4), out=(5, 6, 4))
    assert [pair.outputs[0].shape for pair in contractions(op)] == [(5, 6, 3), (5, 6, 4)]
    assert op_flops(op) == 2 * 30 * (2 * 3 + 3 * 4)


def test_sizes_may_be_symbols_or_candidates() -> None:
    b = sympy.Symbol("b", positive=True)
    whole = einsum("ab,bc,cd->ad", (b, 4), (4, 4), (4, 2), out=(b, 2))
    assert op_flops(whole).subs(b, 8) == 2 * 8 * (4 * 4 + 4 * 2)
    sizes = np.array([8, 16])
    many = einsum("ab,bc,cd->ad", (sizes, 4), (4, 4), (4, 2), out=(sizes, 2))
    assert forward_time(DEVICE, many).shape == (2,)


@pytest.mark.parametrize("serial", [0.0, 0.5, 1.0])
def test_a_product_pays_for_traffic_that_it_does_not_hide(serial: float) -> None:
    device = replace(DEVICE, serial_traffic=serial)
    op = LocalOp("mm", (TensorSpec((64, 64)),) * 2, (TensorSpec((64, 64)),))
    arithmetic_s, traffic_s = 2 * 64**3 / 1e9, 3 * 4 * 64**2 / 1e6
    longer, shorter = max(arithmetic_s, traffic_s), min(arithmetic_s, traffic_s)
    assert forward_time(device, op) == pytest.approx(longer + serial * shorter)


def test_an_update_costs_something_for_the_smallest_parameter() -> None:
    device = replace(DEVICE, optimizer_overhead_s=1e-4)
    assert optimizer_time(device, 1.0) == pytest.approx(1e-4 + 7 * 4 / 1e6)
    assert optimizer_time(device, 1.0, kind="none") == 0.0
