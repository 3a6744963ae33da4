from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autopar.cost.cluster import Device, parse_cluster
from autopar.cost.compute import (
    LocalOp,
    TensorSpec,
    accumulate_time,
    backward_bytes,
    backward_time,
    forward_time,
    local_op,
    op_bytes,
    op_flops,
    optimizer_time,
)
from autopar.cost.curve import Curve
from autopar.cost.families import op_family, op_name
from autopar.ir.graph import Value

T = torch.randn


def spec(*shape: Any, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(shape, dtype)


def linear(m: Any, k: Any, n: Any, **kwargs: Any) -> LocalOp:
    return LocalOp("linear", (spec(m, k), spec(n, k)), (spec(m, n),), **kwargs)


def plain() -> Device:
    """1 Tflop/s, 100 GB/s, no overhead."""
    rate, bandwidth = Curve.constant(1e12), Curve.constant(1e11)
    return Device("plain", 1e9, 1e-12, {"matmul": {"float32": rate}}, {"default": bandwidth})


REAL_OPS = [
    ("linear", F.linear, (T(3, 5, 7), T(11, 7), T(11)), {}),
    ("mm", torch.mm, (T(3, 5), T(5, 7)), {}),
    ("addmm", torch.addmm, (T(7), T(3, 5), T(5, 7)), {}),
    ("bmm", torch.bmm, (T(2, 3, 5), T(2, 5, 7)), {}),
    ("baddbmm", torch.baddbmm, (T(2, 3, 7), T(2, 3, 5), T(2, 5, 7)), {}),
    ("matmul", torch.matmul, (T(2, 3, 5), T(5, 7)), {}),
    ("matmul", torch.matmul, (T(4, 2, 3, 5), T(4, 2, 5, 7)), {}),
    ("convolution", F.conv2d, (T(2, 6, 9, 9), T(8, 6, 3, 3)), {}),
    ("conv2d", F.conv2d, (T(2, 6, 9, 9), T(8, 3, 3, 3)), {"groups": 2, "stride": 2}),
    ("conv_transpose2d", F.conv_transpose2d, (T(2, 6, 9, 9), T(6, 8, 3, 3)), {"stride": 2}),
    (
        "scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        (T(2, 4, 6, 8), T(2, 4, 5, 8), T(2, 4, 5, 8)),
        {},
    ),
]


@pytest.mark.parametrize(("name", "fn", "args", "kwargs"), REAL_OPS)
def test_flops_are_those_torch_counts(name: str, fn: Any, args: Any, kwargs: Any) -> None:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = fn(*args, **kwargs)
    op = LocalOp(name, tuple(spec(*a.shape) for a in args), (spec(*out.shape),), info=kwargs)
    assert op_flops(op) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", ((2, 3, 5), (2, 5, 7))),
        ("bqhd,bkhd->bhqk", ((2, 3, 4, 5), (2, 6, 4, 5))),
        ("...i,ij->...j", ((2, 3, 5), (5, 7))),
    ],
)
def test_einsum_flops(equation: str, shapes: Any) -> None:
    args = [T(*shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        out = torch.einsum(equation, *args)
    op = LocalOp(
        "einsum",
        tuple(spec(*s) for s in shapes),
        (spec(*out.shape),),
        info={"equation": equation},
    )
    assert op_flops(op) == counter.get_total_flops()


def test_backward_of_a_matmul_is_a_product_per_operand() -> None:
    once = forward_time(plain(), linear(512, 512, 512))
    for grads, products in (((True, True), 2), ((False, True), 1), ((False, False), 0)):
        assert backward_time(plain(), linear(512, 512, 512, grads=grads)) == pytest.approx(
            products * once
        )


def test_roofline() -> None:
    device = plain()
    big = linear(4096, 4096, 4096)
    assert forward_time(device, big) == pytest.approx(2 * 4096**3 / 1e12, rel=1e-6)
    skinny = linear(8, 4096, 16384)
    assert forward_time(device, skinny) == pytest.approx(op_bytes(skinny) / 1e11, rel=1e-6)


def test_views_are_free_and_pointwise_pays_bytes() -> None:
    device = plain()
    x = spec(1000, 1000)
    assert forward_time(device, LocalOp("transpose", (x,), (x,))) == 0
    add = LocalOp("add", (x, x), (x,), (True, True))
    assert op_bytes(add) == 12e6
    assert forward_time(device, add) == pytest.approx(12e6 / 1e11, rel=1e-3)
    assert backward_time(device, add) == 0  # the gradient passes through
    assert backward_time(device, LocalOp("gelu", (x,), (x,))) == pytest.approx(1.2e-4, rel=1e-3)
    bias = LocalOp("add", (x, spec(1000)), (x,), (True, True))
    assert backward_time(device, bias) == pytest.approx(4.004e6 / 1e11, rel=1e-3)


def test_embedding_gradient_is_dense() -> None:
    ids = spec(256, dtype=torch.int64)
    op = LocalOp("embedding", (spec(1_000_000, 64), ids), (spec(256, 64),), (True, False))
    assert op_bytes(op) < 1e6
    assert backward_bytes(op) > 256e6  # the whole local table is zero-filled
    half = LocalOp("embedding", (spec(500_000, 64), ids), (spec(256, 64),), (True, False))
    assert backward_time(plain(), half) == pytest.approx(backward_time(plain(), op) / 2, rel=1e-2)


def test_dropout_that_drops_nothing_is_free() -> None:
    x = spec(1000, 1000)
    for info in ({"p": 0.0}, {"p": 0.5, "training": False}):
        assert forward_time(plain(), LocalOp("dropout", (x,), (x,), info=info)) == 0
    assert forward_time(plain(), LocalOp("dropout", (x,), (x,), info={"p": 0.5})) > 0


def test_optimizer_is_memory_traffic() -> None:
    device = plain()
    assert optimizer_time(device, 1e6) == pytest.approx(28e6 / 1e11)
    assert optimizer_time(device, 1e6, kind="sgd") == pytest.approx(12e6 / 1e11)
    assert optimizer_time(device, 1e6, torch.bfloat16) == pytest.approx(14e6 / 1e11)
    assert accumulate_time(device, 1e6) == pytest.approx(3e6 / 1e11, rel=1e-6)


CANDIDATES = np.array([1, 2, 8, 100, 4096])


def vector_ops(m: Any) -> list[LocalOp]:
    x = spec(m, 512)
    return [
        linear(m, 512, 512, grads=(True, True)),
        LocalOp("linear", (x, spec(2048, 512), spec(2048)), (spec(m, 2048),)),
        LocalOp("gelu", (x,), (x,)),
        LocalOp("add", (x, spec(1, 512)), (x,)),
        LocalOp("slice", (spec(2 * m, 512),), (x,)),
        LocalOp("expand", (spec(1, 512),), (x,)),
        LocalOp("layer_norm", (x, spec(512), spec(512)), (x,)),
        LocalOp("embedding", (spec(m, 64), spec(32, dtype=torch.int64)), (spec(32, 64),)),
        LocalOp("convolution", (spec(m, 3, 8, 8), spec(16, 3, 3, 3)), (spec(m, 16, 8, 8),)),
        LocalOp(
            "scaled_dot_product_attention",
            (spec(m, 8, 64, 32),) * 3,
            (spec(m, 8, 64, 32),),
            info={"causal": True},
        ),
        LocalOp("cross_entropy", (x, spec(m, dtype=torch.int64)), (spec(),)),
        LocalOp("dropout", (x,), (x,), info={"p": 0.1}),
        LocalOp(
            "einsum",
            (spec(m, 8, 64), spec(m, 64, 32)),
            (spec(m, 8, 32),),
            info={"equation": "bij,bjk->bik"},
        ),
    ]


@pytest.mark.parametrize("i", range(len(vector_ops(1))))
@pytest.mark.parametrize("where", ["cpu:4", "8xH100"])
def test_arrays_of_candidates_give_what_numbers_give(i: int, where: str) -> None:
    device = parse_cluster(where).device
    for time in (forward_time, backward_time):
        many = np.broadcast_to(time(device, vector_ops(CANDIDATES)[i]), CANDIDATES.shape)
        one = [time(device, vector_ops(int(m))[i]) for m in CANDIDATES]
        np.testing.assert_allclose(many, one, rtol=1e-12)


@pytest.mark.parametrize("i", range(len(vector_ops(1))))
def test_flops_and_bytes_take_symbols(i: int) -> None:
    m = sympy.Symbol("m", positive=True, integer=True)
    for size in (op_flops, op_bytes):
        symbolic = sympy.sympify(size(vector_ops(m)[i]))
        assert symbolic.subs(m, 96) == size(vector_ops(96)[i])


@pytest.mark.parametrize("where", ["cpu:4", "8xH100", "8xV100", "8xB200", "8xMI300X"])
def test_more_rows_take_more_time(where: str) -> None:
    device = parse_cluster(where).device
    rows = 2 ** np.arange(3, 15)
    for op in vector_ops(rows):
        times = np.broadcast_to(forward_time(device, op), rows.shape)
        assert np.all(np.diff(times) >= -0.25 * times[:-1]), op.name
        assert times[-1] >= times[0]


def test_names() -> None:
    aten = torch.ops.aten
    assert op_name(aten.linear.default) == "linear"
    assert op_name(aten.add_.Tensor) == "add"
    assert op_name(F.gelu) == "gelu"
    assert op_family(op_name(aten._softmax.default)) == "softmax"
    assert op_family(op_name(aten.convolution.default)) == "conv"
    assert op_family("never_heard_of") == "pointwise"


def test_an_op_is_read_from_a_graph_node() -> None:
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    x.meta["value"] = Value((16, 64), torch.float32)
    w.meta["value"] = Value((32, 64), torch.float32, requires_grad=True)
    node = graph.call_function(torch.ops.aten.linear.default, (x, w))
    node.meta["value"] = Value((16, 32), torch.float32, requires_grad=True)
    op = local_op(node)
    assert (op.name, op.grads, op_flops(op)) == ("linear", (False, True), 2 * 16 * 64 * 32)
    local = local_op(node, [(4, 64), (32, 64)], [(4, 32)])
    assert op_flops(local) * 4 == op_flops(op)
    drop = graph.call_function(torch.ops.aten.dropout.default, (x, 0.0, True))
    drop.meta["value"] = x.meta["value"]
    assert dict(local_op(drop).info) == {"p": 0.0, "training": True}


@pytest.mark.parametrize(("parts", "share"), [(1, 1 / 2), (2, 3 / 4), (4, 7 / 8)])
def test_split_causal_rows_cost_what_the_last_device_does(parts: int, share: float) -> None:
    """Of n devices the last one sees all keys but half of those at its own rows: 1 - 1/2n."""
    q, k = spec(1, 4, 4096 // parts, 64), spec(1, 4, 4096, 64)
    times = [
        time(
            plain(),
            LocalOp(
                "scaled_dot_product_attention",
                (q, k, k),
                (q,),
                info={"causal": causal, "rows": 4096},
            ),
        )
        for time in (forward_time, backward_time)
        for causal in (True, False)
    ]
    assert times[0] == pytest.approx(share * times[1])
    assert times[2] == pytest.approx(share * times[3])
