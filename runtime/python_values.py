"""What Python asks of a distributed tensor is answered for the whole one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.compat import local_of


def _repr(tensor: Any) -> str:
    """As of an ordinary tensor if this rank has all of it, else its piece; never collective."""
    local = local_of(tensor)
    if type(local) is not Tensor or not all(p.is_replicate() for p in tensor.placements):
        return DTensor.__repr__(tensor)  # type: ignore[no-untyped-call,no-any-return]
    text = repr(local.detach().requires_grad_(tensor.requires_grad))
    return f"Parameter containing:\n{text}" if isinstance(tensor, nn.Parameter) else text


class PythonValues:
    """For kinds of DTensor: `numpy`, `tolist`, text, copies, and `tensor.data = other`.

    DTensor gives its own piece here, or loses what is set.
    """

    __slots__ = ()

    @property
    def data(self: Any) -> Tensor:
        """The tensor without its graph; what is set takes its place, placed as it is."""
        found: Tensor = self.detach()
        return found

    @data.setter
    def data(self: Any, new: Tensor) -> None:
        self._take(new)

    def _take(self: Any, new: Tensor) -> None:
        from .plan_tensor import set_data  # which has a kind of these tensors

        set_data(self, new)

    def numpy(self: Any, *, force: bool = False) -> Any:
        """All of the tensor, which cannot be written to; collective."""
        found = self.full_tensor().numpy(force=force)
        found.setflags(write=False)
        return found

    def __array__(self: Any, dtype: Any = None) -> Any:
        return self.detach().numpy().__array__(dtype)

    def tolist(self: Any) -> Any:
        """All of the tensor's elements; collective."""
        return self.full_tensor().tolist()

    __repr__: Any = _repr

    def __str__(self: Any) -> str:
        """As of an ordinary tensor for a number, which is collective; else as `repr`."""
        return repr(self if self.dim() else self.detach().full_tensor())

    def __format__(self: Any, spec: str) -> str:
        return format(str(self) if self.dim() else self.detach().item(), spec)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only tensors that no other tensors were computed into are copied")
        with torch.no_grad():
            made = self.detach().clone()
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, requires_grad=self.requires_grad)  # as torch's: no gradient
        else:
            made.requires_grad_(self.requires_grad)
            if self.grad is not None:
                made.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made
