from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F

from autopar.cost.compute import LocalOp, TensorSpec
from autopar.cost.memory import optimizer_state_bytes, saved, saved_bytes, state_bytes

T = torch.randn


def measured_saved_bytes(out: Any, leaves: list[torch.Tensor], kept: list[torch.Tensor]) -> int:
    """Bytes of distinct tensors in `kept` that are not parameters."""
    parameters = {t.untyped_storage().data_ptr() for t in leaves if getattr(t, "parameter", False)}
    seen: dict[int, int] = {}
    for tensor in kept:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.numel():
            seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), tensor.nbytes)
    return sum(seen.values())


def param(*shape: int) -> torch.Tensor:
    tensor = T(*shape).requires_grad_()
    tensor.parameter = True  # type: ignore[attr-defined]
    return tensor


def x(*shape: int) -> torch.Tensor:
    # Not a leaf, as in a model: leaves and what lives anyway are saved alike.
    return T(*shape).requires_grad_() * 1.0


IDS = torch.randint(0, 50, (64, 32))
MASK = torch.rand(64, 128) > 0.5

CASES: list[tuple[str, Any, tuple[torch.Tensor, ...], dict[str, Any]]] = [
    ("linear", F.linear, (x(64, 128), param(256, 128), param(256)), {}),
    ("mm", torch.mm, (x(64, 128), x(128, 32)), {}),
    ("addmm", torch.addmm, (param(32), x(64, 128), param(128, 32)), {}),
    ("bmm", torch.bmm, (x(8, 64, 32), x(8, 32, 64)), {}),
    ("add", torch.add, (x(64, 128), x(64, 128)), {}),
    ("sub", torch.sub, (x(64, 128), x(64, 128)), {}),
    ("mul", torch.mul, (x(64, 128), x(64, 128)), {}),
    ("mul", torch.mul, (x(64, 128), T(64, 128)), {}),
    ("div", torch.div, (x(64, 128), x(64, 128)), {}),
    ("relu", F.relu, (x(64, 128),), {}),
    ("gelu", F.gelu, (x(64, 128),), {}),
    ("silu", F.silu, (x(64, 128),), {}),
    ("tanh", torch.tanh, (x(64, 128),), {}),
    ("sigmoid", torch.sigmoid, (x(64, 128),), {}),
    ("exp", torch.exp, (x(64, 128),), {}),
    ("rsqrt", torch.rsqrt, (x(64, 128).abs() + 1,), {}),
    ("sin", torch.sin, (x(64, 128),), {}),
    ("softmax", lambda a: torch.softmax(a, -1), (x(64, 128),), {}),
    ("log_softmax", lambda a: torch.log_softmax(a, -1), (x(64, 128),), {}),
    ("transpose", lambda a: a.transpose(0, 1), (x(64, 128),), {}),
    ("view", lambda a: a.view(-1), (x(64, 128),), {}),
    ("clone", torch.clone, (x(64, 128),), {}),
    ("sum", lambda a: a.sum(0), (x(64, 128),), {}),
    ("mean", lambda a: a.mean(0), (x(64, 128),), {}),
    (
        "layer_norm",
        lambda a, w, b: F.layer_norm(a, (128,), w, b),
        (x(64, 128), param(128), param(128)),
        {},
    ),
    ("convolution", F.conv2d, (x(4, 8, 16, 16), param(16, 8, 3, 3)), {}),
    (
        "batch_norm",
        lambda a, w, b: F.batch_norm(a, None, None, w, b, training=True),
        (x(4, 16, 8, 8), param(16), param(16)),
        {},
    ),
    ("max_pool2d", lambda a: F.max_pool2d(a, 2), (x(4, 16, 8, 8),), {}),
    ("embedding", lambda w, i: F.embedding(i, w), (param(50, 32), IDS), {}),
    ("where", lambda m, a, b: torch.where(m, a, b), (MASK, x(64, 128), x(64, 128)), {}),
    ("masked_fill", lambda a, m: a.masked_fill(m, 0.0), (x(64, 128), MASK), {}),
    (
        "scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        (x(2, 4, 32, 16), x(2, 4, 32, 16), x(2, 4, 32, 16)),
        {},
    ),
    ("cross_entropy", F.cross_entropy, (x(64, 1000), torch.randint(0, 1000, (64,))), {}),
    ("cat", lambda a, b: torch.cat([a, b]), (x(64, 128), x(64, 128)), {}),
    ("maximum", torch.maximum, (x(64, 128), x(64, 128)), {}),
    ("pow", lambda a: a.pow(3), (x(64, 128),), {}),
    ("einsum", lambda a: torch.einsum("abb->ab", a), (x(64, 8, 8),), {"equation": "abb->ab"}),
    ("amax", lambda a: a.amax(-1), (x(64, 128),), {}),
]


