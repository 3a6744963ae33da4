"""DTensors whose pieces are several runs of a dim: checkpoints must write every run where it is.

DTensor computes with such pieces, and describes them to checkpoints as one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from autopar.compat import TORCH_VERSION, StridedShard, dtensor_of, let_dispatch, local_of

from .checkpoint_pieces import ExactPieces, held_runs
from .plan_tensor import PlanTensor
from .shared_memory import make_group


class StridedTensor(ExactPieces, PlanTensor):
    """A DTensor with a strided placement; what ops return is one, too, if it is placed so."""

    __slots__ = ()

    def redistribute(
        self,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        **options: Any,
    ) -> DTensor:
        """The same tensor placed otherwise; collective, differentiable."""
        if TORCH_VERSION >= (2, 13) or placements is None:
            return super().redistribute(device_mesh, placements, **options)
        return redistributed(self, placements)


let_dispatch(StridedTensor)
torch.serialization.add_safe_globals([StridedTensor])


def is_strided(tensor: DTensor) -> bool:
    """Whether a piece of the tensor is several runs of a dim."""
    return any(isinstance(placement, StridedShard) for placement in tensor.placements)


# -- redistribution, which torch before 2.13 refuses for these layouts -----------------------------


def redistributed(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """The same tensor placed otherwise, whatever of it is strided; collective, differentiable."""
    wanted = tuple(placements)
    if TORCH_VERSION >= (2, 13) or not (is_strided(tensor) or any(map(_strides, wanted))):
        return tensor.redistribute(tensor.device_mesh, wanted)
    if wanted == tensor.placements:
        return tensor
    plain: DTensor = tensor
    if is_strided(tensor):
        plain = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    plain = plain.redistribute(plain.device_mesh, _without_strides(wanted))
    if any(map(_strides, wanted)):
        plain = _Cut.apply(plain, wanted)  # type: ignore[no-untyped-call]
    return plain


def _strides(placement: Placement) -> bool:
    return isinstance(placement, StridedShard)


def _without_strides(placements: Sequence[Placement]) -> tuple[Placement, ...]:
    return tuple(Replicate() if _strides(p) else p for p in placements)


def gather_strided(tensor: DTensor) -> DTensor:
    """The tensor with what is strided brought to all ranks of the axis; collective."""
    local, mesh = local_of(tensor).detach(), tensor.device_mesh
    sizes = [mesh.size(axis) for axis in range(mesh.ndim)]
    here = mesh.get_coordinate()
    assert here is not None
    for axis, placement in reversed(list(enumerate(tensor.placements))):
        if not isinstance(placement, StridedShard):
            continue
        dim, groups = placement.dim, placement.split_factor
        rows = []
        for coordinate in range(sizes[axis]):
            there = [*here[:axis], coordinate]
            runs = held_runs(
                dim, tensor.shape[dim], tensor.placements[: axis + 1], sizes[: axis + 1], there
            )
            rows.append(sum(map(len, runs)))
        data = local.movedim(dim, 0).contiguous()
        found = make_group(mesh.get_group(axis)).all_gather(data, rows).wait()
        pieces = [
            piece.view(groups, -1, *piece.shape[1:])
            for piece in found.split(rows)  # type: ignore[no-untyped-call]
            if piece.shape[0]
        ]
        local = torch.cat(pieces, 1).flatten(0, 1).movedim(0, dim).contiguous()
    placements = _without_strides(tensor.placements)
    made: DTensor = dtensor_of(local, mesh, placements, tensor.shape, tensor.stride())
    return made


def cut_strided(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """This rank's pieces under strided placements of a tensor that is replicated there; no copy."""
    mesh = tensor.device_mesh
    sizes = [mesh.size(axis) for axis in range(mesh.ndim)]
    here = mesh.get_coordinate()
    assert here is not None
    local = local_of(tensor).detach()
    for dim in {p.dim for p in placements if isinstance(p, StridedShard)}:
        runs = held_runs(dim, tensor.shape[dim], placements, sizes, here)
        local = torch.cat(
            [local.narrow(dim, r.start, len(r)) for r in runs] or [local.narrow(dim, 0, 0)], dim
        )
    made: DTensor = dtensor_of(
        local, mesh, placements, tensor.shape, tensor.stride(), StridedTensor
    )
    return made


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> DTensor:
        ctx.placements = tensor.placements
        return gather_strided(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> DTensor:
        return redistributed(gradient, ctx.placements)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
        return cut_strided(tensor, placements)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[DTensor, None]:
        return gather_strided(gradient), None
