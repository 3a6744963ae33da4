"""Ops on tensors of one pipeline stage: its ranks run them, the others find what would come out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from autopar.compat import become, dtensor_with, local_of, local_shape_of, make_spec, spec_of

from .on_stage_arguments import (
    Op,
    aten,
    call_with,
    is_staged,
    local_part,
    mapped,
    returned_by,
    staged_in,
    tensors_in,
    written_by,
)
from .plan_tensor import as_plan_tensor, is_for_dtensor
from .stage_placement import (
    OnStage,
    axis_of,
    empty_piece,
    everywhere,
    is_here,
    stage_mesh,
    stage_of,
)


def may_run_on_stage(func: Any, op: Op, args: Any, kwargs: Any) -> bool:
    """Whether the op needs nothing of other stages' ranks."""
    if op.random or op.read_by_python or not _has_shapes(func):
        return False
    mesh = staged_in(args, kwargs)[0].device_mesh
    tensors = list(tensors_in(args, kwargs))
    if mesh.ndim > 1 and (func in _PLACED or not is_for_dtensor(func, op, tensors)):
        return False  # what comes out is not placed as DTensor's rule says, which others go by
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != mesh:
                return False
        elif tensor.dtype is torch.bool and op.indexes:  # how many there are, others cannot know
            return False
    written = tensors_in(written_by(op, args, kwargs), {})
    return all(isinstance(t, DTensor) and is_staged(t) for t in written)


_PLACED = (aten.embedding.default, aten.cat.default, aten.stack.default)
_SHAPES = ("Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd")


@functools.cache
def _has_shapes(func: Any) -> bool:
    """Whether shape and strides of what the op returns can be found without data."""
    if func._schema.name.startswith("aten::_fft"):  # strides without data are not those with
        return False
    return any(func.has_kernel_for_dispatch_key(key) for key in _SHAPES)


def run_on_stage(kind: Any, func: Any, op: Op, args: Any, kwargs: Any, axis: int) -> Any:
    """What the op returns, on the stage of its arguments; `axis` is that of the stages.

    Raises on all ranks alike, before anything is done, where DTensor refuses.
    """
    like = staged_in(args, kwargs)[0]
    spread = functools.partial(_on_every_stage, axis=axis)
    args = [mapped(spread, a) for a in args]
    kwargs = {name: mapped(spread, value) for name, value in kwargs.items()}
    written = written_by(op, args, kwargs)
    for tensor in staged_in(written, {}):
        _reduce_partial(tensor)
    if is_here(like):
        if like.device_mesh.ndim > 1:  # what others cannot find out raises on all ranks
            _results(func, args, _without_device(kwargs), like.device_mesh, axis, stage_of(like))
        return _run_here(kind, func, args, kwargs, like)
    device = torch.device(kwargs.get("device") or like.device)
    kwargs = _without_device(kwargs)
    # Also of an op that returns nothing new: it may raise, and then has to on all ranks.
    found, shape = _results(func, args, kwargs, like.device_mesh, axis, stage_of(like))
    if written:
        return returned_by(op, written)
    made = [
        dtensor_with(empty_piece(r.piece, r.spec.tensor_meta.dtype, device), r.spec, kind)
        if isinstance(r, _Result)
        else r
        for r in found
    ]
    return made[0] if shape is None else shape(made)


def _without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "device"}


def _on_every_stage(tensor: Tensor, axis: int) -> Tensor:
    """A tensor that is not on one stage, whole on every stage."""
    if not isinstance(tensor, DTensor) or is_staged(tensor):
        return tensor
    if tensor.placements[axis].is_replicate():
        return tensor
    return tensor.redistribute(tensor.device_mesh, everywhere(tensor.placements, axis))


def _reduce_partial(tensor: DTensor) -> None:
    """Sum up what the ranks of the stage have parts of, in place: it is about to be written to."""
    if not any(p.is_partial() for p in tensor.placements):
        return
    axis = axis_of(tensor)
    assert axis is not None
    local = local_of(tensor)
    if is_here(tensor):
        parts = _stage_placements(tensor.placements, axis)
        inner = _inside(tensor, axis)
        assert isinstance(inner, DTensor)
        local = local_of(inner.redistribute(inner.device_mesh, [_reduced(p) for p in parts]))
    become(tensor, local, [_reduced(p) for p in tensor.placements])


def _reduced(placement: Placement) -> Placement:
    return Replicate() if placement.is_partial() else placement


def _stage_placements(placements: Sequence[Placement], axis: int) -> tuple[Placement, ...]:
    return (*placements[:axis], *placements[axis + 1 :])


@functools.lru_cache(maxsize=4096)
def _stage_spec(spec: Any, axis: int, world: object) -> Any:
    """How a tensor lies on the mesh of its stage; None if that is one device."""
    mesh = stage_mesh(spec.mesh, axis)
    if mesh is None:
        return None
    meta = spec.tensor_meta
    return make_spec(
        mesh, _stage_placements(spec.placements, axis), meta.shape, meta.stride, meta.dtype
    )


