"""Implementations of the lowered language's ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from autopar.ir.lowered import (
    ALL_REDUCE_NORM,
    BATCH_NORM,
    CAUSAL_ATTENTION,
    CLOSE,
    CROSS_ENTROPY,
    DROPOUT,
    EXCHANGE,
    GROUPED_MM,
    MASKED_EMBEDDING,
    MICRO_FIRST,
    MICRO_SLICE,
    OPEN,
    PREFIX_SUM,
    ROUTED_GATHER,
    ROUTED_SCATTER,
    Collective,
    LoweredOp,
)

from . import dispatch, grouped, micro_batches, sharded_ops
from .all_reduce_norm import all_reduce_norm
from .attention import causal_attention
from .collectives import Spec, Use, close, open_
from .cross_entropy import cross_entropy
from .group import Group


def exchange(
    op: Collective, specs: Sequence[Spec], group: Group, *tensors: Tensor, kernel: Use = None
) -> Tensor | tuple[Tensor, ...]:
    """A collective that waits at once; a bucket (several tensors) returns a tuple."""
    *edges, pending = open_(op, specs, group, *tensors, kernel=kernel)
    return _one(close(op, specs, group, pending, *edges))


def close_one(
    op: Collective,
    specs: Sequence[Spec],
    group: Group,
    pending: Any,
    *edges: Tensor,
    kernel: Use = None,
) -> Tensor | tuple[Tensor, ...]:
    """The second phase of a collective; a bucket returns a tuple.

    Its kernel is that of the first phase, whatever is said here.
    """
    return _one(close(op, specs, group, pending, *edges))


def _one(outputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


BINDINGS: Mapping[LoweredOp, Callable[..., Any]] = {
    EXCHANGE: exchange,
    OPEN: open_,
    CLOSE: close_one,
    DROPOUT: sharded_ops.dropout,
    CAUSAL_ATTENTION: causal_attention,
    MASKED_EMBEDDING: sharded_ops.masked_embedding,
    CROSS_ENTROPY: cross_entropy,
    BATCH_NORM: sharded_ops.batch_norm,
    ALL_REDUCE_NORM: all_reduce_norm,
    PREFIX_SUM: dispatch.prefix_sum,
    ROUTED_GATHER: dispatch.routed_gather,
    ROUTED_SCATTER: dispatch.routed_scatter,
    GROUPED_MM: grouped.grouped_mm,
    MICRO_SLICE: micro_batches.micro_slice,
    MICRO_FIRST: micro_batches.micro_first,
}
