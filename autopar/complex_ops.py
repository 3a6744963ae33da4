"""Forms with a derivative for complex numbers of ops that torch differentiates for real ones alone.

Writing into a slice of a complex tensor is `aten.slice_scatter` in a graph without mutation, which
raises where a gradient is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_make_library: Any = torch.library.Library  # untyped
_library = _make_library("autopar", "FRAGMENT")  # owns the registrations; must stay alive
_library.define(
    "slice_scatter(Tensor self, Tensor src, int dim=0, SymInt? start=None, SymInt? end=None, "
    "SymInt step=1) -> Tensor"
)
_library.define("select_scatter(Tensor self, Tensor src, int dim, SymInt index) -> Tensor")


def _slice_scatter(
    x: Tensor,
    src: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    """`aten.slice_scatter` of real and imaginary parts."""
    parts, new = torch.view_as_real(x.resolve_conj()), torch.view_as_real(src.resolve_conj())
    made = torch.slice_scatter(parts, new, dim % x.dim(), start, end, step)
    return torch.view_as_complex(made)


def _select_scatter(x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """`aten.select_scatter` of real and imaginary parts."""
    parts, new = torch.view_as_real(x.resolve_conj()), torch.view_as_real(src.resolve_conj())
    return torch.view_as_complex(torch.select_scatter(parts, new, dim % x.dim(), index))


_library.impl("slice_scatter", _slice_scatter, "CompositeImplicitAutograd")
_library.impl("select_scatter", _select_scatter, "CompositeImplicitAutograd")

slice_scatter = torch.ops.autopar.slice_scatter
select_scatter = torch.ops.autopar.select_scatter