def _inside(tensor: DTensor, axis: int) -> Tensor:
    """The tensor as its stage's ranks see it."""
    spec = _stage_spec(spec_of(tensor), axis, dist.group.WORLD)
    if spec is None:
        return local_of(tensor)
    found: DTensor = dtensor_with(local_of(tensor), spec)
    return found


@functools.lru_cache(maxsize=4096)
def _outer_spec(
    mesh: DeviceMesh,
    axis: int,
    stage: int | None,
    placements: tuple[Placement, ...],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    world: object,
) -> Any:
    """How a tensor that lies so on the mesh of a stage lies on the whole mesh."""
    assert stage is not None
    whole = (*placements[:axis], OnStage(stage), *placements[axis:])
    return make_spec(mesh, whole, shape, stride, dtype)


def _spec_outside(value: Tensor, mesh: DeviceMesh, axis: int, stage: int | None) -> Any:
    if isinstance(value, DTensor):
        placements = tuple(value.placements)
    else:
        placements = (Replicate(),) * (mesh.ndim - 1)
    shape, stride = tuple(value.shape), tuple(value.stride())
    world = dist.group.WORLD
    return _outer_spec(mesh, axis, stage, placements, shape, stride, value.dtype, world)


def _run_here(kind: Any, func: Any, args: Any, kwargs: Any, like: DTensor) -> Any:
    axis, stage, mesh = axis_of(like), stage_of(like), like.device_mesh
    assert axis is not None
    outer: dict[int, DTensor] = {}
    kept: list[Tensor] = []  # so that no other tensor gets the id of one of them

    def enter(value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return value
        inner = _inside(value, axis)
        if isinstance(inner, DTensor):
            inner = as_plan_tensor(inner)
        outer[id(inner)] = value
        kept.append(inner)
        return inner

    def leave(value: Tensor) -> Any:
        if id(value) in outer:
            return outer[id(value)]
        return dtensor_with(local_part(value), _spec_outside(value, mesh, axis, stage), kind)

    return mapped(leave, call_with(func, enter, args, kwargs))


@dataclass(frozen=True)
class _Result:
    """A tensor that an op returns on another stage."""

    spec: Any
    piece: tuple[int, ...]  # the shape of the piece of this rank's peer there


def _results(
    func: Any, args: Any, kwargs: Any, mesh: DeviceMesh, axis: int, stage: int | None
) -> tuple[list[Any], Any]:
    """What the op returns on the ranks of a stage; and the type of sequence, None for one value."""

    def key(value: Any) -> Any:
        if isinstance(value, DTensor):
            return DTensor, spec_of(value)
        if isinstance(value, (list, tuple)):
            return (list, *map(key, value))
        return type(value), value  # 1, 1.0 and True are equal

    keys = (tuple(map(key, args)), tuple((name, key(value)) for name, value in kwargs.items()))
    if any(not isinstance(t, DTensor) for t in tensors_in(args, kwargs)):  # its value may matter
        return _find_results(func, *keys, mesh, axis, stage, dist.group.WORLD)
    return _known_results(func, *keys, mesh, axis, stage, dist.group.WORLD)


# What is cached here is keyed by the world: meshes of one that has ended equal those of the next.
def _find_results(
    func: Any,
    args: Any,
    kwargs: Any,
    mesh: DeviceMesh,
    axis: int,
    stage: int | None,
    world: object,
) -> tuple[list[Any], Any]:
    def alone(value: Tensor) -> Any:
        made, inner = value.detach().to("meta"), stage_mesh(mesh, axis)
        if inner is None:
            return made
        whole = [Replicate()] * inner.ndim
        spec = make_spec(inner, whole, value.shape, value.stride(), value.dtype)
        return dtensor_with(made, spec)

    def without_data(described: Any) -> Any:
        if described[0] is list:
            return [without_data(item) for item in described[1:]]
        if described[0] is not DTensor:
            value = described[1]
            return alone(value) if isinstance(value, Tensor) and value.dim() else value
        spec = described[1]
        inner, meta = _stage_spec(spec, axis, world), spec.tensor_meta
        shape = meta.shape
        if inner is not None:
            shape = local_shape_of(shape, inner.mesh, inner.placements)
        order = sorted(range(len(shape)), key=lambda dim: -meta.stride[dim])
        made = torch.empty([shape[d] for d in order], dtype=meta.dtype, device="meta")
        made = made.permute([order.index(dim) for dim in range(len(order))])
        return made if inner is None else dtensor_with(made, inner)

    result = func(
        *(without_data(a) for a in args), **{name: without_data(value) for name, value in kwargs}
    )
    several = isinstance(result, (list, tuple))
    found = [
        _Result(_spec_outside(value, mesh, axis, stage), tuple(local_part(value).shape))
        if isinstance(value, Tensor)
        else value
        for value in (result if several else [result])
    ]
    return found, list if several else None


_known_results = functools.lru_cache(maxsize=4096)(_find_results)
