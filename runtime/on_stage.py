"""Parameters of pipeline stages: tensors on the mesh of all stages, held by one stage's ranks.

All parameters of a plan are DTensors on its one mesh, so that optimizers, gradient clipping and
checkpoints see one kind of tensor. A pipeline's parameter has the placement `OnStage(s)` on the
mesh axis of the stages: ranks of stage `s` hold it (sharded on the other axes as ever), all others
an empty local tensor. Every rank calls the same operations on all parameters, as for DTensors.

A placement alone would not do: DTensor's rules for ops know no placement but their own, so norms
and in-place updates would raise or gather every tensor first. `StagedTensor` is a DTensor that
runs its own ops (`on_stage_ops`): elementwise on what each rank has, others on the stage alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from autopar.compat import dtensor_like, dtensor_of, let_dispatch, local_of

from .checkpoint_pieces import ExactPieces
from .foreign_values import followed
from .on_stage_ops import run
from .plan_tensor import PlanTensor, as_plan_tensor
from .python_values import PythonValues
from .stage_gather import gathered
from .stage_placement import (
    OnStage,
    axis_of,
    empty_piece,
    everywhere,
    is_here,
    kept_on_stage,
    stage_of,
)
from .strided_tensor import redistributed

__all__ = [
    "OnStage",
    "StagedTensor",
    "axis_of",
    "empty_piece",
    "is_here",
    "on_stage",
    "placed_like",
    "stage_gradients",
    "stage_of",
]


class StagedTensor(ExactPieces, PythonValues, DTensor):
    """A DTensor with an `OnStage` placement on one mesh axis."""

    __slots__ = ()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        return followed(functools.partial(run, cls), func, args, kwargs or {})

    def redistribute(
        self,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        **options: Any,
    ) -> DTensor:
        """The same tensor placed otherwise; collective, differentiable."""
        if placements is None:
            raise RuntimeError("placements is needed for redistribute")
        if tuple(placements) == self.placements:
            return self.view_as(self)  # type: ignore[return-value]
        wanted = [p for p in placements if isinstance(p, OnStage)]
        found: DTensor = _Gather.apply(self)  # type: ignore[no-untyped-call]
        del device_mesh, options
        if not wanted:
            return redistributed(found, placements)
        axis = list(placements).index(wanted[0])
        elsewhere = redistributed(found, everywhere(tuple(placements), axis))
        return on_stage(elsewhere, axis, wanted[0].stage)

    def to_local(self, *, grad_placements: Sequence[Placement] | None = None) -> Tensor:
        """This rank's piece, empty on other stages; gradients come back on the stage."""
        del grad_placements
        if not torch.is_grad_enabled():
            return local_of(self)
        local: Tensor = _ToLocal.apply(self)  # type: ignore[no-untyped-call]
        return local

    @staticmethod
    def __tensor_unflatten__(
        inner: Any, spec: Any, outer_size: Any, outer_stride: Any
    ) -> StagedTensor:
        placements = spec[0]
        mesh, local = inner["device_mesh"], inner["_local_tensor"]
        made: StagedTensor = dtensor_of(
            local, mesh, placements, outer_size, outer_stride, StagedTensor
        )
        made.requires_grad_(spec[-1])
        return made


let_dispatch(StagedTensor)
torch.serialization.add_safe_globals([StagedTensor, OnStage])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> DTensor:
        ctx.axis, ctx.stage, ctx.placements = axis_of(tensor), stage_of(tensor), tensor.placements
        return gathered([tensor])[0]

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> Any:
        wanted = tuple(Replicate() if p.is_partial() else p for p in ctx.placements)
        placed = redistributed(gradient, everywhere(wanted, ctx.axis))
        return kept_on_stage(placed, ctx.axis, ctx.stage, StagedTensor)


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor, axis: int, stage: int) -> Any:
        return kept_on_stage(tensor, axis, stage, StagedTensor)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> Any:
        return gathered([gradient])[0], None, None


class _ToLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.like = tensor.detach()
        local = local_of(tensor)
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return dtensor_like(gradient, ctx.like)


def on_stage(tensor: DTensor, axis: int, stage: int) -> StagedTensor:
    """A tensor that is whole on every coordinate of a mesh axis, kept on one; differentiable.

    Raises ValueError if it is not replicated on that axis.
    """
    if not tensor.placements[axis].is_replicate():
        raise ValueError(f"a tensor with {tensor.placements[axis]} cannot be kept on one stage")
    made: StagedTensor = _Keep.apply(tensor, axis, stage)  # type: ignore[no-untyped-call]
    return made


def placed_like(tensor: DTensor, parameter: DTensor) -> DTensor:
    """A DTensor on the same mesh, placed as a parameter is; collective where that takes it."""
    axis, stage = axis_of(parameter), stage_of(parameter)
    if axis is None or isinstance(tensor, StagedTensor):
        placed = redistributed(tensor, parameter.placements)
        return as_plan_tensor(placed) if isinstance(parameter, PlanTensor) else placed
    assert stage is not None
    placements = everywhere(parameter.placements, axis)
    return on_stage(redistributed(tensor, placements), axis, stage)


def stage_gradients(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], takes_part: Sequence[bool]
) -> list[Tensor | None]:
    """Local gradients for `runtime.locals`, empty for parameters that this rank does not hold.

    `takes_part` says, alike on all ranks, which parameters get a gradient in this step.
    """
    found: list[Tensor | None] = []
    for parameter, gradient, wanted in zip(parameters, gradients, takes_part, strict=True):
        if gradient is not None or not wanted or not isinstance(parameter, DTensor):
            found.append(gradient)
        else:
            found.append(None if is_here(parameter) else torch.empty_like(local_of(parameter)))
    return found
