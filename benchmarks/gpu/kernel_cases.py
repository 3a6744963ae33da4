"""What `benchmarks.gpu.kernels` times: every kernel on sizes of large models, and its baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ir.pointwise import Fusion, parse_pointwise
from autopar.runtime.kernels import adamw, combine, cross_entropy, dropout, int8, pack, permute
from autopar.runtime.random import keep_mask, keep_mask_traced, whole

P, SEED, CALL = 0.1, 1234, 0


@dataclass(frozen=True)
class Case:
    """One kernel on one size.

    `nbytes` are those that must move at the least; `error` gives the largest difference from the
    reference, which may be up to `limit`. `launches` is how many kernels `ours` queues.
    """

    kernel: str
    name: str
    nbytes: int
    ours: Callable[[], Any]
    error: Callable[[], float]
    limit: float
    baselines: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    launches: int = 1


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape; infinite where only one is NaN."""
    difference = (a.double() - b.double()).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(difference.masked_fill(same, 0.0).nan_to_num(nan=float("inf")).max())


def inductor(fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function under Inductor; as it is on CPU, where only the script is tried."""
    return torch.compile(fn, dynamic=False) if device.type == "cuda" else fn


def dropout_residual(device: torch.device, tiny: bool) -> Case:
    """`dropout(x) + residual`, forward."""
    shape = (4, 64) if tiny else (8192, 8192)
    x, residual = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    fusion, region = Fusion(epilogue=parse_pointwise("add(x, a0)")), whole(shape)

    def ours() -> Tensor:
        return dropout.dropout(x, P, SEED, CALL, region, fusion, (residual,))

    def traced(x: Tensor, residual: Tensor) -> Tensor:
        mask = keep_mask_traced(P, SEED, CALL, region, device)
        return (torch.where(mask, x.float() / (1 - P), 0.0) + residual.float()).to(x.dtype)

    def error() -> float:
        mask = keep_mask(P, SEED, CALL, region, device)
        return largest_difference(ours(), dropout.reference(x, mask, P, fusion, (residual,)))

    compiled = inductor(traced, device)
    return Case(
        "dropout",
        f"residual added, {shape[0]} x {shape[1]} bf16",
        3 * x.nbytes,
        ours,
        error,
        2**-6,  # a rounding of values below 8
        {
            "inductor": lambda: compiled(x, residual),
            "torch": lambda: F.dropout(x, P) + residual,
        },
    )


def adamw_step(device: torch.device, tiny: bool) -> Case:
    """AdamW over the shards of 48 parameters, which also writes their bfloat16 copies."""
    count, size = (3, 1000) if tiny else (48, 2 << 20)
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    made = {name: [torch.rand(size, device=device) for _ in range(count)] for name in names}
    copies = [x.bfloat16() for x in made["param"]]
    steps = [torch.tensor(1.0, device=device) for _ in range(count)]
    lists = [*made.values(), [], steps]
    numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}

    def ours() -> None:
        adamw.adamw(*lists, **numbers, copies=copies, capturable=True)

    def error() -> float:
        before = [[x.clone() for x in column] for column in lists]
        adamw.reference(*before, **numbers)
        adamw.adamw(*lists, **numbers, copies=copies, capturable=True)
        pairs = [*zip(lists[0], before[0], strict=True), *zip(lists[3], before[3], strict=True)]
        # The copies are compared with what they are copies of: a near tie may round either way.
        pairs += [(a, b.bfloat16()) for a, b in zip(copies, lists[0], strict=True)]
        return max(largest_difference(a, b) for a, b in pairs)

    def torchs() -> None:
        torch._fused_adamw_(*lists, amsgrad=False, maximize=False, **numbers)
        torch._foreach_copy_(copies, lists[0])

    return Case(
        "adamw",
        f"{count} x {size} fp32, bf16 copies",
        count * size * 30,
        ours,
        error,
        1e-6,
        {"inductor": inductor(_foreach_adamw(lists, copies, numbers), device), "torch": torchs},
    )


def _foreach_adamw(
    lists: Sequence[list[Tensor]], copies: list[Tensor], numbers: Mapping[str, float]
) -> Callable[[], Any]:
    """Torch's multi-tensor AdamW and the copies under Inductor."""

    def step() -> None:
        params, grads, first, second, _, steps = lists
        torch._foreach_add_(steps, 1)
        torch._foreach_mul_(params, 1 - numbers["lr"] * numbers["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - numbers["beta1"])
        torch._foreach_mul_(second, numbers["beta2"])
        torch._foreach_addcmul_(second, grads, grads, 1 - numbers["beta2"])
        for p, m, v, t, c in zip(params, first, second, steps, copies, strict=True):
            root = v.sqrt() / (1 - numbers["beta2"] ** t).sqrt() + numbers["eps"]
            p.sub_(numbers["lr"] / (1 - numbers["beta1"] ** t) * m / root)
            c.copy_(p)

    return step


def quantise(device: torch.device, tiny: bool) -> Case:
    """A bucket of gradients to int8 blocks."""
    size = 5000 if tiny else 64 << 20
    x = torch.randn(size, device=device, dtype=torch.bfloat16)
    compiled = inductor(int8.reference, device)
    return Case(
        "int8",
        f"quantise {size} bf16",
        3 * size,
        lambda: int8.quantise(x),
        lambda: largest_difference(int8.quantise(x), int8.reference(x)),
        0.0,
        {"inductor": lambda: compiled(x), "torch": lambda: int8.reference(x)},
    )


def requantise(device: torch.device, tiny: bool) -> Case:
    """The pieces of 8 members summed and quantised again."""
    members, size = 8, 5000 if tiny else 16 << 20
    x = torch.randn(members, size, device=device)
    wire = torch.cat([int8.reference(row) for row in x])
    compiled = inductor(int8.reference_reduce, device)
    return Case(
        "int8",
        f"sum of {members} x {size}",
        wire.nbytes // members * (members + 1),
        lambda: int8.reduce(wire),
        lambda: largest_difference(int8.reduce(wire), int8.reference_reduce(wire)),
        0.0,
        {"inductor": lambda: compiled(wire), "torch": lambda: int8.reference_reduce(wire)},
    )


def dequantise(device: torch.device, tiny: bool) -> Case:
    """int8 blocks to bfloat16."""
    size = 5000 if tiny else 64 << 20
    wire = int8.reference(torch.randn(size, device=device))

    def reference(wire: Tensor) -> Tensor:
        return int8.reference_dequantise(wire, size, torch.bfloat16)

    compiled = inductor(reference, device)
    return Case(
        "int8",
        f"dequantise {size} to bf16",
        3 * size,
        lambda: int8.dequantise(wire, size, torch.bfloat16),
        lambda: largest_difference(int8.dequantise(wire, size, torch.bfloat16), reference(wire)),
        0.0,
        {"inductor": lambda: compiled(wire), "torch": lambda: reference(wire)},
    )


def _routing(device: torch.device, tiny: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [tokens, width], the token of every position, and the two positions of every token."""
    tokens, width = (24, 64) if tiny else (16384, 4096)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    order = torch.randperm(2 * tokens, device=device)
    index = order % tokens
    position = torch.argsort(index, stable=True).view(tokens, 2)
    return x, index, position


def permute_rows(device: torch.device, tiny: bool) -> Case:
    """Every token's row to its two experts."""
    x, index, _ = _routing(device, tiny)
    compiled = inductor(lambda x, index: x[index], device)
    return Case(
        "permute",
        f"{len(index)} x {x.shape[1]} bf16",
        x.nbytes + len(index) * x.shape[1] * 2,  # every row is read for two positions
        lambda: permute.permute(x, index),
        lambda: largest_difference(permute.permute(x, index), permute.reference(x, index)),
        0.0,
        {
            "inductor": lambda: compiled(x, index),
            "torch": lambda: x.index_select(0, index),
        },
    )


def combine_rows(device: torch.device, tiny: bool) -> Case:
    """The weighted rows of two experts, and a residual."""
    x, index, position = _routing(device, tiny)
    y = x[index]
    weight = torch.rand(len(x), 2, device=device)
    epilogue = parse_pointwise("add(x, a0)")

    def run(make: Callable[..., Any]) -> Any:
        return make(y, position, weight, epilogue, (x,))

    def plain(y: Tensor, position: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return ((y[position] * weight[..., None]).sum(1) + x).to(y.dtype)

    compiled = inductor(plain, device)
    return Case(
        "combine",
        f"{len(x)} x 2 x {x.shape[1]} bf16, residual",
        y.nbytes + 2 * x.nbytes,
        lambda: run(combine.combine),
        lambda: largest_difference(run(combine.combine), run(combine.reference)),
        2**-6,
        {
            "inductor": lambda: compiled(y, position, weight, x),
            "torch": lambda: plain(y, position, weight, x),
        },
    )


def _gradients(device: torch.device, tiny: bool, dtype: torch.dtype) -> list[Tensor]:
    """48 tensors as four blocks of a transformer have them."""
    d, blocks = (32, 1) if tiny else (1536, 4)
    matrices = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
    vectors = [(3 * d,), (4 * d,), *[(d,)] * 6]
    shapes = [*matrices, *vectors] * blocks
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def pack_bucket(device: torch.device, tiny: bool) -> Case:
    """Gradients into one buffer."""
    xs = _gradients(device, tiny, torch.bfloat16)
    flat = pack.pack(xs)
    parts = flat.clone().split_with_sizes([x.numel() for x in xs])
    places = [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]
    compiled = inductor(lambda xs: torch.cat([x.reshape(-1) for x in xs]), device)
    return Case(
        "pack",
        f"{len(xs)} tensors bf16",
        2 * flat.nbytes,
        lambda: pack.pack(xs, out=flat),
        lambda: largest_difference(pack.pack(xs), torch.cat([x.reshape(-1) for x in xs])),
        0.0,
        {
            "inductor": lambda: compiled(xs),
            "_foreach_copy_": lambda: torch._foreach_copy_(places, xs),
        },
    )


def pack_scaled(device: torch.device, tiny: bool) -> Case:
    """Gradients scaled, rounded to bfloat16 and their norm taken on the way into one buffer."""
    xs = _gradients(device, tiny, torch.float32)
    half, flat = parse_pointwise("mul(x, 0.5)"), pack.pack(xs, dtype=torch.bfloat16)
    parts = flat.clone().split_with_sizes([x.numel() for x in xs])
    places = [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]

    def plain(xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        joined = torch.cat([x.reshape(-1) for x in xs]) * 0.5
        return joined.bfloat16(), joined.norm()

    def torchs() -> Tensor:
        scaled = torch._foreach_mul(xs, 0.5)
        torch._foreach_copy_(places, scaled)
        return torch.stack(torch._foreach_norm(scaled)).norm()

    def error() -> float:
        (y, norm), (wanted, wanted_norm) = pack.pack_with_norm(xs, half, flat.dtype), plain(xs)
        _, exact = pack.reference(xs, half)
        return max(largest_difference(y, wanted), float((norm - exact).abs() / wanted_norm))

    compiled = inductor(plain, device)
    return Case(
        "pack",
        f"{len(xs)} tensors fp32 to bf16, norm",
        3 * flat.nbytes,
        lambda: pack.pack_with_norm(xs, half, out=flat),
        error,
        1e-6,
        {"inductor": lambda: compiled(xs), "torch": torchs},
        launches=4,
    )


def pack_chunks(device: torch.device, tiny: bool) -> Case:
    """Gradients in the order of a reduce-scatter: every member's part of all of them."""
    xs, members = _gradients(device, tiny, torch.bfloat16), 2 if tiny else 8
    chunks = [x.chunk(members)[m] for m in range(members) for x in xs]
    flat = pack.pack(chunks)

    def torchs() -> Tensor:
        return torch._chunk_cat(xs, dim=0, num_chunks=members)

    return Case(
        "pack",
        f"{len(xs)} tensors bf16 for {members} members",
        2 * flat.nbytes,
        lambda: pack.pack(chunks, out=flat),
        lambda: largest_difference(pack.pack(chunks), torchs().view(-1)),
        0.0,
        {"_chunk_cat": torchs},
    )


def unpack_gathered(device: torch.device, tiny: bool) -> Case:
    """Parameters from the result of an all-gather."""
    xs, members = _gradients(device, tiny, torch.bfloat16), 2 if tiny else 8
    flat = torch._chunk_cat(xs, dim=0, num_chunks=members)
    fulls = [torch.empty_like(x) for x in xs]
    chunks = [full.chunk(members)[m] for m in range(members) for full in fulls]
    outs, sizes = [x.view(members, -1) for x in xs], [x.numel() // members for x in xs]

    def error() -> float:
        pack.unpack(flat, chunks)
        return max(map(largest_difference, fulls, xs))

    return Case(
        "pack",
        f"{len(xs)} tensors bf16 from {members} members",
        2 * flat.nbytes,
        lambda: pack.unpack(flat, chunks),
        error,
        0.0,
        {"split_copy": lambda: torch.split_with_sizes_copy(flat, sizes, dim=1, out=outs)},
    )


def loss_and_gradient(device: torch.device, tiny: bool) -> Case:
    """Mean cross-entropy and the gradient of its logits."""
    tokens, count = (8, 500) if tiny else (8192, 128256)
    logits = torch.randn(tokens, count, device=device, dtype=torch.bfloat16).requires_grad_()
    ids = torch.randint(0, count, (tokens,), device=device)
    classes = cross_entropy.Classes(0, count)

    def gradient(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(loss_of(logits, ids), logits)[0]

    def ours(logits: Tensor, ids: Tensor) -> Tensor:
        return cross_entropy.cross_entropy(logits, ids, classes).mean()

    def wide(logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), ids)

    compiled = inductor(wide, device)
    return Case(
        "cross_entropy",
        f"{tokens} x {count} bf16, both ways",
        3 * logits.nbytes,
        lambda: gradient(ours),
        lambda: largest_difference(gradient(ours) * tokens, gradient(wide) * tokens),
        2**-8,  # a rounding of a gradient that is at most 1
        {"inductor": lambda: gradient(compiled), "torch": lambda: gradient(wide)},
        launches=6,
    )


CASES: dict[str, Callable[[torch.device, bool], Case]] = {
    "cross_entropy:both": loss_and_gradient,
    "adamw:step": adamw_step,
    "int8:quantise": quantise,
    "int8:reduce": requantise,
    "int8:dequantise": dequantise,
    "permute:rows": permute_rows,
    "combine:rows": combine_rows,
    "pack:bucket": pack_bucket,
    "pack:scaled": pack_scaled,
    "pack:chunks": pack_chunks,
    "pack:unpack": unpack_gathered,
    "dropout:residual": dropout_residual,
}
