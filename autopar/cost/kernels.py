"""Times of autopar's own kernels and of what they stand for, in launches and bytes.

A launch takes the device's overhead plus its bytes over the bandwidth that element-wise ops reach
in a training step (both from the cluster's profile). The unfused forms are counted from the code in
`autopar.runtime` that runs without kernels: one line of it is one launch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from .cluster import Cluster, Device
from .comm import collective_time

# Bandwidth of a kernel in that of element-wise ops. 1 until `benchmarks/gpu` has measured it: its
# goal is nine tenths of a device copy, which the profiles' bandwidth is below.
ACHIEVED: Mapping[str, float] = MappingProxyType({})

# Tensors and chunks of elements per launch of a `torch._foreach_` op with two lists, and tensors
# of one with four: PyTorch,
# aten/src/ATen/native/cuda/MultiTensorApply.cuh (depth_to_max_tensors, depth_to_max_blocks).
FOREACH_TENSORS, FUSED_TENSORS = 64, 36
FOREACH_CHUNKS = 320
FOREACH_CHUNK = 65536

# Of `runtime.random.hash32` on int64 indices: launches that read one tensor, and two.
HASH_UNARY, HASH_BINARY = 14, 3
INDEX_BYTES = 8
INT8_BYTES = 1 + 4 / 256  # per element: a code, and its block's scale (`runtime.kernels.int8`)


@dataclass(frozen=True)
class Forms:
    """The launches of a kernel, forward and backward, as bytes moved by each, and the unfused ones.

    `saved_bytes`: what is not kept for the backward thanks to the kernel. `counted` are launches of
    the same ops that a predicted step has (`autopar.cost.compute`, one per op and direction), or
    fewer; None: it counts what the kernel does, or nothing.
    """

    fused: tuple[float, ...]
    unfused: tuple[float, ...]
    saved_bytes: float = 0.0
    counted: tuple[float, ...] | None = None


def step_change(device: Device, kernel: str, forms: Forms) -> float:
    """Seconds that a kernel adds to the predicted step, which has the ops without it."""
    if forms.counted is None:
        return 0.0
    return form_times(device, kernel, forms)[0] - launches_time(device, forms.counted)


def form_times(device: Device, kernel: str, forms: Forms) -> tuple[float, float]:
    """Seconds with the kernel, and without it."""
    return (
        launches_time(device, forms.fused, ACHIEVED.get(kernel, 1.0)),
        launches_time(device, forms.unfused),
    )


def launches_time(device: Device, launches: Sequence[float], achieved: float = 1.0) -> float:
    """Seconds of launches one after the other, each moving so many bytes."""
    curve = device.bandwidth_curve("pointwise")
    moved = sum(nbytes / (achieved * float(curve(nbytes))) for nbytes in launches if nbytes > 0)
    return moved + len(launches) * device.op_overhead_s


def dropout_forms(
    elements: int,
    itemsize: int,
    dims: int,
    before: int | None = None,
    after: int | None = None,
    reads_inputs: bool = False,
) -> Forms:
    """Dropout of a tensor of `dims` dims, with what is fused into it.

    `before` and `after` are the further tensors of its prologue and epilogue, None without one: in
    the unfused form each is one launch, as a compiler that fuses element-wise ops makes it.
    `reads_inputs` says whether the backward reads them. Saved: the mask, a byte per element.
    """
    x = elements * itemsize
    index = elements * INDEX_BYTES
    extras = (before or 0) + (after or 0)
    again = (1 + extras) * x if reads_inputs else 0
    fused = ((2 + extras) * x, (2 + extras) * x + again)
    mask = [index, *[2 * index] * dims, *[2 * index] * HASH_UNARY, *[3 * index] * HASH_BINARY]
    scaled = [elements + x, 2 * x, 3 * x]  # `_masked_scale`: to, mul_, mul_
    unfused = [*mask, index + elements, *scaled, *scaled]
    # As `cost.traffic` counts: a mask of bytes, and neighbours forward (sums have no backward).
    counted = [2 * x + elements, 2 * x + elements]
    for neighbour in (before, after):
        if neighbour is not None:
            counted.append((2 + neighbour) * x)
            unfused += [(2 + neighbour) * x, (2 + neighbour) * x + (x if reads_inputs else 0)]
    return Forms(fused, tuple(unfused), float(elements), tuple(counted))


def cross_entropy_forms(
    tokens: int,
    classes: int,
    itemsize: int,
    divided: bool,
    in_place: bool,
    prologue: bool = False,
    wide_itemsize: int | None = None,
) -> Forms:
    """Cross-entropy of logits [tokens, classes] as they are stored; `divided`: the classes are.

    With a `prologue` the unfused form also writes what it gives, of `wide_itemsize`. The kernel
    reads the logits once forward, and reads and writes them once backward. In place, the gradient
    takes no memory of its own.
    """
    n = tokens * classes
    small = 4.0 * tokens
    x = n * itemsize
    y = n * (wide_itemsize or itemsize) if prologue else x
    f32 = n * max(4, wide_itemsize or itemsize)
    unfused: list[float] = [x + y, x + y + y] if prologue else []
    if divided:
        narrow = y < f32
        # `_local_softmax`: (to, softmax, copy_), amax, amax, masked_fill_; then the small ops, of
        # which `_DividedCrossEntropy` has about 20, on one number per token.
        unfused += [y + f32, 2 * f32, f32 + y] if narrow else [2 * f32]
        unfused += [f32, f32, 2 * y, *[2 * small] * 20]
        unfused += [2 * y, *[2 * small] * 5]  # backward: the product, and the targets' own
    else:
        unfused += [2 * y, 2 * small, 2 * y, 2 * small]  # log_softmax, nll_loss; their backward
    saved = (y if prologue else 0) + (x if in_place else 0)
    counted = (2 * y, 2 * y, *((x + y, x + y) if prologue else ()))  # as `cost.traffic` counts
    return Forms((x + 4 * small, 2 * x + 4 * small), tuple(unfused), float(saved), counted)


def pack_forms(sizes: Sequence[float], itemsize: int, joins: bool) -> Forms:
    """A bucket of tensors of `sizes` elements: packed before a message, or unpacked after one.

    Packing without the kernel is `torch._foreach_copy_`; unpacking (`joins`) one `cat` per tensor.
    """
    total = 2.0 * sum(sizes) * itemsize
    if joins:
        return Forms((total,), tuple(2.0 * size * itemsize for size in sizes))
    chunks = sum(math.ceil(size / FOREACH_CHUNK) for size in sizes)
    count = max(math.ceil(len(sizes) / FOREACH_TENSORS), math.ceil(chunks / FOREACH_CHUNKS), 1)
    return Forms((total,), (total / count,) * count)


def permute_forms(rows: int, width: int, itemsize: int, scatters: bool) -> Forms:
    """Rows gathered into, or scattered from, a contiguous buffer, forward and backward.

    Unfused: the rows in order (`index_select`), then the mask or the weight on them, then
    (`scatters`) the zeros that they are added to.
    """
    x = float(rows * width * itemsize)
    once = [2 * x, 2 * x, *([x] if scatters else [])]
    return Forms((2 * x, 2 * x), (*once, *once))


def adamw_forms(sizes: Sequence[float], itemsize: int) -> Forms:
    """AdamW of shards of `sizes` elements: reads p, g, m, v and writes p, m, v.

    Unfused is `torch._fused_adamw_`, whose launches take fewer tensors (four lists of them).
    """
    total = 7.0 * sum(sizes) * itemsize
    chunks = sum(math.ceil(size / FOREACH_CHUNK) for size in sizes)
    count = max(math.ceil(len(sizes) / FUSED_TENSORS), math.ceil(chunks / FOREACH_CHUNKS), 1)
    # A step has an optimizer's pass, and an overhead per tensor, which is more than these launches.
    return Forms((total,), (total / count,) * count, 0.0, (total / count,) * count)


def int8_times(
    cluster: Cluster, span: tuple[int, ...], elements: float, itemsize: int, scatters: bool
) -> tuple[float, float]:
    """Seconds to sum gradients over a group of `span` as int8 blocks, and as they are.

    Quantised, exchanged all to all, summed, gathered again (unless the sum is scattered) and
    dequantised. `span` is that of `autopar.cost.cluster.group_span`.
    """
    device, group = cluster.device, math.prod(span)
    wire, x = elements * INT8_BYTES, elements * itemsize
    launches = int8_launches(elements, itemsize, group, scatters)
    with_it = launches_time(device, launches, ACHIEVED.get("int8", 1.0))
    with_it += float(collective_time(cluster, "all_to_all", wire, span))
    if scatters:
        return with_it, float(collective_time(cluster, "reduce_scatter", x, span))
    with_it += float(collective_time(cluster, "all_gather", wire, span))
    return with_it, float(collective_time(cluster, "all_reduce", x, span))


def int8_sent(
    span: tuple[int, ...], elements: float, itemsize: int, scatters: bool
) -> dict[str, int]:
    """What a member sends more or less, by collective, where gradients travel as int8."""
    group = math.prod(span)
    part = (group - 1) / group
    wire, plain = part * elements * INT8_BYTES, part * elements * itemsize
    if scatters:
        return {"all_to_all": int(wire), "reduce_scatter": -int(plain)}
    return {"all_to_all": int(wire), "all_gather": int(wire), "all_reduce": -int(2 * plain)}


def int8_change(
    cluster: Cluster,
    span: tuple[int, ...],
    elements: float,
    itemsize: int,
    scatters: bool,
    exposed: float,
) -> float:
    """Seconds that sums of gradients as int8 add to a step of which they are exposed to a share.

    Assumed: messages of one stream that become shorter by one factor leave at most that factor of
    what compute waited for (they start no later, and end a part of the wait later), and rounding
    takes time from compute, however much of the messages is hidden. `exposed` is between 0 and 1.
    """
    with_it, without = int8_times(cluster, span, elements, itemsize, scatters)
    rounding = launches_time(
        cluster.device,
        int8_launches(elements, itemsize, math.prod(span), scatters),
        ACHIEVED.get("int8", 1.0),
    )
    return rounding + exposed * (with_it - rounding - without)


def int8_launches(elements: float, itemsize: int, group: int, scatters: bool) -> list[float]:
    """Bytes that each kernel moves which rounds gradients for a group, or sums them."""
    wire, x = elements * INT8_BYTES, elements * itemsize
    if scatters:
        return [x + wire, wire + x / group]
    return [x + wire, wire + wire / group, wire + x]