@pytest.mark.parametrize(("name", "fn", "args", "info"), CASES)
def test_saved_bytes_are_those_autograd_saves(name: str, fn: Any, args: Any, info: Any) -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn(*args)
    measured = measured_saved_bytes(out, list(args), kept)
    op = LocalOp(
        name,
        tuple(TensorSpec(tuple(a.shape), a.dtype) for a in args),
        (TensorSpec(tuple(out.shape), out.dtype),),
        tuple(a.requires_grad for a in args),
        info,
    )
    free = [i for i, a in enumerate(args) if getattr(a, "parameter", False)]
    predicted = saved_bytes(op, free)
    # Scalars such as the total weight of a cross-entropy are not worth a formula.
    assert predicted == pytest.approx(measured, abs=64), (predicted, measured)


def test_no_gradient_nothing_kept() -> None:
    t = TensorSpec((8, 8))
    op = LocalOp("mul", (t, t), (t,), (False, False))
    assert saved_bytes(op) == 0


def test_frozen_weight_keeps_no_input() -> None:
    op = LocalOp(
        "linear", (TensorSpec((8, 8)), TensorSpec((8, 8))), (TensorSpec((8, 8)),), (True, False)
    )
    assert saved(op).inputs == (1,)


def test_our_dropout_keeps_a_byte_per_element() -> None:
    t = TensorSpec((64, 128))
    assert saved_bytes(LocalOp("dropout", (t,), (t,), info={"p": 0.1})) == 64 * 128
    assert saved_bytes(LocalOp("dropout", (t,), (t,), info={"p": 0.0})) == 0


def test_attention_with_dropout_keeps_the_matrix() -> None:
    t = TensorSpec((2, 4, 32, 16))
    name = "scaled_dot_product_attention"
    fused = saved_bytes(LocalOp(name, (t, t, t), (t,)))
    plain = saved_bytes(LocalOp(name, (t, t, t), (t,), info={"dropout_p": 0.1}))
    assert plain - 3 * t.bytes == 3 * 2 * 4 * 32 * 32 * 4
    assert fused == 4 * t.bytes + 4 * 2 * 4 * 32


def test_optimizer_states() -> None:
    n = 1000
    assert optimizer_state_bytes(n) == 8 * n
    assert optimizer_state_bytes(n, kind="sgd") == 0
    assert optimizer_state_bytes(n, kind="sgd_momentum") == 4 * n
    assert optimizer_state_bytes(n, torch.bfloat16) == 4 * n
    assert optimizer_state_bytes(n, torch.bfloat16, master=torch.float32) == 12 * n
    state = state_bytes(n, torch.bfloat16, master=torch.float32)
    assert (state.parameters, state.gradients, state.total) == (2 * n, 2 * n, 16 * n)


def test_adamw_holds_what_we_say() -> None:
    p = torch.zeros(1000, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW([p], fused=True)
    optimizer.step()
    held = sum(t.nbytes for t in optimizer.state[p].values() if t.dim())
    assert held == optimizer_state_bytes(1000)


def test_symbols() -> None:
    b = sympy.Symbol("b", positive=True, integer=True)
    t = TensorSpec((b, 128))
    op = LocalOp("gelu", (t,), (t,))
    assert saved_bytes(op) == 512 * b
