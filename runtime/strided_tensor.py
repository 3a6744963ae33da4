"""DTensors whose pieces are several runs of a dim: checkpoints must write every run where it is.

DTensor computes with such pieces, and describes them to checkpoints as one run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from autopar.compat import StridedShard, dtensor_of, let_dispatch, local_of

from .checkpoint_pieces import ExactPieces


class StridedTensor(ExactPieces, DTensor):
    """A DTensor with a strided placement; what ops return is one, too, if it is placed so."""

    __slots__ = ()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        outer: dict[int, Any] = {}
        kept: list[Any] = []  # so that no other tensor gets the id of one of them

        def enter(value: Any) -> Any:
            if not isinstance(value, StridedTensor):
                return value
            inner = _as(DTensor, value)
            outer[id(inner)] = value
            kept.append(inner)
            return inner

        def leave(value: Any) -> Any:
            return outer[id(value)] if id(value) in outer else _if_strided(value)

        result = func(*tree_map(enter, args), **tree_map(enter, kwargs or {}))
        return tree_map(leave, result)


let_dispatch(StridedTensor)
torch.serialization.add_safe_globals([StridedTensor])


def as_strided_tensor(tensor: DTensor) -> DTensor:
    """The same tensor as a `StridedTensor` if a placement is strided; outside of autograd."""
    found: DTensor = _if_strided(tensor)
    return found


def _if_strided(value: Any) -> Any:
    if type(value) is not DTensor or not _is_strided(value):
        return value
    return _as(StridedTensor, value)


def _is_strided(tensor: DTensor) -> bool:
    return any(isinstance(placement, StridedShard) for placement in tensor.placements)


def _as(kind: Any, tensor: DTensor) -> Any:
    mesh, placements = tensor.device_mesh, tensor.placements
    return dtensor_of(local_of(tensor), mesh, placements, tensor.shape, tensor.stride(), kind)
