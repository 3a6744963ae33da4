"""What `autopar calibrate --device cuda` times: products, attention, memory-bound ops, the update.

Everything is made on torch's default device (`torch.device` as a context). Flops and bytes are
counted as `autopar.cost` counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

aten = torch.ops.aten

MB = 1 << 20
Shape = tuple[int, ...]


class DeviceWork(NamedTuple):
    """What to time: one call of `fn` does `x` flops or bytes, `times` times, in as many kernels."""

    key: str
    x: float
    fn: Callable[[], Any]
    times: int = 1


@dataclass(frozen=True)
class Amount:
    """How much is timed: products (m, k, n), attention (b, h, s, e), bytes, dtypes."""

    products: Sequence[Shape]
    skinny: Sequence[Shape]
    attention: Sequence[Shape]
    bytes: Sequence[int]
    dtypes: Sequence[torch.dtype]
    tiny_ops: int = 100


# Squares, and the products of GPT-2 (768) and a 1 B Llama (2048, 5632, 8192) on 8192 tokens.
FULL = Amount(
    products=[(n, n, n) for n in (256, 512, 1024, 2048, 4096, 8192)]
    + [(8192, 768, 2304), (8192, 768, 768), (8192, 768, 3072), (8192, 3072, 768)]
    + [(8192, 768, 50304), (8192, 2048, 2048), (8192, 2048, 5632), (8192, 5632, 2048)]
    + [(8192, 2048, 8192), (8192, 8192, 2048), (8192, 2048, 32000), (2048, 768, 768)],
    skinny=[(8, n, n) for n in (1024, 2048, 4096, 8192, 16384)],
    attention=[
        *((2, 12, 256, 64), (8, 12, 512, 64), (8, 12, 1024, 64), (4, 32, 2048, 64)),
        *((1, 32, 8192, 64), (8, 16, 1024, 128), (2, 32, 4096, 128)),
    ],
    bytes=[MB // 4, MB, 4 * MB, 16 * MB, 64 * MB, 256 * MB, 1024 * MB],
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
)
QUICK = Amount(
    FULL.products[::2],
    FULL.skinny[::2],
    FULL.attention[::2],
    [MB, 16 * MB, 256 * MB],
    (torch.bfloat16, torch.float32),
)
TINY = Amount(
    [(16, 16, 16), (32, 32, 32)],
    [(2, 64, 64)],
    [(1, 2, 16, 8)],
    [4096, 65536],
    (torch.bfloat16, torch.float32),
    4,
)
TF32 = "tf32"


def device_work(amount: Amount) -> Iterator[DeviceWork]:
    """Everything that is timed on one device."""
    yield from tiny_work(amount.tiny_ops)
    for dtype in amount.dtypes:
        yield from product_work(amount.products, dtype, str(dtype).removeprefix("torch."))
        yield from attention_work(amount.attention, dtype)
    yield from tf32_work(amount.products)
    yield from skinny_work(amount.skinny, amount.dtypes[0])
    for nbytes in amount.bytes:
        yield from memory_work(nbytes, amount.dtypes[0])


def tiny_work(ops: int) -> Iterator[DeviceWork]:
    """Ops and parameters of a few elements: what each costs whatever its size."""
    x, y = torch.randn(8, 8), torch.randn(8, 8)

    def several() -> None:
        for _ in range(ops):
            x * y

    yield DeviceWork("overhead", 1.0, several, ops)
    parameters = [nn.Parameter(torch.ones(8)) for _ in range(ops)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    update = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    yield DeviceWork("optimizer", 1.0, update.step, ops)


def product_work(shapes: Sequence[Shape], dtype: torch.dtype, name: str) -> Iterator[DeviceWork]:
    """A linear layer's product, and the two of its backward."""
    for m, k, n in shapes:
        x, w, g = (torch.randn(*s).to(dtype) for s in ((m, k), (n, k), (m, n)))
        flops = 2.0 * m * k * n
        yield DeviceWork(f"matmul:{name}", flops, partial(F.linear, x, w))
        yield DeviceWork(f"matmul_backward:{name}", flops, partial(_backward, x, w, g), 2)


