"""Partition-invariant dropout in one pass: the mask is computed, never stored.

`y = epilogue(mask * prologue(x) / (1 - p))`, where the mask of an element is the hash of the seed
and of its *global* index (see `autopar.runtime.random`): the same on every partition and device.
The backward computes the mask again, so that the forward saves at most `x`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.ir.lowered import Region
from autopar.ir.pointwise import PLAIN, Fusion, Pointwise, Step, parse_pointwise
from autopar.runtime.random import H0, H1, M0, M1, M2, M3, MASK32, keys, segments, threshold

from .ahead import Specialisation
from .emit import Kernel, compute_type, fill, triton_lines
from .launch import INTERPRETED_BLOCK, block_size, cdiv, launch
from .support import LARGEST, fall_back, usable

NAME = "dropout"
BLOCK = 2048
# The last program reaches less than a block beyond the last element, in the interpreter's too.
REACH = LARGEST - INTERPRETED_BLOCK
REGIONS = 256  # of which the starts stay on the device

# Parts: the parameters and loads of the further tensors, the work before and after the mask, and
# what is stored. `g` is the gradient of the output; the forward has none.
_TEMPLATE = f"""
@triton.jit(do_not_specialize=["k0", "k1"])
def $name(
    $pointers
    starts_ptr, n, length, k0, k1,
    LIMIT: tl.constexpr, NONE: tl.constexpr, SCALE: tl.constexpr, RUNS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    i = first + tl.arange(0, BLOCK)
    if RUNS == 1:
        index = tl.load(starts_ptr) + i
    else:
        run = i // length
        index = tl.load(starts_ptr + run, mask=i < n, other=0) + (i - run * length)
    lo = index.to(tl.uint32)
    bits = lo * {M0:#x} + k0.to(tl.uint32, bitcast=True)
    key = k1.to(tl.uint32, bitcast=True)
    if WIDE:
        hi = (index >> 32).to(tl.uint32)
        bits = bits + hi * {H0:#x}
        key = key ^ (hi * {H1:#x})
    bits = (bits ^ (bits >> 16)) * {M1:#x}
    bits = bits ^ key
    bits = (bits ^ (bits >> 15)) * {M2:#x}
    bits = (bits ^ (bits >> 16)) * {M3:#x}
    keep = bits >= LIMIT
    if NONE:
        keep = bits != bits
    if first + BLOCK <= n:
        $load_block
        $work
        $store_block
    else:
        $load_tail
        $work
        $store_tail
"""


@cache
def emit(fusion: Fusion, compute: str = "tl.float32") -> Kernel:
    """The forward: reads `x` and the further tensors, writes `y` in its own dtype."""
    before, after = fusion.prologue, fusion.epilogue
    extras = [f"a{i}" for i in range(fusion.extras)]
    work = triton_lines(before, "x", extras[: before.extras], "u", compute, "p")
    work.append("v = tl.where(keep, u * SCALE, 0.0)")
    work += triton_lines(after, "v", extras[before.extras :], "y", compute, "q")
    return _filled("dropout", ["x", *extras], work, ["y"], compute)


@cache
def emit_backward(fusion: Fusion, wanted: tuple[str, ...], compute: str = "tl.float32") -> Kernel:
    """The backward: from the gradient `g` to those that are `wanted`: of `x`, `a0`, `a1`, ...

    Of the inputs it reads only those that a derivative depends on (`saved`).
    """
    before, after = fusion.prologue, fusion.epilogue
    extras = [f"a{i}" for i in range(fusion.extras)]
    early, late = extras[: before.extras], extras[before.extras :]
    work = triton_lines(before, "x", early, "u", compute, "p") if saved(fusion) else []
    if saved(fusion):
        work.append("v = tl.where(keep, u * SCALE, 0.0)")
    for name in wanted:
        if name in late:
            slope = after.derivative(f"a{late.index(name)}")
            work += triton_lines(slope, "v", late, f"s_{name}", compute, f"e_{name}")
            work.append(f"d{name} = g * s_{name}")
    if set(wanted) - set(late):
        work += triton_lines(after.derivative(), "v", late, "s_v", compute, "r")
        work.append("dv = tl.where(keep, g * s_v * SCALE, 0.0)")
    for name in wanted:
        if name not in late:
            which = "x" if name == "x" else f"a{early.index(name)}"
            slope = before.derivative(which)
            work += triton_lines(slope, "x", early, f"s_{name}", compute, f"d_{name}")
            work.append(f"d{name} = dv * s_{name}")
    inputs = ["g", *(["x", *extras] if saved(fusion) else [])]
    return _filled("dropout_backward", inputs, work, [f"d{w}" for w in wanted], compute)


@cache
def saved(fusion: Fusion) -> bool:
    """Whether the backward reads the inputs: not if every derivative is a constant."""
    return fusion.saves_inputs


@cache
def added(fusion: Fusion) -> tuple[str, ...]:
    """The further tensors that are only added to the result: their gradient is the result's."""
    before, after = fusion.prologue.extras, fusion.epilogue
    one = Pointwise((Step("mul", (1.0, 1.0)),))
    return tuple(f"a{before + i}" for i in range(after.extras) if after.derivative(f"a{i}") == one)


def _filled(
    name: str, inputs: Sequence[str], work: Sequence[str], outputs: Sequence[str], compute: str
) -> Kernel:
    def loads(mask: str) -> list[str]:
        return [f"{v} = tl.load({v}_ptr + i{mask}).to({compute})" for v in inputs]

    def stores(mask: str) -> list[str]:
        return [f"tl.store({v}_ptr + i, {v}.to({v}_ptr.dtype.element_ty){mask})" for v in outputs]

    source = fill(
        _TEMPLATE,
        name=name,
        pointers=[" ".join(f"{v}_ptr," for v in (*inputs, *outputs))],
        work=work,
        load_block=loads(""),
        load_tail=loads(", mask=i < n, other=0.0"),
        store_block=stores(""),
        store_tail=stores(", mask=i < n"),
    )
    return Kernel(name, source)


def takes(x: Tensor, extras: Sequence[Tensor] = ()) -> bool:
    """Whether the kernel runs on these tensors, all of them float64 or none; warns once if not."""
    if not usable(NAME, x, *extras, largest=REACH):
        return False
    double = {t.dtype is torch.float64 for t in (x, *extras)}
    if len(double) > 1:
        fall_back(NAME, "it has no form for float64 among other dtypes")
    return len(double) == 1


def dropout(
    x: Tensor,
    p: float,
    seed: int,
    call: int,
    region: Region,
    fusion: Fusion = PLAIN,
    extras: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`epilogue(dropout(prologue(x)))` by the kernel; contiguous, of `dtype` (default that of `x`).

    `extras` have the shape of `x`, which is that of the region. Differentiable in `x` and `extras`.
    """
    y: Tensor = _Dropout.apply(  # type: ignore[no-untyped-call]
        x, p, seed, call, region, fusion, dtype or x.dtype, *extras
    )
    return y


def reference(
    x: Tensor,
    mask: Tensor,
    p: float,
    fusion: Fusion = PLAIN,
    extras: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same in torch, given the mask of `autopar.runtime.random.keep_mask`."""
    early = fusion.prologue.extras
    u = fusion.prologue(x, *extras[:early])
    v = torch.where(mask, u * _scale(p), 0.0)
    return fusion.epilogue(v, *extras[early:]).to(dtype or x.dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        p: float,
        seed: int,
        call: int,
        region: Region,
        fusion: Fusion,
        dtype: torch.dtype,
        *extras: Tensor,
    ) -> Tensor:
        inputs = [t.contiguous() for t in (x, *extras)]
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        ctx.random = (p, seed, call, region)
        _run(emit(fusion, compute_type(x.dtype)), inputs, [y], *ctx.random)
        ctx.fusion = fusion
        ctx.like = [(t.dtype, t.requires_grad) for t in (x, *extras)]
        if saved(fusion):
            ctx.save_for_backward(*inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        names = ["x", *(f"a{i}" for i in range(len(ctx.like) - 1))]
        needed = {n: dtype for n, (dtype, is_) in zip(names, ctx.like, strict=True) if is_}
        same = {n: grad for n in added(ctx.fusion) if needed.get(n) is grad.dtype}
        made = {
            name: torch.empty(grad.shape, dtype=dtype, device=grad.device)
            for name, dtype in needed.items()
            if name not in same
        }
        if made:
            kernel = emit_backward(ctx.fusion, tuple(made), compute_type(grad.dtype))
            inputs = [grad.contiguous(), *ctx.saved_tensors]
            _run(kernel, inputs, list(made.values()), *ctx.random)
        first, *rest = [{**made, **same}.get(name) for name in names]
        return first, None, None, None, None, None, None, *rest


def _run(
    kernel: Kernel,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    p: float,
    seed: int,
    call: int,
    region: Region,
) -> None:
    n = outputs[0].numel()
    if n == 0:
        return
    starts, length = _starts(region, outputs[0].device)
    limit = threshold(p)
    block = block_size(BLOCK)
    launch(
        kernel,
        (cdiv(n, block),),
        *inputs,
        *outputs,
        starts,
        n,
        length,
        *map(_signed, keys(seed, call)),
        LIMIT=min(limit, MASK32),
        NONE=limit > MASK32,  # of p = 1 nothing is left: no hash reaches 2^32
        SCALE=_scale(p),
        RUNS=min(starts.numel(), 2),
        WIDE=math.prod(region.shape) > 1 << 32,
        BLOCK=block,
    )


@lru_cache(maxsize=REGIONS)
def _starts(region: Region, device: torch.device) -> tuple[Tensor, int]:
    """What `segments` gives, on the device: copied at the first call, not at every one."""
    starts, length = segments(region)
    return torch.from_numpy(starts).to(device), length


def _scale(p: float) -> float:
    return 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def _signed(word: int) -> int:
    """The int32 with these bits, so that no key is taken for an int64."""
    return word - (1 << 32) if word >> 31 else word


def specialisations() -> list[Specialisation]:
    """The forms that models ask for: plain, and with a residual added and GELU before."""
    gelu = parse_pointwise(
        "t0 = mul(x, 0.7071067811865476); t1 = erf(t0); t2 = add(t1, 1.0); t3 = mul(x, t2);"
        " mul(t3, 0.5)"
    )
    residual = Fusion(epilogue=parse_pointwise("add(x, a0)"))
    forms = []
    for fusion, dtype, runs, wide in (
        (Fusion(), "fp32", 1, False),
        (Fusion(), "bf16", 2, False),
        (Fusion(), "fp16", 1, True),
        (residual, "bf16", 1, False),
        (residual, "fp16", 2, False),
        (Fusion(prologue=gelu), "fp32", 2, True),
    ):
        forms.append(_form(emit(fusion), 1 + fusion.extras + 1, dtype, runs, wide))
        reads = 1 + fusion.extras if saved(fusion) else 0
        extras = {f"a{i}" for i in range(fusion.extras)}
        wanted = ("x", *sorted(extras.difference(added(fusion))))
        kernel = emit_backward(fusion, wanted)
        forms.append(_form(kernel, 1 + reads + len(wanted), dtype, runs, wide))
    return forms


def _form(kernel: Kernel, tensors: int, dtype: str, runs: int, wide: bool) -> Specialisation:
    names = [word.strip(" ,") for word in kernel.source.split("(\n", 1)[1].split(",")[:tensors]]
    integers = {"n": "i32", "length": "i32", "k0": "i32", "k1": "i32"}
    return Specialisation(
        kernel,
        {**dict.fromkeys(names, f"*{dtype}"), "starts_ptr": "*i64", **integers},
        {
            "LIMIT": threshold(0.1),
            "NONE": False,
            "SCALE": _scale(0.1),
            "RUNS": runs,
            "WIDE": wide,
            "BLOCK": BLOCK,
        },
        (*names, "n"),
    )
