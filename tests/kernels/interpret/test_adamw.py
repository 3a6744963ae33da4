"""AdamW over many tensors in one launch: the numbers of torch's optimizers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from autopar.runtime.kernels import adamw as module
from autopar.runtime.kernels.adamw import Form, adamw, emit, reference, specialisations

SIZES = ((3, 5), (), (0, 4), (17000,), (1,), (2048,), (129, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1, "eps": 1e-8}
Lists = dict[str, list[Tensor]]


def values(sizes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def lists(dtype: torch.dtype = torch.float32, amsgrad: bool = False, seed: int = 0) -> Lists:
    """State after some steps, of several ages."""
    made: Lists = {"params": values(SIZES, dtype, seed), "grads": values(SIZES, dtype, seed + 1)}
    made["exp_avgs"] = [0.1 * x for x in values(SIZES, dtype, seed + 2)]
    made["exp_avg_sqs"] = [0.1 * x.square() for x in values(SIZES, dtype, seed + 3)]
    made["max_exp_avg_sqs"] = [x.clone() for x in made["exp_avg_sqs"]] if amsgrad else []
    made["state_steps"] = [torch.tensor(1.0 + 7 * (i % 3)) for i in range(len(SIZES))]
    return made


def numbers(**changed: Any) -> dict[str, Any]:
    known = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
    return {**known, **changed}


def close(got: Tensor, wanted: Tensor, before: Tensor, ulps: float) -> None:
    """Within a few units in the last place of the old value or of the change, whichever is more.

    Half-precision results are rounded once from float32 ones that differ in their last digits, so
    that one of them may be the next number.
    """
    assert got.dtype == wanted.dtype
    new, old, wanted = got.double(), before.double(), wanted.detach().double()
    scale = torch.maximum(old.abs(), (wanted - old).abs()) * torch.finfo(got.dtype).eps
    worst = float(((new - wanted).abs() / (scale + 1e-300)).max()) if got.numel() else 0.0
    assert worst <= ulps, f"{worst:.1f} ulp"


def check(made: Lists, ulps: float = 8.0, **options: Any) -> Lists:
    """The kernel against its reference."""
    before = copy.deepcopy(made)
    wanted, rest = copy.deepcopy((made, options))
    reference(**wanted, **rest)
    adamw(**made, **options)
    for name, tensors in made.items():
        for got, want, old in zip(tensors, wanted[name], before[name], strict=True):
            close(got, want, old, ulps)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capturable", [False, True])
def test_kernel_and_reference(dtype: torch.dtype, capturable: bool) -> None:
    check(lists(dtype), capturable=capturable, **numbers())


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True, "weight_decay": 0.0},
        {"decoupled": False},
        {"amsgrad": True, "capturable": True},
        {"beta1": 0.0, "beta2": 0.5, "capturable": True},
        {"lr": torch.tensor(0.02), "capturable": True},
        {"lr": torch.tensor(0.02)},
        {"grad_scale": torch.tensor(1024.0), "found_inf": torch.tensor(0.0)},
        {"grad_scale": torch.tensor(1000.0), "clip": torch.tensor(0.3)},
        {"clip": torch.tensor(0.3), "write_grads": False},
    ],
    ids=lambda o: ",".join(o),
)
def test_options(options: dict[str, Any]) -> None:
    check(lists(amsgrad=options.get("amsgrad", False)), **numbers(**options))


def test_a_nonzero_found_inf_leaves_everything() -> None:
    made = lists(amsgrad=True)
    copies = [torch.full_like(p, 7.0, dtype=torch.bfloat16) for p in made["params"]]
    before = copy.deepcopy(made)
    adamw(
        **made,
        copies=copies,
        amsgrad=True,
        grad_scale=torch.tensor(2.0),
        found_inf=torch.tensor(1.0),
        **numbers(),
    )
    for name, tensors in made.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[name], strict=True)), name
    assert all(bool((c == 7.0).all()) for c in copies)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_copies_are_the_cast_parameters(to: torch.dtype) -> None:
    made = lists()
    buffer = torch.zeros(sum(p.numel() for p in made["params"]), dtype=to)
    parts = buffer.split([p.numel() for p in made["params"]])
    copies = [c.view(p.shape) for c, p in zip(parts, made["params"], strict=True)]
    adamw(**made, copies=copies, **numbers())
    assert torch.equal(buffer, torch.cat([p.flatten() for p in made["params"]]).to(to))


def test_gradients_of_another_dtype_and_unaligned_shards() -> None:
    made = lists()
    made["grads"] = [g.bfloat16() for g in made["grads"]]
    flat = torch.cat([torch.zeros(1), *(p.flatten() for p in made["params"])])
    parts = flat[1:].split([p.numel() for p in made["params"]])
    made["params"] = [x.view(p.shape) for x, p in zip(parts, made["params"], strict=True)]
    check(made, **numbers())
    assert flat[0] == 0.0


def test_versions_say_that_it_wrote() -> None:
    made = lists()
    before = [p._version for p in made["params"]]
    adamw(**made, **numbers())
    assert all(p._version > v for p, v in zip(made["params"], before, strict=True))


def test_nothing_to_do() -> None:
    adamw([], [], [], [], [], [], **numbers())
    empty = [torch.zeros(0, 3)]
    adamw(empty, empty, empty, empty, [], [torch.tensor(1.0)], **numbers())


def test_a_learning_rate_on_the_device_needs_the_steps_there() -> None:
    with pytest.raises(ValueError, match="needs the steps there"):
        emit(Form(lr=True))


MAKERS = {
    "adamw": lambda p, **o: torch.optim.AdamW(p, **o),
    "adam": lambda p, **o: torch.optim.Adam(p, **o),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_five_steps_of_torchs_optimizers(name: str, fused: bool, dtype: torch.dtype) -> None:
    """Each step from the same state: what is compared is one step's rounding."""
    own = [nn.Parameter(x) for x in values(SIZES, dtype, 0)]
    optimizer = MAKERS[name](own, fused=fused, **PLAIN)
    keys = ("exp_avg", "exp_avg_sq")
    state = [torch.zeros_like(p) for p in own], [torch.zeros_like(p) for p in own]
    for step in range(1, 6):
        grads = values(SIZES, dtype, step)
        mine = [p.detach().clone() for p in own]
        # L2 decay may cancel a gradient: what was added is as large as that gradient.
        sums = [m.abs() + 0.1 * g.abs() for m, g in zip(state[0], grads, strict=True)]
        old = [*(x.clone() for x in mine), *sums]
        moments = [[x.clone() for x in part] for part in state]
        steps = [torch.tensor(float(step)) for _ in own]
        adamw(
            mine,
            [g.clone() for g in grads],
            *moments,
            [],
            steps,
            decoupled=name == "adamw",
            capturable=fused,
            **numbers(),
        )
        for p, g in zip(own, grads, strict=True):
            p.grad = g
        optimizer.step()
        state = tuple([optimizer.state[p][k].clone() for p in own] for k in keys)  # type: ignore[assignment]
        # The default one rounds every one of its ops to bfloat16.
        ulps = 8.0 if fused or dtype is not torch.bfloat16 else 32.0
        for got, want, was in zip([*mine, *moments[0]], [*own, *state[0]], old, strict=True):
            close(got, want, was, ulps)


