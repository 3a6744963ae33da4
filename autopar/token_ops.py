"""Forms for any number of token dims of ops that aten has for `[tokens, features]` alone.

`aten.cross_entropy_loss` takes more dims only behind the classes, and `aten.addmm` none. With these
a graph can keep `[batch, sequence]` apart where the user's code flattened them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_make_library: Any = torch.library.Library  # untyped
_library = _make_library("autopar", "FRAGMENT")  # owns the registrations; must stay alive
_library.define(
    "cross_entropy(Tensor self, Tensor target, Tensor? weight=None, int reduction=1, "
    "SymInt ignore_index=-100, float label_smoothing=0.0) -> Tensor"
)
_library.define("addmm(Tensor self, Tensor mat1, Tensor mat2) -> Tensor")

_REDUCTIONS = ("none", "mean", "sum")  # by at::Reduction


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy` of logits [..., C], with the classes last, and as many targets [...].

    Class probabilities as targets are [..., C]. Computes what flattening the tokens computes.
    """
    loss = F.cross_entropy(
        logits.flatten(0, -2),
        target.flatten(0, -2) if target.is_floating_point() else target.flatten(),
        weight,
        reduction=_REDUCTIONS[reduction],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss if reduction else loss.view(logits.shape[:-1])


def _addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`bias + x @ weight` of x [..., k] and a weight [k, n], as one `torch.addmm`."""
    return torch.addmm(bias, x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[1])


_library.impl("cross_entropy", _cross_entropy, "CompositeImplicitAutograd")
_library.impl("addmm", _addmm, "CompositeImplicitAutograd")

cross_entropy = torch.ops.autopar.cross_entropy
addmm = torch.ops.autopar.addmm
