"""What the ranks of the zoo with interpreted kernels run."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import autopar
from autopar.errors import KernelWarning, UserError
from autopar.plan import plan_from_json
from autopar.runtime.kernels import support
from autopar.runtime.kernels.emit import load
from tests.e2e.training import MODELS, build, error_of, train

KERNEL = "<autopar kernel "  # how the file names of loaded kernels begin


@dataclass(frozen=True)
class Outcome:
    """Relative errors against one device, and what rank 0 did.

    `kernels` counts what its plan has, `ran` names the Triton functions that were launched,
    `fallbacks` are the warnings of those that were not.
    """

    loss: float = 0.0
    gradient: float = 0.0
    parameter: float = 0.0
    worst: str = ""
    kernels: Mapping[str, int] = field(default_factory=dict)
    ran: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    inapplicable: str = ""


def compare_with_kernels(
    name: str, strategy: str, dtype: str, steps: int, file: str, plan: str | None = None
) -> Outcome | None:
    """On every rank: train with `kernels="interpret"`; on rank 0, compare with `file`."""
    entry, keep = MODELS[name], dtype == "float64"
    given = plan_from_json(plan) if plan is not None else None
    _forget_kernels()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = autopar.parallelize(
            build(entry, dtype), strategy=strategy, plan=given, kernels="interpret"
        )
        try:
            run = train(entry, model, steps, keep)
        except UserError as error:
            if "does not apply" not in error.what:
                raise
            return Outcome(inapplicable=error.what)
    if dist.get_rank() != 0:
        return None
    losses, gradients, state = torch.load(Path(file), mmap=True)
    worst: dict[str, float] = {}
    used: dict[str, int] = {}
    for use in model.autopar.plan.kernels:
        used[use.kernel] = used.get(use.kernel, 0) + use.count
    return Outcome(
        loss=max(abs(a - b) / abs(b) for a, b in zip(run.losses, losses, strict=True)),
        gradient=max(
            (error_of(a, b, worst) for a, b in zip(run.gradients, gradients, strict=True)),
            default=0.0,
        ),
        parameter=error_of(run.state, state, worst) if keep else 0.0,
        worst=max(worst, key=worst.__getitem__, default=""),
        kernels=used,
        ran=tuple(sorted({file.split()[2] for file in linecache.cache if KERNEL in file})),
        fallbacks=tuple(str(w.message) for w in caught if issubclass(w.category, KernelWarning)),
    )


def _forget_kernels() -> None:
    """So that what a case runs is loaded by it, and what falls back warns in it."""
    load.cache_clear()
    support.fall_back.cache_clear()
    for file in [file for file in linecache.cache if KERNEL in file]:
        del linecache.cache[file]
