"""autopar: an auto-parallelizing compiler for single-device PyTorch code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopar.errors import UserError

if TYPE_CHECKING:
    from autopar.api import parallelize
    from autopar.hints import hint
    from autopar.runtime.checkpoint import load_checkpoint, save_checkpoint
    from autopar.runtime.deferred import deferred

__version__ = "0.1.0"
__all__ = [
    "UserError",
    "__version__",
    "deferred",
    "hint",
    "load_checkpoint",
    "parallelize",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    # Late, so that `import autopar.ir` loads neither the passes nor the runtime.
    if name == "parallelize":
        from autopar.api import parallelize

        return parallelize
    if name == "hint":
        from autopar.hints import hint

        return hint
    if name == "deferred":
        from autopar.runtime.deferred import deferred

        return deferred
    if name in ("load_checkpoint", "save_checkpoint"):
        from autopar.runtime import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'autopar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
