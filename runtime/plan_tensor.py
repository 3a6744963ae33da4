"""Parameters under a plan: DTensors with which a loop may do whatever it may do with tensors.

DTensor's own rules run an op where they can. Where they cannot, or would give something else than
one device, the op runs on whole tensors on every rank, and what it writes is cut up again: random
ops (each rank would draw its own numbers), ops without a rule, ops on tensors of several kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import tree_leaves, tree_map

from autopar.compat import (
    TORCH_VERSION,
    StridedShard,
    become_tensor,
    dtensor_of,
    let_dispatch,
    local_of,
)
from autopar.errors import UserError

from .foreign_values import followed, foreign_of, mark
from .on_stage_arguments import (
    Op,
    call_with,
    local_part,
    mapped,
    op_of,
    tensors_in,
    written_by,
)
from .python_values import PythonValues

_NOT_BY_DTENSOR = (
    "Sharding propagation failed",
    "in-place operations that require placement changes",
    "does not have a sharding strategy",
    "no sharding strategy",
    "is unable to be interpreted into a corresponding shard_order",  # strided, before torch 2.13
)

_JOINING = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)

# DTensor's own, of dims that several mesh axes split, are wrong where sizes do not divide.
_FLATTENING = (
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
)


# What DTensor is left to do beside elementwise ops, those on lists, and views. Its rules for others
# are wrong for some shapes: scatter, index_add, gather, conv, means of uneven shards.
_BY_DTENSOR = """
    mm addmm bmm baddbmm mv dot cat stack sum mean norm linalg_vector_norm amax amin any all
    _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data embedding tril triu
    clone _to_copy copy_ zero_ fill_ zeros_like ones_like empty_like full_like new_zeros new_ones
    new_empty new_full lerp lerp_ detach alias equal is_same_size _local_scalar_dense item
"""

# Beside elementwise ops: they do not ask where a piece's runs lie.
_OF_ALL_RUNS = ("detach", "alias", "linalg_vector_norm")


class PlanTensor(PythonValues, DTensor):
    """A DTensor on a plan's mesh."""

    __slots__ = ()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        return followed(run, func, args, kwargs or {})


let_dispatch(PlanTensor)
torch.serialization.add_safe_globals([PlanTensor])


def as_plan_tensor(tensor: DTensor) -> DTensor:
    """The same tensor as a `PlanTensor` (or one of its kinds); outside of autograd."""
    found: DTensor = _leave(tensor)
    return found


def set_data(tensor: DTensor, new: Tensor) -> None:
    """What `tensor.data = new` does: from now on the tensor is `new`, placed as it was.

    Raises UserError for another shape.
    """
    if new.shape != tensor.shape:
        raise UserError(
            f"a parameter of shape {tuple(tensor.shape)} is given data of shape "
            f"{tuple(new.shape)}, which the plan does not know",
            fix="change shapes before autopar.parallelize",
        )
    become_tensor(tensor, placed_as(new.detach(), tensor))


def placed_as(new: Tensor, like: DTensor) -> DTensor:
    """A tensor of the same shape, placed as another one; collective where that takes it."""
    foreign = foreign_of(new)
    with torch.no_grad():
        if isinstance(new, DTensor):
            if new.device_mesh == like.device_mesh and new.placements == like.placements:
                return new
            new = new.full_tensor()
        made: Any = _placed(new.to(like.device), like)
        if local_of(made).untyped_storage().data_ptr() == new.untyped_storage().data_ptr():
            made = made.clone()  # that rank's parameter alone would change with the tensor
        mark(made, foreign)
        return made  # type: ignore[no-any-return]


