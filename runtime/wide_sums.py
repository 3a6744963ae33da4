"""Gradients of leaves in 16 bits, added up over micro-batches in float32.

The gradient of a whole batch is one product, whose sum is float32 inside and rounded once. Sums of
micro-batches in the dtype of the leaf would be rounded with every one of them, and stop growing
where what one adds is less than half a unit in the last place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .deferred_weights import add_to_leaf

_AT_ONCE = 1 << 20  # elements that a CPU widens at a time, so that they stay in its caches


def needs_wide_sum(dtype: torch.dtype) -> bool:
    """Whether several gradients of that dtype are added up in a wider one."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


class WideSums:
    """The float32 sums of leaves that are watched, beside their `.grad`, which stays empty.

    Leaves refer to it, and it refers to none: neither keeps the other. It is asked about leaves
    that live as long as it does.
    """

    def __init__(self) -> None:
        self._totals: dict[int, Tensor | None] = {}

    def watch(self, leaf: nn.Parameter) -> None:
        """Take every gradient that autograd gives a leaf from now on."""
        self._totals[id(leaf)] = None
        leaf.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def add(self, leaf: Tensor, gradient: Tensor) -> None:
        """Add to the gradient of a leaf; where nobody watches it, to its `.grad`."""
        total = self._totals.get(id(leaf))
        if id(leaf) not in self._totals:
            add_to_leaf(leaf, gradient)
        elif total is None:
            self._totals[id(leaf)] = gradient.to(torch.float32)
        else:
            _add(total, gradient)

    def settle(self, leaf: Tensor) -> None:
        """Round the sum of a leaf to its `.grad`, once; where nobody watches it, do nothing."""
        total = self._totals.pop(id(leaf), None)
        if total is not None:
            leaf.grad = total.to(leaf.dtype)

    def _take(self, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            self.add(leaf, gradient)


def _add(total: Tensor, gradient: Tensor) -> None:
    """Add in place; a CPU would make a float32 copy of the whole gradient first."""
    if total.device.type != "cpu" or total.numel() <= _AT_ONCE:
        total.add_(gradient)
        return
    rows = max(1, _AT_ONCE * total.shape[0] // total.numel())
    for first in range(0, total.shape[0], rows):
        total[first : first + rows].add_(gradient[first : first + rows])