def _backward(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return g @ w, g.t() @ x


def tf32_work(shapes: Sequence[Shape]) -> Iterator[DeviceWork]:
    """Products of float32 that tensor cores may round to TF32; a curve beside `float32`."""
    for work in product_work(shapes, torch.float32, TF32):
        yield work._replace(fn=partial(_rounding, work.fn))


def _rounding(fn: Callable[[], Any]) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        fn()
    finally:
        torch.set_float32_matmul_precision(before)


def skinny_work(shapes: Sequence[Shape], dtype: torch.dtype) -> Iterator[DeviceWork]:
    """Products that take as long as reading the weights takes; x are bytes."""
    for m, k, n in shapes:
        x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        moved = float(dtype.itemsize * (m * k + k * n + m * n))
        yield DeviceWork("bandwidth:matmul", moved, partial(F.linear, x, w))


def attention_work(shapes: Sequence[Shape], dtype: torch.dtype) -> Iterator[DeviceWork]:
    """Causal fused attention: flops are those under the mask, half of all."""
    name = str(dtype).removeprefix("torch.")
    for shape in shapes:
        q, k, v = (torch.randn(*shape).to(dtype).requires_grad_() for _ in range(3))
        g = torch.randn(*shape).to(dtype)
        b, h, s, e = shape
        flops = 0.5 * 4.0 * b * h * s * s * e
        with torch.enable_grad(), fused_attention(q):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        yield DeviceWork(f"attention:{name}", flops, partial(_attention, q, k, v))
        # 2.5: the factor by which cost.compute counts the backward.
        backward = partial(torch.autograd.grad, out, (q, k, v), g, retain_graph=True)
        yield DeviceWork(f"attention_backward:{name}", 2.5 * flops, backward)


def fused_attention(q: Tensor) -> AbstractContextManager[Any]:
    """Flash attention where the device has it for the dtype, else what torch chooses."""
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        context: AbstractContextManager[Any] = sdpa_kernel([SDPBackend.FLASH_ATTENTION])
        return context
    return nullcontext()


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with fused_attention(q):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def memory_work(nbytes: int, dtype: torch.dtype) -> Iterator[DeviceWork]:
    """Memory-bound ops on tensors of `nbytes`; x counts bytes as `cost.traffic` does."""
    width = 1024 if nbytes >= MB else 64
    rows = max(nbytes // dtype.itemsize // width, 1)
    yield from _row_work(rows, width, dtype)
    yield from _loss_work(nbytes)
    yield from _embedding_work(rows, width, dtype)
    p, g, m, v = (torch.rand(max(nbytes // 4, 1)) for _ in range(4))
    step = partial(
        torch._fused_adamw_,
        *([p], [g], [m], [v], [], [torch.tensor(5.0)]),
        lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.01, eps=1e-8,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    yield DeviceWork("bandwidth:adamw", 7.0 * p.nbytes, step)


def _row_work(rows: int, width: int, dtype: torch.dtype) -> Iterator[DeviceWork]:
    x, y = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    w, b = torch.ones(width).to(dtype), torch.zeros(width).to(dtype)
    one = float(x.nbytes)
    yield DeviceWork("bandwidth:pointwise", 3 * one, partial(torch.add, x, y))
    yield DeviceWork("bandwidth:copy", 2 * one, x.clone)
    yield DeviceWork("bandwidth:reduction", one, partial(torch.sum, x, 0))
    yield DeviceWork("bandwidth:transcendental", 2 * one, partial(F.gelu, x))
    backward = partial(aten.gelu_backward, x, y)
    yield DeviceWork("bandwidth:transcendental_backward", 3 * one, backward)
    yield DeviceWork("bandwidth:norm", 2 * one, partial(F.layer_norm, x, (width,), w, b))
    _, mean, scale = aten.native_layer_norm(y, [width], w, b, 1e-5)
    backward = partial(
        aten.native_layer_norm_backward, x, y, [width], mean, scale, w, b, [True, True, True]
    )
    yield DeviceWork("bandwidth:norm_backward", 3 * one, backward)
    kept = torch.rand(rows, width) > 0.1
    yield DeviceWork(
        "bandwidth:dropout", 2 * one + kept.nbytes, partial(aten.native_dropout, x, 0.1, True)
    )
    backward = partial(aten.native_dropout_backward, x, kept, 1.1)
    yield DeviceWork("bandwidth:dropout_backward", 2 * one + kept.nbytes, backward)


def _loss_work(nbytes: int) -> Iterator[DeviceWork]:
    """Softmax and cross-entropy in float32 over many classes, with the loss's two kernels each."""
    classes = 32768 if nbytes >= 16 * MB else 1024
    rows = max(nbytes // 4 // classes, 1)
    x = torch.randn(rows, classes).requires_grad_()
    one, target = float(x.nbytes), torch.randint(0, classes, (rows,))
    yield DeviceWork("bandwidth:softmax", 2 * one, partial(F.cross_entropy, x, target))
    with torch.enable_grad():
        loss = F.cross_entropy(x, target)
    backward = partial(torch.autograd.grad, loss, (x,), retain_graph=True)
    yield DeviceWork("bandwidth:softmax_backward", 2 * one, backward)


def _embedding_work(rows: int, width: int, dtype: torch.dtype) -> Iterator[DeviceWork]:
    """The lookup of a quarter of a table's rows, and the table's dense gradient."""
    table, ids = torch.randn(rows, width).to(dtype), torch.randint(0, rows, (max(rows // 4, 1),))
    found = F.embedding(ids, table)
    one = float(found.nbytes)
    yield DeviceWork("bandwidth:embedding", ids.nbytes + 2 * one, partial(F.embedding, ids, table))
    backward = partial(aten.embedding_dense_backward, found, ids, rows, -1, False)
    yield DeviceWork("bandwidth:embedding_backward", table.nbytes + 3 * one, backward)
