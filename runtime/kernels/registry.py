"""The kernels there are, by the names of their modules."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

MODULES = (
    "adamw",
    "all_reduce_norm",
    "combine",
    "cross_entropy",
    "dropout",
    "int8",
    "pack",
    "permute",
)


def kernel_module(name: str) -> ModuleType:
    """The module of a kernel; raises KeyError for a name that is not in `MODULES`."""
    if name not in MODULES:
        raise KeyError(name)
    return import_module(f"autopar.runtime.kernels.{name}")
