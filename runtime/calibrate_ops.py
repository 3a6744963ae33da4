"""What `autopar calibrate` times on every rank: ops, their backward kernels, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .calibrate_clock import SPOIL_BYTES
from .random import keep_mask, whole

aten = torch.ops.aten

KB, MB = 1 << 10, 1 << 20
MATMUL_SHAPES = [  # m, k, n: no dim below 128
    (128, 128, 128),
    (128, 256, 512),
    (256, 512, 512),
    (512, 512, 512),
    (512, 512, 2048),
    (1024, 1024, 1024),
    (2048, 512, 2048),
    (2048, 2048, 2048),
]
MIXED = [(32, 2048, 2048), (64, 768, 3072), (64, 3072, 768), (128, 1024, 4096), (768, 64, 3072)]
NARROW = (1, 2, 4, 8, 16, 32, 64, 128)
SKINNY = [(8, n, n) for n in (128, 256, 512, 1024, 2048, 4096)] + [(8, 4096, 16384)]
CONVS = [  # batch, channels in, channels out, height and width, kernel
    (2, 16, 16, 16, 3),
    (2, 64, 64, 16, 3),
    (8, 3, 32, 32, 3),
    (8, 32, 32, 32, 3),
    (8, 64, 64, 32, 3),
    (8, 128, 128, 16, 3),
    (8, 64, 128, 16, 1),
    (32, 64, 64, 32, 3),
]
ATTENTION = [(1, 4, 64, 64), (4, 8, 128, 64), (16, 8, 128, 64), (2, 8, 512, 64), (2, 8, 1024, 64)]
PARAMETERS = 48  # of the optimizer whose cost per tensor is measured


class Work(NamedTuple):
    """What to time: `x` is its flops or bytes; one call of `fn` does that `times` times.

    Keys of products end with the bytes that they move, `matmul:float32@786432`. `hot` are the
    tensors that the op before it made; None leaves the caches as they are.
    `nbytes` is the size of one tensor, which says how cold the others are.
    """

    key: str
    x: float
    fn: Callable[[], Any]
    times: int = 1
    hot: Sequence[Tensor] | None = ()
    nbytes: int = SPOIL_BYTES


def matmul_work(quick: bool) -> Iterator[Work]:
    """Square-ish products per dtype; with one narrow dim; skinny; arithmetic and traffic alike."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for shape in MATMUL_SHAPES[:: 3 if quick or dtype != torch.float32 else 1]:
            yield _product(f"matmul:{name}", shape, dtype)
    for d in NARROW:
        for shape in ((d, 512, 512), (512, d, 512), (512, 512, d))[: 1 if quick else 3]:
            yield _product(f"narrow:{d}", shape)
    for shape in MIXED:
        yield _product("mixed:float32", shape)
    for shape in SKINNY[:: 2 if quick else 1]:
        yield _product("skinny:float32", shape)


