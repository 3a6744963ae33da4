"""The typed collectives of the lowered language, in two phases and differentiable.

    *edges, pending = open_(op, specs, group, *tensors)
    outputs         = close(op, specs, group, pending, *edges)

`open_` issues the forward's communication and `close` waits for it; in the backward `close` issues
and `open_` waits. Autograd runs the nodes that were made last first, so an `open_` that stands
early in the forward waits late in the backward, and a `close` that stands late issues early. The
tensors of one call travel together: one flat buffer and one message per dtype.

What is in flight passes through the `Pending` object. The edges are empty tensors that only tie
`close` to `open_` in the autograd graph, one per tensor, so that tensors that need no gradient have
an edge that needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autopar.ir.lowered import COLLECTIVES, Collective, ShardSpec, SwapSpec

from .buckets import joined, pack, unpack
from .chunks import (
    check_full,
    check_local,
    chunk,
    full_shape,
    is_prefix,
    local,
    local_shape,
    member_sizes,
)
from .compressed import compressed
from .group import Group

Spec = ShardSpec | SwapSpec | None
Finish = Callable[[], list[Tensor]]
Use = bool | str | None
"""The kernel that a call was opened with: True packs buckets in one launch, "int8" also sums
gradients as int8 in the backward; None: torch alone."""
Starter = Callable[[list[Tensor], Sequence[Any], Group, Use], Finish]


@dataclass
class _Meta:
    """Shape, dtype and device of an output, to make a zero gradient from."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@dataclass
class Pending:
    """What passes from `open_` to `close` in the forward, and back in the backward."""

    finish: Finish | None = None
    gradients: Finish | None = None
    differentiable: list[int] = field(default_factory=list)
    missing: set[int] = field(default_factory=set)
    kernel: Use = None
    ties: list[Tensor] | None = None
    """For pmax and pmin: the local inputs, then each rank's share of the gradient."""


def open_(
    op: Collective | str,
    specs: Sequence[Spec],
    group: Group,
    *tensors: Tensor,
    kernel: Use = None,
) -> tuple[Any, ...]:
    """Issue a collective; return one autograd edge per tensor, then what is pending.

    `kernel` is used in the forward and in the backward.
    """
    name = op if isinstance(op, str) else op.name
    if name not in COLLECTIVES:
        raise ValueError(f"unknown collective {name!r}")
    pending = Pending(kernel=kernel)
    if torch.is_grad_enabled():
        pending.differentiable = [i for i, x in enumerate(tensors) if x.requires_grad]
    if pending.differentiable:
        edges = _Open.apply(  # type: ignore[no-untyped-call]
            name, tuple(specs), group, pending, *tensors
        )
        return (*edges, pending)
    pending.finish = _FORWARD[name](list(tensors), specs, group, kernel)
    return (*(x.new_empty(0) for x in tensors), pending)


def close(
    op: Collective | str, specs: Sequence[Spec], group: Group, pending: Pending, *edges: Tensor
) -> tuple[Tensor, ...]:
    """Wait for what `open_` issued; return one output per tensor."""
    name = op if isinstance(op, str) else op.name
    if pending.differentiable and torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _Close.apply(  # type: ignore[no-untyped-call]
            name, tuple(specs), group, pending, *edges
        )
        return outputs
    return tuple(_finish_forward(name, group, pending))


def apply(op: Collective | str, spec: Spec, group: Group, x: Tensor) -> Tensor:
    """One tensor through one collective, waited for at once."""
    *edges, pending = open_(op, (spec,), group, x)
    return close(op, (spec,), group, pending, *edges)[0]


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        specs: tuple[Any, ...],
        group: Group,
        pending: Pending,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.pending = pending
        ctx.count = len(tensors)
        ctx.set_materialize_grads(False)
        # Detached: what close() returns must not carry the history of what came in here.
        inputs = [x.detach() for x in tensors]
        pending.finish = _FORWARD[name](inputs, specs, group, pending.kernel)
        if name in _EXTREMA:
            pending.ties = inputs
        edges = tuple(x.new_empty(0) for x in tensors)
        others = (e for i, e in enumerate(edges) if i not in set(pending.differentiable))
        ctx.mark_non_differentiable(*others)
        return edges

    @staticmethod
    def backward(ctx: Any, *edges: Tensor | None) -> tuple[Tensor | None, ...]:
        pending: Pending = ctx.pending
        gradients: list[Tensor | None] = [None] * ctx.count
        if pending.gradients is not None:
            finish, pending.gradients = pending.gradients, None
            for i, gradient in zip(pending.differentiable, finish(), strict=True):
                if i not in pending.missing:  # on one device it would be None, too
                    gradients[i] = gradient
        return None, None, None, None, *gradients


