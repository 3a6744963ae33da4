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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from autopar.compat import become, dtensor_like, dtensor_of, local_of, local_shape_of
from autopar.errors import UserError

from .stage_gather import gathered
from .stage_placement import axis_of, empty_piece, everywhere, is_here, stage_mesh, stage_of

aten = torch.ops.aten
_READ_BY_PYTHON = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_ON_ALL_RANKS = (*_READ_BY_PYTHON, torch.Tag.nondeterministic_seeded)
_ELEMENTWISE = {
    aten.clone.default,
    aten.copy_.default,
    aten._to_copy.default,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.lerp.Scalar,
    aten.lerp_.Scalar,
}


def run(kind: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` on arguments of which some are on stages; `kind` is the class of such tensors."""
    if func in (aten.detach.default, aten.alias.default):
        return dtensor_like(func(local_of(args[0])), args[0])
    if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
        return _unscale(*args)
    if torch.Tag.inplace_view in func.tags:
        raise UserError(
            f"{func} changes the shape of a tensor that is on one pipeline stage",
            fix="use the function that returns a new tensor instead",
        )
    if _is_elementwise(func, args, kwargs):
        return _on_locals(func, args, kwargs)
    if _takes_lists(func):
        parts = _by_stages(args)
        if len(parts) > 1:
            return _apart(func, parts, args, kwargs)
    stages = {(axis_of(t), stage_of(t)) for t in _staged(args, kwargs)}
    if len(stages) == 1 and _may_run_on_stage(func, args, kwargs):
        ((axis, stage),) = stages
        assert axis is not None and stage is not None
        return _on_stage(kind, func, args, kwargs, axis, stage)
    return _on_all_ranks(func, args, kwargs)


def _tensors(*trees: Any) -> Iterator[Tensor]:
    for leaf in tree_flatten(trees)[0]:
        if isinstance(leaf, Tensor):
            yield leaf


def _staged(*trees: Any) -> list[DTensor]:
    found = (t for t in _tensors(*trees) if isinstance(t, DTensor) and axis_of(t) is not None)
    return list({id(t): t for t in found}.values())


# -- elementwise ops on what each rank has --------------------------------------------------------


def _is_elementwise(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the op does the same to all elements of tensors that are laid out alike."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    if torch.Tag.pointwise not in func.tags and func not in _ELEMENTWISE:
        return False
    like: DTensor | None = None
    for tensor in _tensors(args, kwargs):
        if not isinstance(tensor, DTensor):
            if tensor.dim():
                return False
        elif axis_of(tensor) is None:
            if tensor.dim() or not all(p.is_replicate() for p in tensor.placements):
                return False
        elif like is None:
            like = tensor
        elif _layout(like) != _layout(tensor):
            return False
    assert like is not None
    return _is_row_major(like) and not any(p.is_partial() for p in like.placements)


def _layout(tensor: DTensor) -> tuple[Any, ...]:
    return tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()


def _is_row_major(tensor: Tensor) -> bool:
    stride = 1
    for size, step in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if step != stride:
            return False
        stride *= size
    return True


def _on_locals(func: Any, args: Any, kwargs: Any) -> Any:
    outer: dict[int, DTensor] = {}
    like = _staged(args, kwargs)[0]

    def enter(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        outer[id(local_of(value))] = value
        return local_of(value)

    def leave(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in outer:
            return outer[id(value)]
        mesh, placements = like.device_mesh, like.placements
        return dtensor_of(value, mesh, placements, like.shape, like.stride(), type(like))

    return tree_map(leave, func(*tree_map(enter, args), **tree_map(enter, kwargs)))


def _unscale(gradients: Sequence[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Unscale every rank's pieces; all ranks of the mesh learn of what is not finite on one."""
    pieces = [local_of(g) if isinstance(g, DTensor) else g for g in gradients]
    pieces = [piece for piece in pieces if piece.numel()]
    found, scale = (
        local_of(t) if isinstance(t, DTensor) else t for t in (found_inf, inverse_scale)
    )
    if pieces:
        torch._amp_foreach_non_finite_check_and_unscale_(pieces, found, scale)
    mesh = _staged(gradients)[0].device_mesh
    for axis in range(mesh.ndim):
        dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(axis))


# -- ops on lists, stage by stage -----------------------------------------------------------------


def _takes_lists(func: Any) -> bool:
    name = func._schema.name
    first = func._schema.arguments[0].type if func._schema.arguments else None
    return name.startswith(("aten::_foreach", "aten::_fused")) and str(first) == "List[Tensor]"


def _by_stages(args: tuple[Any, ...]) -> dict[Any, list[int]]:
    """Positions in the lists by the stages of what they hold."""
    length = len(args[0])
    lists = [a for a in args if isinstance(a, (list, tuple)) and len(a) == length]
    parts: dict[Any, list[int]] = {}
    for i in range(length):
        stages = frozenset((axis_of(t), stage_of(t)) for t in _staged([a[i] for a in lists]))
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


# -- ops on the ranks of one stage ----------------------------------------------------------------


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that the op writes to, in the order of its signature."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if value is not None:
                found.append(value)
    return found


def _may_run_on_stage(func: Any, args: Any, kwargs: Any) -> bool:
    if any(tag in func.tags for tag in _ON_ALL_RANKS):
        return False
    mesh = _staged(args, kwargs)[0].device_mesh
    for tensor in _tensors(args, kwargs):
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != mesh:
                return False
        elif tensor.dim():
            raise UserError(
                f"{func} got an ordinary tensor beside one that is on a pipeline stage",
                fix="use the tensor's full_tensor(), or make the other one a DTensor, too",
            )
    written = _tensors(_written(func, args, kwargs))
    return all(isinstance(t, DTensor) and axis_of(t) is not None for t in written)


@dataclass(frozen=True)
class _Described:
    """A tensor of a stage without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...]  # on the mesh of the stage
    piece: tuple[int, ...]  # the shape of this rank's peer's piece


def _on_stage(kind: Any, func: Any, args: Any, kwargs: Any, axis: int, stage: int) -> Any:
    like = _staged(args, kwargs)[0]
    args, kwargs = tree_map(functools.partial(_on_every_stage, axis=axis), (args, kwargs))
    written = _written(func, args, kwargs)
    for tensor in _staged(written):
        _reduce_partial(tensor)
    if is_here(like):
        return _run_here(kind, func, args, kwargs, like)
    device = kwargs.get("device") or like.device
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    # Also of an op that returns nothing new: it may raise, and then has to on all ranks.
    found, tree = _described_results(func, args, kwargs, stage_mesh(like.device_mesh, axis), axis)
    if written:
        if not func._schema.returns:
            return None
        return written[0] if len(written) == 1 else tuple(written)

    def empty(result: Any) -> Any:
        if not isinstance(result, _Described):
            return result
        local = empty_piece(result.piece, result.dtype, torch.device(device))
        return _as_staged(kind, local, result, like)

    return tree_unflatten([empty(result) for result in found], tree)


def _on_every_stage(value: Any, axis: int) -> Any:
    """A tensor that is not on one stage, whole on every stage."""
    if not isinstance(value, DTensor) or axis_of(value) is not None:
        return value
    if value.placements[axis].is_replicate():
        return value
    return value.redistribute(value.device_mesh, everywhere(value.placements, axis))


def _reduce_partial(tensor: DTensor) -> None:
    """Sum up what the ranks of the stage have parts of, in place: it is about to be written to."""
    if not any(p.is_partial() for p in tensor.placements):
        return
    axis = axis_of(tensor)
    assert axis is not None
    local = local_of(tensor)
    if is_here(tensor):
        mesh, parts = stage_mesh(tensor.device_mesh, axis), _stage_placements(tensor, axis)
        assert mesh is not None
        inner: DTensor = dtensor_of(local, mesh, parts, tensor.shape, tensor.stride())
        local = local_of(inner.redistribute(mesh, [_reduced(p) for p in parts]))
    become(tensor, local, [_reduced(p) for p in tensor.placements])


def _reduced(placement: Placement) -> Placement:
    return Replicate() if placement.is_partial() else placement


def _stage_placements(tensor: DTensor, axis: int) -> tuple[Placement, ...]:
    return (*tensor.placements[:axis], *tensor.placements[axis + 1 :])


def _as_staged(kind: Any, local: Tensor, what: _Described, like: DTensor) -> Any:
    axis = axis_of(like)
    assert axis is not None
    placements = (*what.placements[:axis], like.placements[axis], *what.placements[axis:])
    return dtensor_of(local, like.device_mesh, placements, what.shape, what.stride, kind)


def _run_here(kind: Any, func: Any, args: Any, kwargs: Any, like: DTensor) -> Any:
    axis = axis_of(like)
    assert axis is not None
    mesh = stage_mesh(like.device_mesh, axis)
    outer: dict[int, DTensor] = {}
    kept: list[Tensor] = []  # so that no other tensor gets the id of one of them

    def enter(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        inner = local_of(value)
        if mesh is not None:
            placements = _stage_placements(value, axis)
            inner = dtensor_of(inner, mesh, placements, value.shape, value.stride())
        outer[id(inner)] = value
        kept.append(inner)
        return inner

    def leave(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in outer:
            return outer[id(value)]
        return _as_staged(
            kind,
            local_of(value) if isinstance(value, DTensor) else value,
            _describe(value, mesh),
            like,
        )

    return tree_map(leave, func(*tree_map(enter, args), **tree_map(enter, kwargs)))


def _describe(value: Tensor, mesh: DeviceMesh | None) -> _Described:
    shape, stride = tuple(value.shape), tuple(value.stride())
    if isinstance(value, DTensor):
        placements, piece = tuple(value.placements), tuple(local_of(value).shape)
    else:
        placements, piece = () if mesh is None else (Replicate(),) * mesh.ndim, shape
    return _Described(shape, stride, value.dtype, placements, piece)


def _described_results(
    func: Any, args: Any, kwargs: Any, mesh: DeviceMesh | None, axis: int
) -> tuple[list[Any], Any]:
    """What the op returns on the ranks of another stage, as leaves and their tree."""

    def describe(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        placements = _stage_placements(value, axis)
        return _Described(tuple(value.shape), value.stride(), value.dtype, placements, ())

    leaves, tree = tree_flatten((args, kwargs))
    described = tuple(describe(leaf) for leaf in leaves)
    if any(isinstance(leaf, Tensor) for leaf in described):  # the value may matter
        return _results(func, described, tree, mesh)
    typed = tuple((type(leaf), leaf) for leaf in described)  # 1, 1.0 and True are equal
    return _known_results(func, typed, tree, mesh)


@functools.lru_cache(maxsize=4096)
def _known_results(
    func: Any, typed: tuple[Any, ...], tree: Any, mesh: DeviceMesh | None
) -> tuple[list[Any], Any]:
    return _results(func, tuple(leaf for _, leaf in typed), tree, mesh)


def _results(
    func: Any, described: tuple[Any, ...], tree: Any, mesh: DeviceMesh | None
) -> tuple[list[Any], Any]:
    def without_data(leaf: Any) -> Any:
        if not isinstance(leaf, _Described):
            return leaf
        shape = leaf.shape if mesh is None else local_shape_of(leaf.shape, mesh, leaf.placements)
        order = sorted(range(len(shape)), key=lambda dim: -leaf.stride[dim])
        made = torch.empty([shape[d] for d in order], dtype=leaf.dtype, device="meta")
        made = made.permute([order.index(dim) for dim in range(len(order))])
        if mesh is None:
            return made
        return dtensor_of(made, mesh, leaf.placements, leaf.shape, leaf.stride)

    args, kwargs = tree_unflatten([without_data(leaf) for leaf in described], tree)
    leaves, tree = tree_flatten(func(*args, **kwargs))
    found = []
    for leaf in leaves:
        found.append(_describe(leaf, mesh) if isinstance(leaf, Tensor) else leaf)
    return found, tree


# -- everything else ------------------------------------------------------------------------------


def _on_all_ranks(func: Any, args: Any, kwargs: Any) -> Any:
    staged = _staged(args, kwargs)
    whole = {id(t): w for t, w in zip(staged, gathered(staged), strict=True)}
    if any(tag in func.tags for tag in _READ_BY_PYTHON):
        for key, tensor in whole.items():  # DTensor would give Python its own part of a sum
            whole[key] = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    outer = {id(whole[id(t)]): t for t in staged}
    written = _staged(_written(func, args, kwargs))
    args, kwargs = tree_map(lambda v: whole.get(id(v), v), (args, kwargs))
    result = func(*args, **kwargs)
    for tensor in written:
        if is_here(tensor):
            local_of(tensor).copy_(local_of(whole[id(tensor)]))
    return tree_map(lambda v: outer.get(id(v), v), result)
