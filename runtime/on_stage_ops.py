"""What ops do with tensors of pipeline stages.

- Elementwise ops run on the local tensors, which are empty on the ranks of other stages.
- Other ops on tensors of one stage run on that stage's ranks alone, on its part of the mesh, and
  what they return is on that stage. The other ranks find its shape and placements without data.
- Ops on lists (`torch._foreach_*`) run once per stage.
- Whatever mixes stages, draws random numbers or returns something to Python runs on all ranks, on
  tensors brought to all stages; what such an op writes goes back to its stage.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from autopar.compat import become_tensor, dtensor_like, dtensor_of, local_of, spec_of
from autopar.errors import UserError

from .on_stage_arguments import (
    Op,
    aten,
    call_with,
    is_staged,
    local_part,
    mapped,
    op_of,
    returned_by,
    staged_in,
    tensors_in,
    written_by,
)
from .on_stage_run import may_run_on_stage, run_on_stage
from .plan_tensor import as_plan_tensor, is_lost_view, is_refusal, remember_view, write
from .shared_memory import make_group
from .stage_gather import gathered
from .stage_placement import axis_of, is_here, stage_of

_RETURNS_NEW = {
    aten.t_.default: aten.t.default,
    aten.transpose_.default: aten.transpose.int,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.unsqueeze_.default: aten.unsqueeze.default,
}


def run(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` on arguments of which some are on stages; `kind` is the class of such tensors."""
    if func in (aten.detach.default, aten.alias.default):
        return dtensor_like(func(local_of(args[0])), args[0])
    if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
        return _unscale(*args)
    op = op_of(func)
    written = list(tensors_in(written_by(op, args, kwargs), {}))
    if any(is_lost_view(t) for t in written):
        result = _on_all_ranks(func, op, args, kwargs)
        for tensor in staged_in(written, {}):
            write(tensor, tensor.detach().full_tensor())  # type: ignore[attr-defined]
        return result
    if op.changes_shape and func in _RETURNS_NEW:
        become_tensor(args[0], run(kind, _RETURNS_NEW[func], args, kwargs))
        return args[0]
    if op.changes_shape:
        raise UserError(
            f"{func} changes the shape of a tensor that is on one pipeline stage",
            fix="use the function that returns a new tensor instead",
        )
    ours = all(isinstance(t, DTensor) and is_staged(t) for t in written)
    if ours and op.elementwise and (_alike_lists(args) if op.lists else _alike(args, kwargs)):
        return _on_locals(func, op, args, kwargs)
    if op.lists:
        parts = _by_stages(args)
        if len(parts) > 1:
            return _apart(func, parts, args, kwargs)
    stages = {(axis_of(t), stage_of(t)) for t in staged_in(args, kwargs)}
    if len(stages) == 1 and may_run_on_stage(func, op, args, kwargs):
        ((axis, _),) = stages
        assert axis is not None
        try:
            made = run_on_stage(kind, func, op, args, kwargs, axis)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            if not is_refusal(error):
                raise
            return _on_all_ranks(func, op, args, kwargs)
        if op.views:
            _remember_copies(made, func, args, kwargs)
        return made
    return _on_all_ranks(func, op, args, kwargs)


def _remember_copies(made: Any, func: Any, args: Any, kwargs: Any) -> None:
    """Let views that are copies know of what: those of dims that were brought together for them."""
    base = args[0]
    if not isinstance(base, DTensor):
        return
    for place, view in enumerate(tensors_in((made,), {})):
        if isinstance(view, DTensor) and view is not base:
            pairs = zip(base.placements, view.placements, strict=False)
            whole = any(v.is_replicate() and not b.is_replicate() for b, v in pairs)
            if is_lost_view(base) or whole or not is_staged(view):
                remember_view(view, base, place, func, args, kwargs)


# -- elementwise ops on what each rank has --------------------------------------------------------


def _layout(tensor: DTensor) -> tuple[Any, ...]:
    return tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()


@functools.lru_cache(maxsize=4096)
def _is_plain(spec: Any) -> bool:
    """Whether the local tensors are laid out row by row, and are values, not terms of a sum."""
    stride = 1
    for size, step in zip(
        reversed(spec.tensor_meta.shape), reversed(spec.tensor_meta.stride), strict=True
    ):
        if step != stride:
            return False
        stride *= size
    return not any(p.is_partial() for p in spec.placements)


def _is_scalar(tensor: Tensor) -> bool:
    """Whether all ranks have this same number."""
    if tensor.dim():
        return False
    return not isinstance(tensor, DTensor) or all(p.is_replicate() for p in tensor.placements)