def _placed(whole: Tensor, like: DTensor) -> DTensor:
    from .on_stage import placed_like  # which has kinds of this tensor

    return placed_like(_plain(whole, like.device_mesh), like)


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` on arguments of which some are on the mesh of a plan."""
    op = op_of(func)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    mesh = next(t for t in tensors if isinstance(t, PlanTensor)).device_mesh
    if not op.random and not op.changes_shape and all(_is_whole(t, mesh) for t in tensors):
        return _on_locals(func, args, kwargs, mesh)
    written = [t for t in tree_leaves(written_by(op, args, kwargs)) if isinstance(t, Tensor)]
    if any(not isinstance(t, DTensor) or t.device_mesh != mesh for t in written):
        return _on_whole(func, op, args, kwargs, mesh)
    if op.random or op.changes_shape or any(is_lost_view(t) for t in written):
        return _on_whole(func, op, args, kwargs, mesh)
    if not is_for_dtensor(func, op, tensors):
        return _on_whole(func, op, args, kwargs, mesh)
    if func in _FLATTENING and sum(not p.is_replicate() for p in args[0].placements) > 1:
        return _on_whole(func, op, args, kwargs, mesh)
    if func in _JOINING and len({t.placements for t in tensors if isinstance(t, DTensor)}) > 1:
        args = tuple(mapped(_reduced, a) for a in args)
    outer: dict[int, Any] = {}
    kept: list[Any] = []  # so that no other tensor gets the id of one of them

    def enter(value: Any) -> Any:
        if isinstance(value, PlanTensor):
            inner = _as(DTensor, value)
        elif isinstance(value, Tensor) and value.dim() and _mixes(value, mesh):
            inner = _on_mesh(value, mesh)
        else:
            return value
        outer[id(inner)] = value
        kept.append(inner)
        return inner

    def leave(value: Any) -> Any:
        return outer[id(value)] if id(value) in outer else _leave(value)

    try:
        result = func(*tree_map(enter, args), **tree_map(enter, kwargs))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if not is_refusal(error):
            raise
        return _on_whole(func, op, args, kwargs, mesh)
    made = tree_map(leave, result)
    if func is torch.ops.aten.embedding.default:  # whose parts DTensor can add up but not use
        return _reduced(made)
    if op.views:
        _remember_views(made, tensors, func, args, kwargs)
    return made


def is_refusal(error: Exception) -> bool:
    """Whether it says that DTensor has no rule for an op on these arguments."""
    if isinstance(error, NotImplementedError):
        return True
    return any(text in str(error) for text in _NOT_BY_DTENSOR)


def is_for_dtensor(func: Any, op: Op, tensors: Sequence[Tensor]) -> bool:
    """Whether DTensor's own rule for the op is used, if it has one for these tensors."""
    if func is torch.ops.aten.as_strided.default:
        return False
    name = func._schema.name.removeprefix("aten::")
    if TORCH_VERSION < (2, 13) and any(map(_is_strided, tensors)):  # whose strided dims are wrong
        alike = len({_layout(t) for t in tensors if t.dim()}) == 1
        return op.lists or (alike and (op.elementwise or name in _OF_ALL_RUNS))
    return op.elementwise or op.lists or op.views or name in _BY_DTENSOR.split()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.placements if isinstance(tensor, DTensor) else None


def _is_strided(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and any(
        isinstance(placement, StridedShard) for placement in tensor.placements
    )


def _reduced(tensor: Tensor) -> Tensor:
    """The tensor with its parts added up, or what else makes one of them; collective.

    Those of a pipeline stage are left to its own ops.
    """
    if not isinstance(tensor, PlanTensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    whole = [Replicate() if p.is_partial() else p for p in tensor.placements]
    made: Tensor = _leave(_as(DTensor, tensor).redistribute(placements=whole))
    return made


def _is_whole(tensor: Tensor, mesh: DeviceMesh) -> bool:
    """Whether every rank of the mesh has all of the tensor, in its own memory."""
    if not isinstance(tensor, DTensor):
        return True
    if tensor.device_mesh != mesh or any(not p.is_replicate() for p in tensor.placements):
        return False
    return type(local_of(tensor)) is Tensor and not is_lost_view(tensor)


def _on_locals(func: Any, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
    """What the op does to whole tensors, without a message: one rank may run it alone."""
    known: dict[int, Tensor] = {}
    for tensor in tensors_in(args, kwargs):
        known[id(local_of(tensor) if isinstance(tensor, DTensor) else tensor)] = tensor
    result = call_with(func, local_part, args, kwargs)

    def leave(value: Tensor) -> Tensor:
        found = known.get(id(value))
        made: Tensor = _leave(_plain(value, mesh)) if found is None else found
        return made

    return mapped(leave, result)


def _mixes(tensor: Tensor, mesh: DeviceMesh) -> bool:
    """Whether it is a tensor of another kind, which every rank has whole."""
    return not isinstance(tensor, DTensor) or tensor.device_mesh != mesh


def _on_mesh(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor of another kind as one that is whole on every rank of the mesh."""
    return _plain(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, mesh)


# -- ops on whole tensors -------------------------------------------------------------------------


def _on_whole(func: Any, op: Op, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
    """The op on every rank, on all of its tensors; what it draws is what rank 0 draws."""
    whole: dict[int, Tensor] = {}
    outer: dict[int, Tensor] = {}

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if id(value) not in whole:
            with torch.no_grad():
                found: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
            whole[id(value)] = found.clone() if _shares(found, value) else found
            outer[id(whole[id(value)])] = value
        return whole[id(value)]

    if func in _FLATTENING:  # the whole tensor may lie in memory in another order than its parts
        func = torch.ops.aten.reshape.default
    result = func(*tree_map(gather, args), **tree_map(gather, kwargs))
    written = [t for t in tree_leaves(written_by(op, args, kwargs)) if isinstance(t, Tensor)]
    if op.random:
        drawn = [whole.get(id(t), t) for t in written] or tree_leaves(result)
        for tensor in drawn:
            if isinstance(tensor, Tensor):
                dist.broadcast(tensor, src=0)
    for tensor in written:
        if isinstance(tensor, DTensor):
            write(tensor, whole[id(tensor)], op.changes_shape)

    given = {id(t): t for t in tensors_in(args, kwargs) if not isinstance(t, DTensor)}

    def leave(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = outer.get(id(value), given.get(id(value)))
        return known if known is not None else _leave(_plain(value, mesh))

    made = tree_map(leave, result)
    if op.views:
        known = [t for t in outer.values() if isinstance(t, PlanTensor)]
        _remember_views(made, known, func, args, kwargs)
    return made


def _plain(value: Tensor, mesh: DeviceMesh) -> DTensor:
    made: DTensor = dtensor_of(value, mesh, [Replicate()] * mesh.ndim, value.shape, value.stride())
    return made


def _shares(found: Tensor, tensor: DTensor) -> bool:
    here = local_of(tensor)
    if type(found) is not Tensor or type(here) is not Tensor:  # of a collective under way, say
        return found is here
    return found.untyped_storage().data_ptr() == here.untyped_storage().data_ptr()


def write(tensor: DTensor, whole: Tensor, reshaped: bool = False) -> None:
    """Make a tensor's values those of a whole one, and those that it is a view of; collective."""
    if reshaped or any(p.is_partial() for p in tensor.placements) or tensor.dtype != whole.dtype:
        from .on_stage import axis_of, on_stage, stage_of

        new, axis, stage = _plain(whole, tensor.device_mesh), axis_of(tensor), stage_of(tensor)
        become_tensor(tensor, new if axis is None or stage is None else on_stage(new, axis, stage))
    else:
        local_of(tensor).copy_(local_of(_placed(whole, tensor)))
    viewed = vars(tensor).get(_VIEWED)
    if viewed is None:
        return
    base, func, args, kwargs = viewed
    all_of_it = base.detach().full_tensor().clone()

    def enter(value: Any) -> Any:
        return all_of_it if value is base else value

    view = func(*tree_map(enter, args), **tree_map(enter, kwargs))
    for part, place in _pairs(view, vars(tensor)[_PLACE]):
        if place:
            part.copy_(whole)
    write(base, all_of_it)


# -- views that are copies here -------------------------------------------------------------------

_VIEWED, _PLACE = "_autopar_viewed", "_autopar_place"


def is_lost_view(tensor: Tensor) -> bool:
    """Whether it is a view that has memory of its own."""
    return isinstance(tensor, DTensor) and _VIEWED in vars(tensor)


def remember_view(view: DTensor, base: DTensor, place: int, func: Any, args: Any, kw: Any) -> None:
    """Let a copy know of what `base` it is a view, as the result of an op at some place."""
    vars(view)[_VIEWED] = (base, func, args, kw)
    vars(view)[_PLACE] = place


def _remember_views(made: Any, tensors: list[Any], func: Any, args: Any, kwargs: Any) -> None:
    """Let views that are not of their base's memory know what they are of.

    What is written to them has to be written to the base, too.
    """
    bases = [t for t in tensors if isinstance(t, DTensor)]
    if len(bases) != 1:
        return
    (base,) = bases
    for place, view in enumerate(tree_leaves(made)):
        if not isinstance(view, DTensor) or view is base or not view.numel():
            continue
        if is_lost_view(base) or not _is_view_of(view, base):
            remember_view(view, base, place, func, args, kwargs)


def _is_view_of(view: DTensor, base: DTensor) -> bool:
    """Whether writing to it writes to its base on every rank: alike on all of them."""
    unsharded = all(p.is_replicate() for p in base.placements)
    if unsharded:
        return _shares(local_of(view), base)
    same = [p.is_shard() for p in view.placements] == [p.is_shard() for p in base.placements]
    return same and (_shares(local_of(view), base) or not local_of(view).numel())


def _pairs(view: Any, place: int) -> list[tuple[Tensor, bool]]:
    return [(part, i == place) for i, part in enumerate(tree_leaves(view))]


# -- kinds ----------------------------------------------------------------------------------------


def _as(kind: Any, tensor: DTensor) -> Any:
    mesh, placements = tensor.device_mesh, tensor.placements
    return dtensor_of(local_of(tensor), mesh, placements, tensor.shape, tensor.stride(), kind)


def _leave(value: Any) -> Any:
    if type(value) is not DTensor:
        return value
    from .strided_tensor import StridedTensor, is_strided

    return _as(StridedTensor if is_strided(value) else PlanTensor, value)
