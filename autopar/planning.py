"""Capture a module, and search its plan: what `autopar plan` does, in one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .api import undecorated
from .capture import capture
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
    if not isinstance(module, nn.Module):
        raise UserError(
            f"a plan is made for a torch.nn.Module, not {type(module).__name__}",
            fix="wrap the function in a module's forward",
        )
    undecorated(module)
    was_training = [m.training for m in module.modules()]
    progress("capturing")
    try:
        if not module.training:
            module.train()
        with torch.enable_grad():
            captured = capture(module, args, kwargs)
    finally:
        for child, training in zip(module.modules(), was_training, strict=True):
            child.training = training
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