class _Close(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        specs: tuple[Any, ...],
        group: Group,
        pending: Pending,
        *edges: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.call = (name, specs, group)
        ctx.pending = pending
        ctx.set_materialize_grads(False)
        outputs = tuple(_finish_forward(name, group, pending))
        kept = set(pending.differentiable)
        ctx.mark_non_differentiable(*(y for i, y in enumerate(outputs) if i not in kept))
        ctx.metas = [_Meta(y.shape, y.dtype, y.device) for y in outputs]
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        name, specs, group = ctx.call
        pending: Pending = ctx.pending
        kept = pending.differentiable
        # A rank whose outputs were not used must still take part in the communication.
        pending.missing = {i for i in kept if gradients[i] is None}
        grads = [ctx.metas[i].zeros() if (g := gradients[i]) is None else g for i in kept]
        if name in _EXTREMA:
            assert pending.ties is not None
            shares = [pending.ties[i] for i in kept]
            if torch.is_grad_enabled():
                grads = _transposed("psum", [None] * len(grads), group, grads)
            pending.gradients = lambda: [g * share for g, share in zip(grads, shares, strict=True)]
        elif torch.is_grad_enabled():  # gradients of gradients are asked for
            found = _transposed(name, [specs[i] for i in kept], group, grads)
            pending.gradients = lambda: found
        else:
            start = _BACKWARD[name]
            if pending.kernel == "int8":
                start = compressed(start)
            pending.gradients = start(grads, [specs[i] for i in kept], group, pending.kernel)
        edges: list[Tensor | None] = [None] * len(gradients)
        for i, grad in zip(kept, grads, strict=True):
            edges[i] = grad.new_empty(0)
        return None, None, None, None, *edges


def _transposed(
    name: str, specs: Sequence[Any], group: Group, gradients: list[Tensor]
) -> list[Tensor]:
    """What the backward of a collective makes of gradients, differentiable itself."""
    if name == "keep_first":
        return gradients
    if name == "slice_vary":
        pairs = zip(gradients, specs, strict=True)
        return [_Pad.apply(g, spec, group) for g, spec in pairs]  # type: ignore[no-untyped-call]
    if name == "swap":
        specs = [SwapSpec(spec.target, spec.source) for spec in specs]
    *edges, pending = open_(_TRANSPOSED[name], specs, group, *gradients)
    return list(close(_TRANSPOSED[name], specs, group, pending, *edges))


class _Pad(torch.autograd.Function):
    """This member's part in place and zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: ShardSpec, group: Group) -> Tensor:
        ctx.spec, ctx.group = spec, group
        return _pad([x.detach()], [spec], group, None)()[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return apply("slice_vary", ctx.spec, ctx.group, gradient), None, None


def _finish_forward(name: str, group: Group, pending: Pending) -> list[Tensor]:
    finish, pending.finish = pending.finish, None
    if finish is None:
        raise RuntimeError(f"{name} was closed twice")
    outputs = finish()
    if pending.ties is not None:
        pending.ties = _shares(pending.ties, outputs, group)
    return outputs


def _shares(inputs: list[Tensor], outputs: list[Tensor], group: Group) -> list[Tensor]:
    """Each rank's share of the gradient of an extremum: equal among the ranks that attain it.

    One device divides among the elements that attain it (`amax`) or takes one of them (`max`): the
    same wherever there are no ties.
    """
    hits = [(x == y).to(y.dtype) for x, y in zip(inputs, outputs, strict=True)]
    counts = _all_reduce("sum")(hits, (None,) * len(hits), group, None)()
    return [hit / count for hit, count in zip(hits, counts, strict=True)]


# --- Buckets ----------------------------------------------------------------------------------


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors that travel in one buffer."""
    buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, x in enumerate(tensors):
        buckets.setdefault((x.dtype, x.device), []).append(i)
    return list(buckets.values())


def _bucketed(start: Starter) -> Starter:
    """Lift `start`, which wants tensors of one dtype, to any list of tensors."""

    def start_all(tensors: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
        buckets = _by_dtype(tensors)
        if len(buckets) == 1:
            return start(tensors, specs, group, kernel)
        flights = [
            start([tensors[i] for i in bucket], [specs[i] for i in bucket], group, kernel)
            for bucket in buckets
        ]

        def finish() -> list[Tensor]:
            outputs: list[Any] = [None] * len(tensors)
            for bucket, flight in zip(buckets, flights, strict=True):
                for i, y in zip(bucket, flight(), strict=True):
                    outputs[i] = y
            return outputs

        return finish

    return start_all


# --- Communication on lists of tensors, no autograd -------------------------------------------


def _identity(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
    return lambda: xs


def _view(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
    """Identity in the forward: new tensors on the same memory, which may get their own history."""
    return lambda: [x.detach() for x in xs]


def _all_reduce(op: str) -> Starter:
    def start(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
        flat = pack(xs, kernel)
        # One contiguous tensor is not copied, and others may hold its memory.
        ours = flat.data_ptr() != xs[0].data_ptr()
        flight = group.all_reduce(flat, op, in_place=ours)
        shapes = [x.shape for x in xs]
        return lambda: unpack(flight.wait(), shapes)

    return _bucketed(start)


def _start_gather(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
    for x, spec in zip(xs, specs, strict=True):
        check_local(x, spec, group, "all_gather")
    shapes = [x.shape for x in xs]
    flight = group.all_gather(pack(xs, kernel), member_sizes(shapes, specs, group.size))

    def finish() -> list[Tensor]:
        flat = flight.wait()
        if len(shapes) == 1 and is_prefix(shapes[0], specs[0]):
            shape, spec = shapes[0], specs[0]
            return [flat.view(full_shape(shape, spec))]
        return joined(flat, shapes, specs, group.size, kernel)

    return finish


def _start_reduce_scatter(
    xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use
) -> Finish:
    for x, spec in zip(xs, specs, strict=True):
        check_full(x, spec, group, "reduce_scatter")
    members = range(group.size)
    shapes = [x.shape for x in xs]
    sizes = member_sizes(shapes, specs, group.size)
    if len(xs) == 1 and is_prefix(shapes[0], specs[0]):
        flat = xs[0].reshape(-1)
    else:
        pairs = list(zip(xs, specs, strict=True))
        flat = pack([chunk(x, spec, m) for m in members for x, spec in pairs], kernel)
    flight = group.reduce_scatter(flat, sizes)
    locals_ = [local_shape(s, spec, group.rank) for s, spec in zip(shapes, specs, strict=True)]
    return lambda: unpack(flight.wait(), locals_)


def _start_swap(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
    for x, spec in zip(xs, specs, strict=True):
        if spec.source.dim == spec.target.dim:
            raise ValueError(f"swap: source and target are one dim in {spec}")
        check_local(x, spec.source, group, "swap")
        check_full(x, spec.target, group, "swap")
    members = range(group.size)
    pairs = list(zip(xs, specs, strict=True))
    chunks = [chunk(x, spec.target, m) for m in members for x, spec in pairs]
    in_splits = [sum(c.numel() for c in chunks[m * len(xs) : (m + 1) * len(xs)]) for m in members]
    # From member m: my part of the target dim, m's part of the source dim.
    mine = [local_shape(x.shape, spec.target, group.rank) for x, spec in pairs]
    sources = [spec.source for spec in specs]
    out_splits = member_sizes(mine, sources, group.size)
    flight = group.all_to_all(pack(chunks, kernel), out_splits, in_splits)

    return lambda: joined(flight.wait(), mine, sources, group.size, kernel)


def _start_swap_back(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
    return _swap(xs, [SwapSpec(spec.target, spec.source) for spec in specs], group, kernel)


def _slice(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
    """This member's part; contiguous, as the ops of one device would have made it."""

    def finish() -> list[Tensor]:
        outputs = []
        for x, spec in zip(xs, specs, strict=True):
            check_full(x, spec, group, "slice")
            part = local(chunk(x, spec, group.rank), spec)
            outputs.append(part.contiguous().detach())
        return outputs

    return finish


def _pad(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
    """The full tensor with this member's part in place and zeros elsewhere."""

    def finish() -> list[Tensor]:
        outputs = []
        for x, spec in zip(xs, specs, strict=True):
            full = x.new_zeros(full_shape(x.shape, spec))
            place = chunk(full, spec, group.rank)
            place.copy_(x.reshape(place.shape))
            outputs.append(full)
        return outputs

    return finish


def _keep_first(xs: list[Tensor], specs: Sequence[Any], group: Group, kernel: Use) -> Finish:
    if group.rank == 0:
        return _view(xs, specs, group, kernel)
    return lambda: [torch.zeros_like(x) for x in xs]


_gather = _bucketed(_start_gather)
_reduce_scatter = _bucketed(_start_reduce_scatter)
_swap = _bucketed(_start_swap)

_EXTREMA = ("pmax", "pmin")

_FORWARD: dict[str, Starter] = {
    "pvary": _view,
    "psum": _all_reduce("sum"),
    "pmax": _all_reduce("max"),
    "pmin": _all_reduce("min"),
    "gather_vary": _gather,
    "gather_inv": _gather,
    "scatter_sum": _reduce_scatter,
    "slice_inv": _slice,
    "slice_vary": _slice,
    "swap": _swap,
    "keep_first": _keep_first,
}

# What the backward of each does, as a collective (`_transposed` has the rest).
_TRANSPOSED = {
    "pvary": "psum",
    "psum": "pvary",
    "gather_vary": "scatter_sum",
    "gather_inv": "slice_inv",
    "scatter_sum": "gather_vary",
    "slice_inv": "gather_inv",
    "swap": "swap",
}

_BACKWARD: dict[str, Starter] = {
    "pvary": _all_reduce("sum"),
    "psum": _identity,
    "gather_vary": _reduce_scatter,
    "gather_inv": _slice,
    "scatter_sum": _gather,
    "slice_inv": _gather,
    "slice_vary": _pad,
    "swap": _start_swap_back,
    "keep_first": _identity,
}
