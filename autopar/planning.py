"""Capture a module, and search its plan: what `autopar plan` does, in one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .api import undecorated
from .capture import Capture, capture
from .cost.cluster import Cluster
from .errors import UserError
from .passes.prepare import prepare
from .passes.search import search
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
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """The best plan for training `module(*args, **kwargs)` on a cluster.

    Parameters and arguments may be on `meta`. A decorated module is planned as its original, which
    it is from then on. `memory_limit` is bytes per device, `optimizer` a name. Raises UserError
    where the module cannot be captured, the strategy does not apply, or nothing fits.
    """
    progress("capturing")
    captured = capture_training(module, args, kwargs)
    progress("searching")
    return search(
        prepare(captured.graph),
        captured.fingerprint,
        captured.symbols,
        cluster,
        strategy=strategy,
        memory_limit=memory_limit,
        optimizer=optimizer,
        progress=progress,
    )


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