def _product(key: str, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Work:
    m, k, n = shape
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    moved = dtype.itemsize * (m * k + k * n + m * n)
    fn = partial(F.linear, x, w)
    return Work(f"{key}@{moved}", 2.0 * m * k * n, fn, hot=(x,), nbytes=moved // 3)


def conv_work(quick: bool) -> Iterator[Work]:
    """Convolutions and attention, forward and backward."""
    for b, c, d, size, kernel in CONVS[:: 3 if quick else 1]:
        x, w = torch.randn(b, c, size, size), torch.randn(d, c, kernel, kernel)
        pad, flops = kernel // 2, 2.0 * b * d * size * size * c * kernel * kernel
        forward = partial(F.conv2d, x, w, padding=pad)
        yield Work("conv:float32", flops, forward, hot=(x,), nbytes=x.nbytes)
        where = ([1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [True, True, False])
        g = torch.randn(b, d, size, size)
        backward = partial(aten.convolution_backward, g, x, w, None, *where)
        yield Work("conv_backward:float32", flops, backward, 2, (g,), g.nbytes)
    for b, h, length, e in ATTENTION[:: 2 if quick else 1]:
        q, k, v, g = (torch.randn(b, h, length, e) for _ in range(4))
        flops = 4.0 * b * h * length * length * e
        forward = partial(aten._scaled_dot_product_flash_attention_for_cpu, q, k, v)
        out, stats = forward()
        yield Work("attention:float32", flops, forward, hot=(q, k, v), nbytes=q.nbytes)
        backward = partial(
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
            *(g, q, k, v, out, stats, 0.0, False),
        )
        yield Work("attention_backward:float32", 2.5 * flops, backward, hot=(g,), nbytes=g.nbytes)


def memory_work(sizes: list[int]) -> Iterator[Work]:
    """Memory-bound ops over tensors of `sizes` bytes; x counts bytes as cost.compute does."""
    for size in sizes:
        sources = (
            _row_work(max(size // 4 // 512, 1), 512),
            _image_work(max(size // 4 // (8 * 32 * 32), 1)),
            _embedding_work(max(size // 4 // 64, 16), 64),
        )
        for work in chain.from_iterable(sources):
            yield work._replace(nbytes=size)
        p, g, m, v = (torch.rand(max(size // 4, 1)) for _ in range(4))
        step = partial(
            torch._fused_adamw_,
            *([p], [g], [m], [v], [], [torch.tensor(5.0)]),
            lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.01, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        yield Work("bandwidth:adamw", 7.0 * p.nbytes, step, nbytes=size)


def _row_work(rows: int, width: int) -> Iterator[Work]:
    """Pointwise ops, reductions and normalisations of a matrix, and their backward kernels."""
    x, y = torch.randn(rows, width), torch.randn(rows, width)
    w, b = torch.ones(width), torch.zeros(width)
    one, hot = float(x.nbytes), (x,)
    yield Work("bandwidth:pointwise", 3 * one, partial(torch.add, x, y), hot=hot)
    yield Work("bandwidth:copy", 2 * one, x.clone, hot=hot)
    yield Work("bandwidth:reduction", one, partial(torch.sum, x, 0), hot=hot)
    yield Work("bandwidth:transcendental", 2 * one, partial(F.gelu, x), hot=hot)
    backward = partial(aten.gelu_backward, x, y)
    yield Work("bandwidth:transcendental_backward", 3 * one, backward, hot=hot)
    yield Work("bandwidth:softmax", 2 * one, partial(torch.softmax, x, -1), hot=hot)
    backward = partial(aten._softmax_backward_data, x, torch.softmax(y, -1), -1, torch.float32)
    yield Work("bandwidth:softmax_backward", 3 * one, backward, hot=hot)
    yield Work("bandwidth:norm", 2 * one, partial(F.layer_norm, x, (width,), w, b), hot=hot)
    _, mean, scale = aten.native_layer_norm(y, [width], w, b, 1e-5)
    backward = partial(
        aten.native_layer_norm_backward, x, y, [width], mean, scale, w, b, [True, True, True]
    )
    yield Work("bandwidth:norm_backward", 3 * one, backward, hot=hot)
    backward = partial(aten.native_dropout_backward, x, torch.rand_like(y) > 0.1, 1.1)
    region = whole((rows, width))

    def dropout() -> Tensor:
        kept: Tensor = aten.native_dropout_backward(x, keep_mask(0.1, 1, 2, region), 1.1)
        return kept

    yield Work("bandwidth:dropout", 2.25 * one, dropout, hot=hot)
    yield Work("bandwidth:dropout_backward", 2.25 * one, backward, hot=hot)


def _image_work(channels: int) -> Iterator[Work]:
    """Batch statistics and pooling of 8 images of 32 x 32."""
    image, g = torch.randn(8, channels, 32, 32), torch.randn(8, channels, 32, 32)
    mean, var, w, b = (torch.ones(channels) for _ in range(4))
    one = float(image.nbytes)
    forward = partial(aten.native_batch_norm, image, w, b, mean, var, True, 0.1, 1e-5)
    _, save_mean, save_scale = forward()
    yield Work("bandwidth:batch_norm", 2 * one, forward, hot=(image,))
    backward = partial(
        aten.native_batch_norm_backward,
        *(g, image, w, mean, var, save_mean, save_scale, True, 1e-5, [True, True, True]),
    )
    yield Work("bandwidth:batch_norm_backward", 3 * one, backward, hot=(g,))
    forward = partial(aten.max_pool2d_with_indices, image, [2, 2])
    pooled, places = forward()
    yield Work("bandwidth:pool", 1.25 * one, forward, hot=(image,))
    where = ([2, 2], [2, 2], [0, 0], [1, 1], False, places)
    backward = partial(aten.max_pool2d_with_indices_backward, pooled, image, *where)
    yield Work("bandwidth:pool_backward", 1.25 * one, backward, hot=(pooled,))


def _embedding_work(rows: int, width: int) -> Iterator[Work]:
    """The lookup of a sixteenth of a table's rows, and the table's dense gradient."""
    table, ids = torch.randn(rows, width), torch.randint(0, rows, (max(rows // 16, 16),))
    found = F.embedding(ids, table)
    one = float(found.nbytes)
    yield Work("bandwidth:embedding", ids.nbytes + 2 * one, partial(F.embedding, ids, table))
    backward = partial(aten.embedding_dense_backward, found, ids, rows, -1, False)
    moved = table.nbytes + 3 * one
    yield Work("bandwidth:embedding_backward", moved, backward, hot=(found,))


def overhead_work() -> Iterator[Work]:
    """Ops on a few elements with autograd on: dispatch, graph node, allocation."""
    x = torch.randn(8, 8, requires_grad=True)
    y = torch.randn(8, 8, requires_grad=True)

    def hundred() -> None:
        with torch.enable_grad():
            for _ in range(100):
                x * y

    yield Work("overhead", 1.0, hundred, times=100, hot=None)


def optimizer_work(parameters: Sequence[Tensor]) -> Iterator[Work]:
    """Steps of an optimizer on tiny parameters: what each costs whatever its size."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    gradients = [torch.ones_like(p) for p in parameters]

    def step() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    yield Work("optimizer", 1.0, step, times=len(parameters))


def compute_work(quick: bool) -> Iterator[Work]:
    """Everything that needs no other rank."""
    yield from overhead_work()
    yield from matmul_work(quick)
    yield from conv_work(quick)
    sizes = [64 * KB, MB, 16 * MB]
    if not quick:
        sizes = [16 * KB, 128 * KB, MB, 4 * MB, 16 * MB, 32 * MB]
    yield from memory_work(sizes)