def test_forms_and_blocks() -> None:
    made = specialisations()
    assert len(made) <= 12
    assert {form.constants["BLOCK"] for form in made} == {1024, 2048}
    assert all(f"def {module.NAME}(" in form.kernel.source for form in made)


def test_source() -> None:
    assert_expected_inline(
        emit(Form(copy=torch.bfloat16, clip=True)).source,
        """\
import triton
import triton.language as tl


@triton.jit
def adamw(
    rows_ptr, blocks_ptr, clip_ptr,
    size: tl.float32, root: tl.float32, beta1: tl.float32, rest1: tl.float32, beta2: tl.float32, rest2: tl.float32, eps: tl.float32, decay: tl.float32,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.load(blocks_ptr + 2 * tl.program_id(0))
    first = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    entry = rows_ptr + row.to(tl.int64) * 6
    n = tl.load(entry) - first
    p_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + first
    g_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32)) + first
    m_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.float32)) + first
    v_ptr = tl.load(entry + 4).to(tl.pointer_type(tl.float32)) + first
    c_ptr = tl.load(entry + 5).to(tl.pointer_type(tl.bfloat16)) + first
    if ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
        c_ptr = tl.multiple_of(c_ptr, 16)
    factor = tl.load(clip_ptr).to(tl.float32)
    i = tl.arange(0, BLOCK)
    if n >= BLOCK:
        p = tl.load(p_ptr + i).to(tl.float32)
        g = tl.load(g_ptr + i).to(tl.float32)
        m = tl.load(m_ptr + i).to(tl.float32)
        v = tl.load(v_ptr + i).to(tl.float32)
        g = g * factor
        p = p - decay * p
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        p = p - size * m / (tl.sqrt(v) / root + eps)
        tl.store(p_ptr + i, p.to(p_ptr.dtype.element_ty))
        tl.store(m_ptr + i, m.to(m_ptr.dtype.element_ty))
        tl.store(v_ptr + i, v.to(v_ptr.dtype.element_ty))
        tl.store(c_ptr + i, p.to(c_ptr.dtype.element_ty))
    else:
        p = tl.load(p_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        g = g * factor
        p = p - decay * p
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        p = p - size * m / (tl.sqrt(v) / root + eps)
        tl.store(p_ptr + i, p.to(p_ptr.dtype.element_ty), mask=i < n)
        tl.store(m_ptr + i, m.to(m_ptr.dtype.element_ty), mask=i < n)
        tl.store(v_ptr + i, v.to(v_ptr.dtype.element_ty), mask=i < n)
        tl.store(c_ptr + i, p.to(c_ptr.dtype.element_ty), mask=i < n)
""",
    )
