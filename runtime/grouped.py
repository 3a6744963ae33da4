"""Products of rows sorted by expert with one matrix per expert, rows and experts divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group import Group

Range = tuple[int, int]


def grouped_mm(
    op: str,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    rows: Sequence[Range],
    experts: Sequence[Range],
    group: Group | None,
) -> Tensor:
    """`op(x, weight, ends)` for the rows that are here; `op` is an overload's name.

    `ends[i]` is where the rows of expert `i` end among all rows; member `m` of the group has the
    rows `rows[m]` of all and the matrices `experts[m]`. Rows whose expert is elsewhere are sent
    there and come back: with experts of equal load, few are. Without a group every matrix is here.
    Rows after the last end are zero.
    """
    target: Any = torch.ops
    for name in op.split("."):
        target = getattr(target, name)
    if group is None or group.size == 1:
        start, _ = rows[0]
        y: Tensor = target(x, weight, (ends - start).clamp(0, x.shape[0]).to(ends.dtype))
        return y
    stops = [0, *ends.tolist()]
    wanted = [(stops[first], stops[last]) for first, last in experts]
    me = group.rank
    sent = [_overlap(rows[me], theirs) for theirs in wanted]
    asked = [_overlap(theirs, wanted[me]) for theirs in rows]
    first, last = experts[me]
    counts = [sum(_overlap(r, (stops[e], stops[e + 1])) for r in rows) for e in range(first, last)]
    here = _Send.apply(x, sent, asked, group)  # type: ignore[no-untyped-call]
    local = torch.tensor(counts, device=ends.device).cumsum(0).to(ends.dtype)
    done = target(here, weight, local)
    out: Tensor = _Return.apply(done, sent, asked, x.shape[0], group)  # type: ignore[no-untyped-call]
    return out


def _overlap(a: Range, b: Range) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


def _to(x: Tensor, sent: list[int], asked: list[int], group: Group) -> Tensor:
    return group.all_to_all(x[: sum(sent)].contiguous(), asked, sent).wait()


def _back(x: Tensor, sent: list[int], asked: list[int], rows: int, group: Group) -> Tensor:
    """Rows where they came from, zeros for those that were not sent."""
    got = group.all_to_all(x.contiguous(), sent, asked).wait()
    if got.shape[0] == rows:
        return got
    return torch.cat([got, got.new_zeros((rows - got.shape[0], *got.shape[1:]))])


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], asked: list[int], group: Group) -> Tensor:
        ctx.call = sent, asked, x.shape[0], group
        return _to(x, sent, asked, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _back(grad, *ctx.call), None, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], asked: list[int], rows: int, group: Group
    ) -> Tensor:
        ctx.call = sent, asked, group
        return _back(x, sent, asked, rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _to(grad, *ctx.call), None, None, None, None
