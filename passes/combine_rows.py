"""Weigh and add up the rows that a routed gather brings back by its own kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph, value_of
from autopar.ir.lowered import ROUTED_GATHER, LoweredOp
from autopar.ir.pointwise import IDENTITY
from autopar.ir.recomputed import mark_of

from .fold_neighbours import Neighbours, epilogue_of, reason

Node = torch.fx.Node

aten = torch.ops.aten
VIEWS = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default})
_SMALL = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class _Sum:
    """`rows * weight`, seen as [tokens, ways, width], and summed over the ways."""

    scaled: Node
    total: Node
    weight: Node
    ways: int


def combine_rows(graph: Graph, node: Node) -> str:
    """Fold the weighted sum of a routed gather's rows into it, in place; what it then does.

    `(x[slot] * weight).view(tokens, ways, width).sum(1)` becomes one routed gather with `weight=`,
    `ways=`, `shape=` and `dtype=`, if nobody else reads what is between. Element-wise ops that
    alone read the sum, perhaps seen in another shape, become its `epilogue=`. Nothing moves past
    a message: a rank without tokens is not folded, and ranks must keep one order. Empty if none.
    """
    found = None if reason(node, node) else _sum_of(node)
    if found is None or _communicates_between(node, found.scaled):
        return ""
    after = _epilogue_of(found.total)
    epilogue, last = after.fusion.epilogue, after.last
    if not epilogue or _communicates_between(node, last):
        epilogue, last = IDENTITY, found.total
    value = value_of(last)
    gone = _from(last, found.scaled)
    (last if epilogue else found.scaled).append(node)  # where the other operands are there
    last.replace_all_uses_with(node)
    for absorbed in gone:
        graph.fx.erase_node(absorbed)
    more: dict[str, Any] = {
        "weight": found.weight,
        "ways": found.ways,
        "shape": value.int_shape(),
        "dtype": value.dtype,
    }
    if epilogue:
        more |= {"epilogue": epilogue, "extras": after.extras}
    node.kwargs = {**node.kwargs, **more}
    node.meta = {**node.meta, "value": value}
    return f"weighted sum of {found.ways}" + (f" | {epilogue}" if epilogue else "")


def _epilogue_of(total: Node) -> Neighbours:
    """What follows the sum, or its only reader if that is the sum in another shape."""
    user = only_user(total)
    width = value_of(total).int_shape()[-1]
    viewed = (
        user is not None and user.target in VIEWS and value_of(user).int_shape()[-1:] == (width,)
    )
    return epilogue_of(user if user is not None and viewed else total)


def _from(last: Node, first: Node) -> list[Node]:
    """The chain of only readers from `first` to `last`, backwards."""
    chain = [first]
    while chain[-1] is not last:
        (user,) = chain[-1].users
        chain.append(user)
    return chain[::-1]


def _sum_of(node: Node) -> _Sum | None:
    if node.target is not ROUTED_GATHER or not _takes_whole_rows(node):
        return None
    count, width = value_of(node).int_shape()
    scaled = only_user(node)
    if scaled is None or scaled.target is not aten.mul.Tensor:
        return None
    others = [a for a in scaled.args if isinstance(a, torch.fx.Node) and a is not node]
    if len(others) != 1 or others[0].op == "placeholder":
        return None
    weight = others[0]
    view = only_user(scaled)
    if view is None or view.target not in VIEWS or value_of(view).rank != 3:
        return None
    total = only_user(view)
    if total is None or total.target is not aten.sum.dim_IntList or not _sums_ways(total):
        return None
    tokens, ways, last = value_of(view).int_shape()
    if (tokens * ways, last) != (count, width) or value_of(weight).int_shape() != (count, 1):
        return None
    dtypes = {value_of(n).dtype for n in (node, weight, total)}
    if not (dtypes <= _SMALL or dtypes == {torch.float64}):
        return None
    return _Sum(scaled, total, weight, ways)


def _communicates_between(first: Node, last: Node) -> bool:
    node = first.next
    while node is not last:
        if isinstance(node.target, LoweredOp):
            return True
        node = node.next
    return False


def _takes_whole_rows(node: Node) -> bool:
    """Whether it gives [positions, width]: all dims but the last indexed, no row left out."""
    args: Any = node.args
    if len(args) > 4:  # a table, with its padding row
        return False
    x, indices, route, _ = args
    flat = all(value_of(i).rank == 1 for i in indices)
    whole = route.dim == 0 and value_of(x).rank == len(route.sizes) + 1
    return flat and whole and value_of(node).rank == 2


def _sums_ways(total: Node) -> bool:
    dims, *rest = total.args[1:]
    return dims in ([1], [-2], (1,), (-2,)) and not any(rest) and not any(total.kwargs.values())


def only_user(node: Node) -> Node | None:
    """The one reader of a value, recomputed with it or not at all."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.op == "call_function" and mark_of(user) == mark_of(node) else None
