"""Capture a module, and search its plan: what `autopar plan` does, in one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .api import undecorated
from .capture import Capture, capture
from .collector import collector_paused
from .cost.cluster import Cluster
from .errors import UserError
from .first_plan import powers_of_two, that_runs
from .hints import hints_of
from .ir.hint import Hint
from .kernel_gains import with_kernels_counted
from .passes.choose_kernels import choose_kernels
from .passes.hinted import search_hinted
from .passes.prepare import prepare
from .passes.search import MODES
from .pipeline_options import pipelines_asked
from .plan import Plan


def make_plan(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    cluster: Cluster,
    *,
    strategy: str = "auto",
    memory_limit: float | None = None,
    optimizer: str = "adamw",
    micro_batches: Sequence[int] | None = None,
    recompute: Sequence[str] | None = None,
    hints: Sequence[Hint] = (),
    stages: int | None = None,
    schedule: str | None = None,
    kernels: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """The best plan for training `module(*args, **kwargs)` on a cluster.

    Parameters and arguments may be on `meta`. A decorated module is planned as its original, which
    it is from then on. `memory_limit` is bytes per device, `optimizer` a name. `micro_batches`
    (default: the powers of two up to 64 that divide the batch) and `recompute` (of `MODES`; default
    all) are what may be tried; `hints` come on top of those in the code. With `stages` the plan has
    a pipeline of so many, with `schedule` those that it has follow that; `kernels` is what
    `choose_kernels` takes. Raises UserError where the
    module cannot be captured, the strategy does not apply, a hint cannot be kept, or nothing fits.
    """
    for tensor in tree_flatten((tuple(args), dict(kwargs)))[0]:
        if isinstance(tensor, Tensor) and not tensor.numel():
            raise UserError(
                f"an input of forward is empty: its shape is {list(tensor.shape)}",
                fix="plan for inputs whose sizes are positive",
            )
    pipelines = pipelines_asked(strategy, stages, schedule, micro_batches)
    progress("capturing")
    hints = [*hints_of(module), *hints]
    captured = capture_training(module, args, kwargs, fold=True)
    batch = next((size for symbol, size in captured.symbols.items() if symbol.name == "b"), None)
    counts = micro_batch_counts(batch, micro_batches)
    progress("searching")
    graph = prepare(captured.graph)

    def best(counts: tuple[int, ...]) -> Plan:
        return search_hinted(
            graph,
            captured.fingerprint,
            captured.symbols,
            cluster,
            hints,
            micro_batches=counts,
            recompute=MODES if recompute is None else tuple(recompute),
            strategy=strategy,
            memory_limit=memory_limit,
            optimizer=optimizer,
            progress=progress,
            pipelines=pipelines,
        )

    plan = that_runs(best, graph, captured.symbols, counts)
    progress("choosing kernels")
    found = choose_kernels(graph, captured.symbols, plan, cluster, kernels, (), optimizer)
    return with_kernels_counted(plan, found)


def micro_batch_counts(batch: int | None, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """How many micro-batches a step may have; `batch` is None where forward fixes its size.

    Raises UserError where one that is asked for is not positive or does not divide the batch.
    """
    if asked is None:
        return powers_of_two(batch)
    for k in asked:
        if k < 1:
            raise UserError(f"the number of micro-batches {k} is not positive")
        if k > 1 and batch is None:
            raise UserError(
                f"{k} micro-batches need a batch that can be divided, and this one is of a single "
                "row, or of a size that forward fixes",
                fix="leave --micro-batches out",
            )
        if batch is not None and batch % k:
            raise UserError(
                f"{k} micro-batches do not divide the batch of {batch}",
                fix="choose numbers that divide the batch",
            )
    return tuple(dict.fromkeys(asked))


@collector_paused()
def capture_training(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    dynamic_sequence: bool = False,
    fold: bool = False,
) -> Capture:
    """Capture `module(*args, **kwargs)` as it is trained, whatever its present mode.

    A decorated module is captured as its original, which it is from then on; see `capture` for
    `dynamic_sequence` and `fold`. Raises UserError where it cannot be captured.
    """
    if not isinstance(module, nn.Module):
        raise UserError(
            f"a plan is made for a torch.nn.Module, not {type(module).__name__}",
            fix="wrap the function in a module's forward",
        )
    undecorated(module)
    was_training = [m.training for m in module.modules()]
    try:
        if not module.training:
            module.train()
        with torch.enable_grad():
            return capture(module, args, kwargs, dynamic_sequence=dynamic_sequence, fold=fold)
    finally:
        for child, training in zip(module.modules(), was_training, strict=True):
            child.training = training
