"""Modules whose matrix work runs in bfloat16 while their parameters stay in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Autocast(nn.Module):
    """A module under `torch.autocast`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(*args, **kwargs)
