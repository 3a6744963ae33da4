"""Formulas from the price functions themselves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import sympy

from autopar.cost.cluster import parse_cluster
from autopar.cost.comm import wire_bytes
from autopar.cost.compute import LocalOp, TensorSpec, backward_time, forward_time
from autopar.cost.evaluate import Settings, compiled
from autopar.cost.formula import (
    Traced,
    axis_size,
    ceil,
    collective,
    expression,
    formula_text,
    local_size,
    sent_bytes,
    split_size,
    symbolic_device,
)
from autopar.errors import PassError
from autopar.ir.sharding import Split

B = sympy.Symbol("b", integer=True, positive=True)
CPU = parse_cluster("cpu:4")


def linear(rows: object, columns: object) -> LocalOp:
    weight = TensorSpec((columns, 256))
    return LocalOp(
        "linear", (TensorSpec((rows, 64, 256)), weight), (TensorSpec((rows, 64, columns)),)
    )


def attention(rows: object, heads: object) -> LocalOp:
    shape = (rows, heads, 64, 32)
    return LocalOp(
        "scaled_dot_product_attention",
        (TensorSpec(shape),) * 3,
        (TensorSpec(shape),),
        info={"causal": True, "rows": 64},
    )


def gelu(rows: object, columns: object) -> LocalOp:
    return LocalOp("gelu", (TensorSpec((rows, columns)),), (TensorSpec((rows, columns)),))


def test_formulas_are_the_prices() -> None:
    rows = Traced.of(split_size(B, ("dp",)), 16)
    columns = Traced.of(local_size(512, Split(("tp",))), 256)
    asked = list(itertools.product((linear, attention, gelu), (forward_time, backward_time)))
    made = [expression(time(symbolic_device(CPU.device), op(rows, columns))) for op, time in asked]
    places = list(itertools.product((1, 6, 64, 509), (1, 2, 8), (1, 2, 3)))
    batch, dp, tp = zip(*places, strict=True)
    found = compiled(made, CPU)(Settings({"b": batch}, {"dp": dp, "tp": tp}))
    want = [
        [
            float(time(CPU.device_for(d * t), op(math.ceil(b / d), math.ceil(512 / t))))
            for b, d, t in places
        ]
        for op, time in asked
    ]
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_a_formula_reads_well() -> None:
    rows = Traced.of(split_size(B, ("dp",)), 16)
    formula = forward_time(symbolic_device(CPU.device), linear(rows, 512))
    text = formula_text(expression(formula), {B: 64, axis_size("dp"): 4})
    assert text.splitlines() == [
        "x0 = b/n_dp",
        "x1 = 16777216*x0/narrow(min(64*x0, 256))",
        "x2 = x1/rate_matmul_float32(x1)",
        "x3 = 196608*x0 + 524288",
        "x4 = x3/bandwidth_matmul(x3)",
        "op_overhead_s + serial_traffic*min(x2, x4) + max(x2, x4)",
    ]
    uneven = formula_text(split_size(B, ("dp",)), {B: 62, axis_size("dp"): 4})
    assert uneven == "ceil(b/n_dp)"


def test_splits_with_a_layout_are_whole_units() -> None:
    strided = local_size(96, Split(("tp",), outer=3, block=4))
    found = compiled([sympy.sympify(strided)], CPU)(Settings({}, {"tp": [1, 2, 3, 8]}))
    assert found[0].tolist() == [96, 48, 36, 12]


@pytest.mark.parametrize(
    "kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]
)
def test_sent_bytes_are_those_of_the_reports(kind: str) -> None:
    formula = sent_bytes(kind, sympy.Integer(4096), "tp")
    found = compiled([formula], CPU)(Settings({}, {"tp": [2, 4, 8]}))[0]
    assert found.tolist() == [wire_bytes(kind, 4096, n) for n in (2, 4, 8)]


def test_what_cannot_be_traced_is_refused() -> None:
    size = Traced.of(B, 8)
    with pytest.raises(PassError, match=r"no formula of numpy\.sin"):
        np.sin(size)
    with pytest.raises(PassError, match=r"no formula of numpy\.concatenate"):
        np.concatenate([size])
    with pytest.raises(TypeError):
        math.log2(size)


def test_comparisons_are_decided_at_the_captured_sizes() -> None:
    size = Traced.of(B, 8)
    assert np.greater(size, 4) == 1
    assert (size > 9) == 0
    assert np.maximum(size, 1).expr == B
    assert np.minimum(np.minimum(size, 64), 32).expr == sympy.Function("min")(B, 32)


def test_names() -> None:
    x = sympy.Symbol("x")
    assert str(collective("all_gather", x, "tp")) == "all_gather(x, tp)"
    assert str(collective("all_gather", x, "tp", bucketed=True)) == "all_gather_bucketed(x, tp)"
    assert str(ceil(x)) == "ceil(x)"
