"""`.item()` of DTensors: the whole tensor's number, not this rank's part of it.

DTensor gives Python the local value even where that is one term of a sum that is still to be made:
`parameter.norm().item()` would be another number on every rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.compat import local_of

from .world import is_of_plan


@functools.cache
def read_whole_scalars() -> None:
    """From now on, `.item()`, `float()`, `bool()` of DTensors on a plan's mesh are collective."""
    torch.library.register_torch_dispatch("aten::_local_scalar_dense", DTensor, _item)


def _item(kind: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    del kind, types, kwargs
    tensor: DTensor = args[0]
    if is_of_plan(tensor.device_mesh) and not all(p.is_replicate() for p in tensor.placements):
        return func(tensor.full_tensor())
    return func(local_of(tensor))
