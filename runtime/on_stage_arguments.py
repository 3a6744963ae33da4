"""The arguments of ops with tensors of pipeline stages, and what schemas say of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.compat import local_of

from .stage_placement import OnStage

aten = torch.ops.aten
_READ_BY_PYTHON = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_ELEMENTWISE = (
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
)
_REDUCE_EACH = ("_foreach_norm", "_foreach_powsum", "_foreach_max")


@dataclass(frozen=True)
class Op:
    """What an op's schema says."""

    elementwise: bool
    random: bool
    read_by_python: bool
    lists: bool  # takes lists of tensors that it treats position by position
    written: tuple[tuple[int, str], ...]  # the arguments that it writes to
    returns: int
    changes_shape: bool
    indexes: bool  # by tensors, of which masks have as many elements as they have trues
    views: bool  # returns other tensors of the memory of its arguments


@functools.cache
def op_of(func: Any) -> Op:
    """What the schema of an op says."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    first = str(schema.arguments[0].type) if schema.arguments else ""
    lists = name.startswith(("_foreach_", "_fused_")) and first == "List[Tensor]"
    random = torch.Tag.nondeterministic_seeded in func.tags
    each = name.startswith("_foreach_") and not name.startswith(_REDUCE_EACH)
    pointwise = torch.Tag.pointwise in func.tags or func in _ELEMENTWISE
    read = any(tag in func.tags for tag in _READ_BY_PYTHON)  # aten.equal is "pointwise", too
    return Op(
        elementwise=(lists and each) or (pointwise and not (lists or random or read)),
        random=random,
        read_by_python=read,
        lists=lists,
        written=tuple(
            (i, argument.name)
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
        returns=len(schema.returns),
        changes_shape=torch.Tag.inplace_view in func.tags,
        indexes=name.startswith(("index", "_index_put", "_unsafe_index")),
        views=any(r.alias_info and not r.alias_info.is_write for r in schema.returns),
    )


def tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among arguments, and those in their lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, Tensor):
                    yield item


def staged_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[DTensor]:
    """The tensors on stages among arguments, each once."""
    found = [t for t in tensors_in(args, kwargs) if isinstance(t, DTensor) and is_staged(t)]
    return found if len(found) < 2 else list({id(t): t for t in found}.values())


def is_staged(tensor: DTensor) -> bool:
    """Whether the tensor is on one stage."""
    return any(isinstance(p, OnStage) for p in tensor.placements)


def mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """An argument or result with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [change(v) if isinstance(v, Tensor) else v for v in value]
    return value


def call_with(func: Any, change: Callable[[Tensor], Any], args: Any, kwargs: Any) -> Any:
    """What the op returns for its arguments with their tensors changed."""
    return func(
        *[mapped(change, a) for a in args], **{k: mapped(change, v) for k, v in kwargs.items()}
    )


def written_by(op: Op, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that the op writes to, in the order of its signature."""
    values = (args[i] if i < len(args) else kwargs.get(name) for i, name in op.written)
    return [value for value in values if value is not None]


def returned_by(op: Op, written: list[Any]) -> Any:
    """What an op returns that returns what it writes to."""
    if not op.returns:
        return None
    return written[0] if op.returns == 1 else tuple(written)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return local_of(tensor) if isinstance(tensor, DTensor) else tensor