def _alike(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the tensors on stages are laid out alike, and all others are scalars."""
    like: DTensor | None = None
    for tensor in tensors_in(args, kwargs):
        if not isinstance(tensor, DTensor) or not is_staged(tensor):
            if not _is_scalar(tensor):
                return False
        elif like is None:
            like = tensor
        elif spec_of(tensor) is not spec_of(like) and _layout(tensor) != _layout(like):
            return False
    return like is not None and _is_plain(spec_of(like))


def _alike_lists(args: Sequence[Any]) -> bool:
    """Whether the tensors at one position of all lists are laid out alike, at every position."""
    lists = [a for a in args if isinstance(a, (list, tuple))]
    for row in zip(*lists, strict=False):
        tensors = [t for t in row if isinstance(t, Tensor)]
        first = tensors[0]
        if not isinstance(first, DTensor) or not _is_plain(spec_of(first)):
            return False
        if not all(isinstance(t, DTensor) and _layout(t) == _layout(first) for t in tensors[1:]):
            return False
    return all(_is_scalar(a) for a in args if isinstance(a, Tensor))


def _on_locals(func: Any, op: Op, args: Any, kwargs: Any) -> Any:
    result = call_with(func, local_part, args, kwargs)
    if op.written:
        return returned_by(op, written_by(op, args, kwargs))
    if op.lists:
        return [_like(value, like) for value, like in zip(result, args[0], strict=True)]
    like = staged_in(args, kwargs)[0]
    if isinstance(result, Tensor):
        return _like(result, like)
    return type(result)(_like(value, like) for value in result)


def _like(local: Tensor, like: DTensor) -> Any:
    if local.dtype == like.dtype:
        return dtensor_like(local, like)
    mesh, placements = like.device_mesh, like.placements
    return dtensor_of(local, mesh, placements, like.shape, like.stride(), type(like))


def _unscale(gradients: Sequence[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Unscale every rank's pieces; all ranks of the mesh learn of what is not finite on one."""
    pieces = [piece for piece in map(local_part, gradients) if piece.numel()]
    found = local_part(found_inf)
    if pieces:
        torch._amp_foreach_non_finite_check_and_unscale_(pieces, found, local_part(inverse_scale))
    mesh = staged_in((gradients,), {})[0].device_mesh
    for axis in range(mesh.ndim):
        make_group(mesh.get_group(axis)).all_reduce(found, "max", in_place=True).wait()


# -- ops on lists, stage by stage -----------------------------------------------------------------


def _by_stages(args: tuple[Any, ...]) -> dict[Any, list[int]]:
    """Positions in the lists by the stages of what they hold."""
    length = len(args[0])
    lists = [a for a in args if isinstance(a, (list, tuple)) and len(a) == length]
    parts: dict[Any, list[int]] = {}
    for i in range(length):
        here = staged_in([a[i] for a in lists], {})
        stages = frozenset((axis_of(t), stage_of(t)) for t in here)
        parts.setdefault(stages, []).append(i)
    return parts


def _apart(func: Any, parts: dict[Any, list[int]], args: Any, kwargs: Any) -> Any:
    length = len(args[0])

    def pick(value: Any, positions: list[int]) -> Any:
        if isinstance(value, (list, tuple)) and len(value) == length:
            return [value[i] for i in positions]
        return value

    results: list[Any] = [None] * length
    for positions in parts.values():
        some = func(
            *(pick(a, positions) for a in args),
            **{name: pick(value, positions) for name, value in kwargs.items()},
        )
        if some is None:
            continue
        for i, result in zip(positions, some, strict=True):
            results[i] = result
    return results if func._schema.returns else None


# -- everything else ------------------------------------------------------------------------------


def _on_all_ranks(func: Any, op: Op, args: Any, kwargs: Any) -> Any:
    staged = staged_in(args, kwargs)
    found = map(as_plan_tensor, gathered(staged))
    whole = {id(t): w for t, w in zip(staged, found, strict=True)}
    if op.read_by_python:
        for key, tensor in whole.items():  # DTensor would give Python its own part of a sum
            everywhere = [Replicate()] * tensor.device_mesh.ndim
            whole[key] = as_plan_tensor(tensor.redistribute(placements=everywhere))
    outer = {id(whole[id(t)]): t for t in staged}
    result = call_with(func, lambda t: whole.get(id(t), t), args, kwargs)
    for tensor in staged_in(written_by(op, args, kwargs), {}):
        if is_here(tensor):
            local_of(tensor).copy_(local_of(whole[id(tensor)]))
    made = mapped(lambda t: outer.get(id(t), t), result)
    if op.views and not op.written:
        _remember_copies(made, func, args, kwargs)
    return made
