"""Parameters before there is a plan: DTensors on the mesh of all ranks, whole on each of them.

A loop may keep what it made of them (momentum buffers, averages, a copy of the model) while the
parameters themselves become shards on the plan's mesh. DTensor refuses ops on two meshes. Here the
whole ones are taken to the other mesh, which costs nothing, and what is written to a whole one is
gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from autopar.compat import become_tensor, dtensor_of, let_dispatch, local_of
from autopar.errors import UserError

from .foreign_values import followed, foreign_of, mark
from .on_stage_arguments import call_with, mapped, op_of, tensors_in, written_by
from .python_values import PythonValues


class WholeTensor(PythonValues, DTensor):
    """A DTensor that is replicated on the mesh of all ranks; ops on it run on the local tensor."""

    __slots__ = ()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        return followed(_run, func, args, kwargs or {})

    def _take(self, new: Tensor) -> None:
        foreign = foreign_of(new)
        found = new.full_tensor() if isinstance(new, DTensor) else new
        become_tensor(self, whole_tensor(found.detach(), self.device_mesh))
        mark(self, foreign)

    def numpy(self, *, force: bool = False) -> Any:
        """The tensor's memory."""
        return local_of(self).numpy(force=force)

    def tolist(self) -> Any:
        """The tensor's elements."""
        return local_of(self).tolist()


let_dispatch(WholeTensor)
torch.serialization.add_safe_globals([WholeTensor])


def whole_tensor(local: Tensor, mesh: DeviceMesh) -> WholeTensor:
    """A tensor that every rank has, as a `WholeTensor` on the mesh of all ranks; no copy."""
    placements = [Replicate()] * mesh.ndim
    made: WholeTensor = dtensor_of(
        local, mesh, placements, local.shape, local.stride(), WholeTensor
    )
    return made


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = list(tensors_in(args, kwargs))
    others = [t for t in tensors if isinstance(t, DTensor) and not isinstance(t, WholeTensor)]
    mine = next(t for t in tensors if isinstance(t, WholeTensor))
    if not others:
        return _on_locals(func, args, kwargs, mine)
    written = list(tensors_in(written_by(op_of(func), args, kwargs), {}))
    if not any(isinstance(t, WholeTensor) for t in written):
        mesh = others[0].device_mesh
        return call_with(func, lambda t: _on_mesh(t, mesh), args, kwargs)
    if not all(isinstance(t, WholeTensor) for t in written):
        raise UserError(
            f"{func} writes both to parameters as they are under the plan and to tensors that were "
            "made of them before the first call of the model",
            fix="make those after the first call, or after model.autopar.prepare(batch)",
        )
    return _on_locals(func, *_gathered(args, kwargs), mine)


def _on_locals(func: Any, args: Any, kwargs: Any, like: WholeTensor) -> Any:
    """What the op does to the whole tensors: the same on every rank."""
    outer = {id(local_of(t)): t for t in tensors_in(args, kwargs) if isinstance(t, WholeTensor)}
    result = call_with(func, _local, args, kwargs)
    if op_of(func).changes_shape:
        become_tensor(like, whole_tensor(local_of(like), like.device_mesh))

    def wrapped(value: Tensor) -> Tensor:
        known = outer.get(id(value))
        return whole_tensor(value, like.device_mesh) if known is None else known

    return mapped(wrapped, result)


def _local(tensor: Tensor) -> Tensor:
    return local_of(tensor) if isinstance(tensor, WholeTensor) else tensor


def _on_mesh(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    if not isinstance(tensor, WholeTensor):
        return tensor
    placements = [Replicate()] * mesh.ndim
    made: Tensor = dtensor_of(local_of(tensor), mesh, placements, tensor.shape, tensor.stride())
    return made


def _gathered(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with all other DTensors whole; collective."""

    def whole(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor) and not isinstance(tensor, WholeTensor):
            return tensor.full_tensor()
        return tensor

    return (
        tuple(mapped(whole, a) for a in args),
        {name: mapped(whole, value) for name, value in kwargs.items()},
    )
