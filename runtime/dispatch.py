"""Rows sent to, or fetched from, the members of a group that own them: experts and big tables.

Every member has positions (token slots, ids) anywhere in an indexed dim that is divided among the
members. `routed_gather` is `x[indices]` and `routed_scatter` is `x[indices] = values` (or `+=`).
Positions are sorted by owner; counts, positions and rows are exchanged by all-to-all, and the
gradients take the way back. Tensors are local; the gradient of each input is that of a shard.

With `kernel=True` rows of floating point numbers are copied and added up by the kernels of
`autopar.runtime.kernels.permute` where they run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.ir.lowered import Route
from autopar.ir.pointwise import IDENTITY, Pointwise, parse_pointwise

from .group import Group
from .kernels.combine import NAME as COMBINE
from .kernels.combine import combine
from .kernels.permute import NAME, Segments, gather_rows, sum_segments, takes
from .kernels.spread import spread

ADD = parse_pointwise("add(x, a0)")


def routed_gather(
    x: Tensor,
    indices: Sequence[Tensor],
    route: Route,
    group: Group,
    padding_idx: int | None = None,
    kernel: bool | None = None,
    weight: Tensor | None = None,
    ways: int = 1,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    epilogue: Pointwise = IDENTITY,
    extras: Sequence[Tensor] = (),
) -> Tensor:
    """`x[..., i, j, ...]` with the first indexed dim of `x` divided among the group.

    The index tensors (int, broadcast against each other) stand for the dims from `route.dim` on and
    may differ between members. `padding_idx` is given where `x` is a table: a position whose row
    gets no gradient, or negative.
    With a `weight`, [positions, 1], the result is `(rows * weight).view(-1, ways, width).sum(1)` of
    rows [positions, width], seen as `shape`, after which comes the epilogue; its dtype is `dtype`.
    Raises IndexError for positions out of range.
    """
    if weight is not None:
        call = _Combination(weight, ways, shape, dtype or x.dtype, epilogue, tuple(extras))
        return _combined(x, indices, route, group, kernel, call)
    positions, shape = _positions(indices, route)
    plan = _Exchange.of(positions, route, group, _by_kernel(kernel, x))
    padding = padding_idx
    if padding is not None:
        padding = padding - route.owned[group.rank][0] if padding >= 0 else -1
    rows: Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
        _as_rows(x, route), plan, padding
    )
    return _from_rows(rows, shape, x, route)


@dataclass(frozen=True)
class _Combination:
    weight: Tensor
    ways: int
    shape: Sequence[int] | None
    dtype: torch.dtype
    epilogue: Pointwise
    extras: tuple[Tensor, ...]


def _combined(
    x: Tensor,
    indices: Sequence[Tensor],
    route: Route,
    group: Group,
    kernel: bool | None,
    call: _Combination,
) -> Tensor:
    """By the kernel the rows that come back are read once, and never put in order."""
    ways, width = call.ways, x.shape[-1]
    if not (_by_kernel(kernel, x) and takes(COMBINE, x, call.weight, *call.extras)):
        rows = routed_gather(x, indices, route, group, kernel=kernel)
        total = (rows * call.weight).view(-1, ways, width).sum(1)
        total = total if call.shape is None else total.view(tuple(call.shape))
        return call.epilogue(total, *call.extras).to(call.dtype) if call.epilogue else total
    positions, _ = _positions(indices, route)
    plan = _Exchange.of(positions, route, group, True)
    arrived: Tensor = _Fetch.apply(_as_rows(x, route), plan)  # type: ignore[no-untyped-call]
    where, scale = plan.inverse.view(-1, ways), call.weight.reshape(-1, ways)
    extras = [a.reshape(-1, width) for a in call.extras]
    # Every row that arrived was asked for at one position.
    out = combine(arrived, where, scale, call.epilogue, extras, call.dtype, once=True)
    return out if call.shape is None else out.view(tuple(call.shape))


def routed_scatter(
    x: Tensor,
    indices: Sequence[Tensor],
    values: Tensor,
    route: Route,
    group: Group,
    accumulate: bool = False,
    scale: float = 1.0,
    kernel: bool | None = None,
    weight: Tensor | None = None,
    ways: int = 0,
) -> Tensor:
    """`x` with `x[..., i, j, ...] = scale * values` (or `+=`), its first indexed dim divided.

    `values` broadcasts to what `x[..., i, j, ...]` has for shape. Of several values for one
    position the last one stays, members counting in order. Given `ways`, `x` is [rows..., width],
    and of `values`, [..., width], every row is put at `ways` positions one after the other, times
    its element of `weight` [positions, 1]. Raises IndexError as `routed_gather`.
    """
    positions, shape = _positions(indices, route)
    values = values if scale == 1 else values * scale
    if ways:
        tokens = values.reshape(-1, values.shape[-1])
        if _by_kernel(kernel, x, values):
            plan = _Exchange.of(positions, route, group, True)
            factors = None if weight is None else weight.to(x.dtype).reshape(-1, ways)
            by_owner = spread(tokens, plan.order, plan.inverse.view(-1, ways), factors)
            put: Tensor = _Scatter.apply(  # type: ignore[no-untyped-call]
                _as_rows(x, route), by_owner, plan, accumulate, True
            )
            return put.view(x.shape)
        values = tokens.repeat_interleave(ways, 0)
        values = values if weight is None else values * weight
    plan = _Exchange.of(positions, route, group, _by_kernel(kernel, x, values))
    k, dim = len(route.sizes), route.dim
    wide = values.expand(*x.shape[:dim], *shape, *x.shape[dim + k :])
    sent = wide.movedim(tuple(range(dim, dim + len(shape))), tuple(range(len(shape))))
    rest = (*x.shape[:dim], *x.shape[dim + k :])
    sent = sent.reshape(positions.numel(), math.prod(rest))
    rows: Tensor = _Scatter.apply(  # type: ignore[no-untyped-call]
        _as_rows(x, route), sent, plan, accumulate, False
    )
    return _from_rows(rows, x.shape[dim : dim + k], x, route)


def prefix_sum(x: Tensor, dim: int, group: Group, dtype: torch.dtype | None = None) -> Tensor:
    """`x.cumsum(dim)` of a dim whose consecutive pieces the members of the group hold in order."""
    y: Tensor = _PrefixSum.apply(x, dim, group, dtype)  # type: ignore[no-untyped-call]
    return y


def _by_kernel(wanted: bool | None, *tensors: Tensor) -> bool:
    floating = all(x.is_floating_point() for x in tensors)
    return bool(wanted) and floating and takes(NAME, *tensors)


def _as_rows(x: Tensor, route: Route) -> Tensor:
    """`x` as (positions here, elements of a row)."""
    dims = range(route.dim, route.dim + len(route.sizes))
    here = math.prod(x.shape[d] for d in dims)
    rest = math.prod(s for d, s in enumerate(x.shape) if d not in dims)
    return x.movedim(tuple(dims), tuple(range(len(dims)))).reshape(here, rest)


def _from_rows(rows: Tensor, shape: Sequence[int], like: Tensor, route: Route) -> Tensor:
    """Rows for positions of `shape` in the layout of `like`, whose indexed dims they replace."""
    before, after = like.shape[: route.dim], like.shape[route.dim + len(route.sizes) :]
    out = rows.view(*shape, *before, *after)
    if not before:
        return out
    picked = tuple(range(len(shape)))
    return out.movedim(picked, tuple(i + route.dim for i in picked)).contiguous()


def _positions(indices: Sequence[Tensor], route: Route) -> tuple[Tensor, torch.Size]:
    """Flat positions in the indexed dims taken as one, and the shape of the broadcast indices.

    On CPU a wrong index raises here; elsewhere its position is -1, which nobody owns, and the
    exchange, whose counts come to the host anyway, raises.
    """
    shape = torch.Size(torch.broadcast_shapes(*(i.shape for i in indices)))  # type: ignore[no-untyped-call]
    wide = [i.to(torch.int64).expand(shape) for i in indices]
    flat: Tensor | None = None
    legal: Tensor | None = None
    for index, size in zip(wide, route.sizes, strict=True):
        part = index.reshape(-1)
        if part.device.type == "cpu" and not torch.compiler.is_compiling() and part.numel():
            low, high = (int(v) for v in part.aminmax())
            if low < (-size if route.wraps else 0) or high >= size:
                wrong = high if high >= size else low
                raise IndexError(f"index {wrong} is out of bounds for dimension with size {size}")
        if route.wraps:
            part = part.where(part >= 0, part + size)
        inside = (part >= 0) & (part < size)
        legal = inside if legal is None else legal & inside
        flat = part if flat is None else flat * size + part
    assert flat is not None and legal is not None
    return flat.where(legal, -1), shape


@dataclass(frozen=True)
class _Exchange:
    """Which rows go where: made once per call, used by its forward and its backward.

    `order` lists the positions of this member by owner (those that nobody owns are left out),
    `sent[i]` of them belong to member `i`; `here` are the rows of this member that others (and
    itself) asked for, `asked[i]` of them by member `i`. `kernel` says what moves the rows.
    """

    order: Tensor
    here: Tensor
    sent: list[int]
    asked: list[int]
    count: int
    group: Group
    kernel: bool

    @staticmethod
    def of(positions: Tensor, route: Route, group: Group, kernel: bool = False) -> _Exchange:
        with torch.no_grad():
            inner = math.prod(route.sizes[1:])
            owner = _owners(positions, route, inner)
            order = torch.argsort(owner, stable=True)
            counts = torch.bincount(owner, minlength=group.size + 1)[: group.size]
            ones = [1] * group.size
            asked = group.all_to_all(counts, ones, ones).wait().tolist()
            sent = counts.tolist()
            lost = positions.numel() - sum(sent)
            if lost and sum(stop - start for start, stop in route.owned) == route.sizes[0]:
                raise IndexError(f"{lost} indices are out of bounds for sizes {route.sizes}")
            order = order[: sum(sent)]
            wanted = group.all_to_all(positions.index_select(0, order), asked, sent).wait()
            here = wanted - route.owned[group.rank][0] * inner
        return _Exchange(order, here, sent, asked, positions.numel(), group, kernel)

    @cached_property
    def inverse(self) -> Tensor:
        """Where in `order` each position of this member is; -1 where nobody owns it."""
        inverse = self.order.new_full((self.count,), -1)
        places = torch.arange(len(self.order), device=self.order.device)
        return inverse.index_copy_(0, self.order, places)

    def taken(self, rows: Tensor) -> Tensor:
        """The rows that were asked for."""
        return gather_rows(rows, self.here) if self.kernel else rows.index_select(0, self.here)

    def added(self, rows: Tensor, count: int, to: Tensor | None = None) -> Tensor:
        """Rows in the order of `here` added up where they belong, in all `count`, and to `to`."""
        if self.kernel:
            segments = Segments.of(self.here, count)
            return sum_segments(rows, segments, *((IDENTITY,) if to is None else (ADD, (to,))))
        total = _sum_rows(rows, self.here, count)
        return total if to is None else to + total

    def sent_out(self, rows: Tensor) -> Tensor:
        """Rows by owner, to where they belong."""
        return self.group.all_to_all(rows.contiguous(), self.asked, self.sent).wait()

    def brought_back(self, rows: Tensor) -> Tensor:
        """Rows in the order of `here`, back to who asked: by owner."""
        return self.group.all_to_all(rows, self.sent, self.asked).wait()

    def to_owners(self, rows: Tensor) -> Tensor:
        """Rows in the order of this member's positions, to where they belong."""
        take = gather_rows if self.kernel else _select
        return self.sent_out(take(rows, self.order))

    def to_askers(self, rows: Tensor) -> Tensor:
        """Rows in the order of `here`, back to who asked; zeros where nobody owns a position."""
        got = self.brought_back(rows)
        if self.kernel:
            return gather_rows(got, self.inverse)
        make = got.new_empty if len(self.order) == self.count else got.new_zeros
        return make((self.count, *rows.shape[1:])).index_copy_(0, self.order, got)


