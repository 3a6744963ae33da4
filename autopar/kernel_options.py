"""What a user says of autopar's own kernels: `parallelize(kernels=...)`."""

from __future__ import annotations

import importlib.util

from .compression import compressed_axes
from .errors import UserError
from .kernel_use import KERNEL_MODES
from .plan import Plan
from .runtime.kernels.support import imported_to_compile, interpreted


def checked_kernels(mode: str) -> str:
    """The same; raises UserError for what there is not, or what this process cannot do."""
    if mode not in KERNEL_MODES:
        choices = ", ".join(map(repr, KERNEL_MODES))
        raise UserError(f"unknown kernels {mode!r}", fix=f"use one of {choices}")
    if mode != "interpret":
        return mode
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "kernels='interpret' needs Triton, which is not installed",
            fix="pip install triton, or leave kernels= out",
        )
    if imported_to_compile():
        raise UserError(
            "kernels='interpret' comes too late: triton was imported to compile in this process",
            fix="set TRITON_INTERPRET=1 in the environment that the script is started with",
        )
    if not interpreted():
        raise UserError(
            "kernels='interpret' needs TRITON_INTERPRET=1",
            fix="set it in the environment that the script is started with: "
            "TRITON_INTERPRET=1 autopar run ...",
        )
    return mode


def axes_of(plan: Plan, compress: str | None) -> tuple[str, ...]:
    """The axes along which a user's compression has gradients travel."""
    return compressed_axes(plan.mesh) if compress is not None else ()
