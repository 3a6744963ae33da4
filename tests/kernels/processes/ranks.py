"""One rank of the test: real processes, real flags in shared memory, the kernel interpreted."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.errors import KernelWarning
from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise

RANKS = 4
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    residual_dtype: torch.dtype | None = None
    epilogue: Pointwise = IDENTITY
    out: torch.dtype | None = None
    weighted: bool = True


CAST = parse_pointwise("t0 = sigmoid(x); t1 = mul(x, t0); cast_bf16(t1)")
CASES = {
    "odd": Case(5, 33),
    "one": Case(1, 1),
    "bf16": Case(7, 48, torch.bfloat16),
    "fp16": Case(3, 64, torch.float16),
    "fp64": Case(3, 20, torch.float64),
    "wide residual": Case(4, 40, torch.bfloat16, torch.float32),
    "cast": Case(4, 40, epilogue=CAST, out=torch.bfloat16),
    "no weight": Case(4, 40, weighted=False),
    "empty": Case(0, 40),
    "too large": Case(4, 9000),
}
CALLS = 20


def call_case(call: int) -> Case:
    """Shapes that change from call to call."""
    return Case(1 + call * 5 % 7, (33, 64, 8)[call % 3])


def inputs(case: Case, seed: int) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor, Tensor]:
    """All ranks' partial values, the residual, the weight and the gradients of both results."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (case.rows, case.width)
    partials = [draw(*shape).to(case.dtype) for _ in range(RANKS)]
    kept = case.residual_dtype or case.dtype
    residual = draw(*shape).to(kept)
    weight = draw(case.width).to(case.dtype) if case.weighted else None
    return partials, residual, weight, draw(*shape).to(case.out or kept), draw(*shape).to(kept)


def main(rank: int, folder: Path) -> None:
    from autopar.runtime.all_reduce_norm import all_reduce_norm
    from autopar.runtime.shared_memory import make_group

    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    group = make_group()
    results: dict[str, Any] = {}
    for call in range(CALLS):
        partials, residual, weight, *_ = inputs(call_case(call), call)
        if call % RANKS == rank:
            time.sleep(0.03)  # the others wait, or run ahead where they may
        results[f"call {call}"] = all_reduce_norm(partials[rank], residual, weight, EPS, group)
    results["warnings"] = []
    for seed, (name, case) in enumerate(CASES.items(), 100):
        partials, residual, weight, *grads = inputs(case, seed)
        leaves = [partials[rank], residual, *([] if weight is None else [weight])]
        for leaf in leaves:
            leaf.requires_grad_()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = all_reduce_norm(
                partials[rank],
                residual,
                weight,
                EPS,
                group,
                epilogue=case.epilogue,
                dtype=case.out,
            )
        found = [str(w.message) for w in caught if w.category is KernelWarning]
        results["warnings"] += [f"{name}: {text}" for text in found]
        backward = torch.autograd.grad(made, leaves, grads)
        results[name] = (*(t.detach() for t in made), *backward)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