def _owners(positions: Tensor, route: Route, inner: int) -> Tensor:
    """The member that owns each position; the number of members where nobody does."""
    n = len(route.owned)
    members = sorted(range(n), key=lambda m: route.owned[m])
    stops = [route.owned[m][1] * inner for m in members]
    starts = [route.owned[m][0] * inner for m in members]
    device = positions.device
    at = torch.bucketize(positions, torch.tensor(stops, device=device), right=True)
    begin = torch.tensor([*starts, 0], device=device)[at]
    member = torch.tensor([*members, n], device=device)[at]
    return member.where(positions >= begin, n)  # in a gap: before its owner's start


def _last(index: Tensor, count: int) -> Tensor:
    """The last position in `index` of each of `count` numbers; -1 of those that are not there."""
    last = index.new_full((count,), -1)
    places = torch.arange(len(index), device=index.device)
    return last.scatter_reduce_(0, index, places, "amax")


def _select(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index)


def _sum_rows(rows: Tensor, here: Tensor, count: int) -> Tensor:
    """`zeros(count).index_add(0, here, rows)`, by the faster kernel where there is one."""
    if rows.is_floating_point() and count and rows.shape[1]:
        out: Tensor = torch.ops.aten.embedding_dense_backward(rows, here, count, -1, False)
        return out
    return rows.new_zeros((count, *rows.shape[1:])).index_add_(0, here, rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Exchange, padding: int | None) -> Tensor:
        ctx.plan, ctx.count, ctx.padding = plan, x.shape[0], padding
        return plan.to_askers(plan.taken(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Exchange = ctx.plan
        arrived = plan.to_owners(grad)
        if ctx.padding is None:
            return plan.added(arrived, ctx.count), None, None
        if ctx.padding >= 0:
            arrived = arrived.masked_fill((plan.here == ctx.padding)[:, None], 0)
        # A frequent id may be a tenth of a batch, and the kernel adds up a row by one program.
        return _sum_rows(arrived, plan.here, ctx.count), None, None


class _Fetch(torch.autograd.Function):
    """The rows of `_Gather` by owner, as they arrive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Exchange) -> Tensor:
        ctx.plan, ctx.count = plan, x.shape[0]
        return plan.brought_back(plan.taken(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Exchange = ctx.plan
        return plan.added(plan.sent_out(grad), ctx.count), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, plan: _Exchange, accumulate: bool, by_owner: bool
    ) -> Tensor:
        ctx.plan, ctx.accumulate, ctx.by_owner = plan, accumulate, by_owner
        arrived = plan.sent_out(values) if by_owner else plan.to_owners(values)
        if accumulate:
            return plan.added(arrived, x.shape[0], to=x)
        if plan.kernel:
            return gather_rows(arrived, _last(plan.here, x.shape[0]), default=x)
        return x.index_put((plan.here,), arrived)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Exchange = ctx.plan
        of_x, of_values = None, None
        if ctx.needs_input_grad[0]:
            of_x = grad if ctx.accumulate else grad.index_fill(0, plan.here, 0)
        if ctx.needs_input_grad[1]:
            rows = plan.taken(grad)
            of_values = plan.brought_back(rows) if ctx.by_owner else plan.to_askers(rows)
        return of_x, of_values, None, None, None


class _PrefixSum(torch.autograd.Function):
    """One message of totals forward, one backward: the gradient is a sum from behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, dtype: torch.dtype | None) -> Tensor:
        ctx.dim, ctx.group, ctx.dtype = dim, group, x.dtype
        y = x.cumsum(dim, dtype=dtype)
        totals = x.sum(dim, dtype=y.dtype)
        return y + _of_others(totals, group, slice(group.rank)).unsqueeze(dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, group = ctx.dim, ctx.group
        behind = grad.flip(dim).cumsum(dim).flip(dim)
        others = _of_others(grad.sum(dim), group, slice(group.rank + 1, None))
        return (behind + others.unsqueeze(dim)).to(ctx.dtype), None, None, None


def _of_others(totals: Tensor, group: Group, members: slice) -> Tensor:
    """Sum of the totals of some members."""
    parts = group.all_gather(totals[None]).wait()
    return parts[members].sum(0, dtype=totals.dtype)
