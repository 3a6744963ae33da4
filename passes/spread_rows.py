"""Copy and weigh the rows that a routed scatter sends by its own kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from autopar.ir.graph import Graph, value_of
from autopar.ir.lowered import ROUTED_SCATTER

from .combine_rows import VIEWS, only_user
from .fold_neighbours import reason

Node = torch.fx.Node

aten = torch.ops.aten


def spread_rows(graph: Graph, node: Node) -> str:
    """Fold the copies and weights of the rows that a routed scatter sends into it, in place.

    Of `x[slot] (+)= rows.unsqueeze(1).expand(-1, ways, -1).reshape(-1, width) * weight` it gets
    `ways=` and `weight=`, if nobody else reads the copies, or the products. What it then does, as
    text, which is empty if it has neither.
    """
    if node.target is not ROUTED_SCATTER or reason(node, node) or not _puts_whole_rows(node):
        return ""
    args: Any = node.args
    source, reader, gone = args[2], node, []
    count, width = value_of(source).int_shape()
    weight, ways = None, 1
    if source.target is aten.mul.Tensor and only_user(source) is reader:
        found = _rows_and_factor(source, (count, 1))
        if found is not None:
            gone.append(source)
            reader = source
            source, weight = found
    copies = source.args[0] if source.target in VIEWS and only_user(source) is reader else None
    if isinstance(copies, torch.fx.Node) and copies.target is aten.expand.default:
        base: Any = copies.args[0]
        shape, before = value_of(copies).int_shape(), value_of(base).int_shape()
        if only_user(copies) is source and shape[2:] == (width,) and before == (shape[0], 1, width):
            ways = shape[1]
            gone += [source, copies]
            source = base
    if not gone:
        return ""
    more: dict[str, Any] = {"ways": ways} if weight is None else {"weight": weight, "ways": ways}
    node.args = (*args[:2], source, *args[3:])
    node.kwargs = {**node.kwargs, **more}
    for absorbed in gone:
        graph.fx.erase_node(absorbed)
    return " ".join(("weighted" if weight is not None else "", f"copies in {ways}")).strip()


def _rows_and_factor(product: Node, column: tuple[int, ...]) -> tuple[Node, Node] | None:
    """The operand with a product's rows and that with a weight for each, if it is of such."""
    value = value_of(product)
    operands = [a for a in product.args if isinstance(a, torch.fx.Node)]
    for rows, factor in (operands, operands[::-1]) if len(operands) == 2 else ():
        a, b = value_of(rows), value_of(factor)
        shapes = a.int_shape() == value.int_shape() and b.int_shape() == column
        if (
            factor.op != "placeholder"
            and shapes
            and a.dtype == value.dtype
            and b.dtype in (torch.bool, value.dtype)
        ):
            return rows, factor
    return None


def _puts_whole_rows(node: Node) -> bool:
    """Whether it puts [positions, width]: all dims but the last indexed, nothing scaled."""
    args: Any = node.args
    x, indices, values, route = args[:4]
    flat = all(value_of(i).rank == 1 for i in indices)
    whole = route.dim == 0 and value_of(x).rank == len(route.sizes) + 1
    return flat and whole and value_of(values).rank == 2 and "scale" not in node.kwargs
