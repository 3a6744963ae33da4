"""Ops that captured graphs use and aten lacks, in the `autopar` namespace of `torch.ops`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_make_library: Any = torch.library.Library  # untyped
_library = _make_library("autopar", "DEF")  # owns the registrations; must stay alive
_library.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, bool training, float momentum, float eps) -> (Tensor, Tensor, Tensor)"
)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation that returns the new running statistics in place of writing them.

    `x` is [N, C, ...], everything else [C]. Without running statistics the last two results are
    empty; when not training they are the running statistics as they came.
    """
    if running_mean is None or running_var is None:
        y = F.batch_norm(x, None, None, weight, bias, training, momentum, eps)
        return y, x.new_empty(0), x.new_empty(0)
    if training:
        running_mean, running_var = running_mean.detach().clone(), running_var.detach().clone()
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return y, running_mean, running_var


_library.impl("batch_norm", _batch_norm, "CompositeImplicitAutograd")

batch_norm = torch.ops.autopar.batch_norm


_library.define("hint(Tensor x, str said) -> Tensor")


def _hint(x: Tensor, said: str) -> Tensor:
    """The identity; `said` is what the user wants of the sharding, as JSON, for the planner."""
    del said
    return x.view_as(x)


_library.impl("hint", _hint, "CompositeImplicitAutograd")

hint = torch.ops.autopar.hint
