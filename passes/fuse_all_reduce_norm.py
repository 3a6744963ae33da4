"""Make one op of a sum over a group, the residual that is added to it, and the RMSNorm of both."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from autopar.cost.families import op_name
from autopar.ir.graph import Graph, value_of
from autopar.ir.lowered import ALL_REDUCE_NORM, EXCHANGE, PSUM, GroupRef
from autopar.ir.recomputed import MARK, SELECTIVE, mark_of
from autopar.kernel_use import Places

from .fold_neighbours import epilogue_of

Node = torch.fx.Node
NAME = "all_reduce_norm"


@dataclass(frozen=True)
class NormSite:
    """A `psum`, the `add` of the residual and the `norm`, whose name is the place's."""

    psum: Node
    add: Node
    norm: Node
    residual: Node
    weight: Node | None
    eps: float

    @property
    def group(self) -> GroupRef:
        found: Any = self.psum.args[2]
        assert isinstance(found, GroupRef)
        return found


def fuse_all_reduce_norm(graph: Graph, places: Places) -> Graph:
    """Replace psum, add and rms_norm in one rank's program by `all_reduce_norm`, at `places`.

    Element-wise ops that are the only readers of the norm, and read nothing else, become its
    epilogue. The sum's other readers read the second result. What is not of this form, or not
    recomputed together, stays.
    """
    if NAME not in places.of:
        return graph
    new = graph.copy()
    for norm in [site.norm for site in norm_sites(new) if places.has(NAME, site.norm.name)]:
        site = _site(norm)  # again: the residual may be the sum of the site before, now replaced
        assert site is not None
        _fuse(new, site)
    return new


def norm_sites(graph: Graph) -> Iterator[NormSite]:
    """Where a program of one rank has what `all_reduce_norm` does."""
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    for norm in graph.calls():
        site = _site(norm)
        if site is not None and _can_be_one(site, order):
            yield site


def _site(norm: Node) -> NormSite | None:
    if op_name(norm.target) != "rms_norm" or norm.kwargs:
        return None
    add, sizes, weight, eps = (*norm.args, None, None)[:4]
    if not isinstance(add, torch.fx.Node) or op_name(add.target) != "add" or add.kwargs:
        return None
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 1 or len(add.args) != 2:
        return None
    value = value_of(add)
    if eps is None and value.dtype in (torch.float32, torch.float64):
        eps = torch.finfo(value.dtype).eps  # torch's default
    if not isinstance(eps, float):
        return None
    for psum, residual in (add.args, add.args[::-1]):
        if _is_psum(psum) and isinstance(residual, torch.fx.Node):
            assert isinstance(psum, torch.fx.Node)
            weighted = weight if isinstance(weight, torch.fx.Node) else None
            return NormSite(psum, add, norm, residual, weighted, eps)
    return None


def _is_psum(node: Any) -> bool:
    if not isinstance(node, torch.fx.Node) or node.target is not EXCHANGE:
        return False
    op: Any = node.args[0]
    return op is PSUM and len(node.args) == 4 and len(node.users) == 1


def _can_be_one(site: NormSite, order: dict[Node, int]) -> bool:
    """Of one shape and dtype and one region, all operands there before the first reader."""
    mark = mark_of(site.norm)
    if any(mark_of(node) != mark for node in (site.psum, site.add)):
        return False
    if mark is not None and mark.mode == SELECTIVE:
        return False  # what collectives give is kept by their arguments
    total = value_of(site.add)
    parts = [value_of(site.psum), value_of(site.residual)]
    if any(part.shape != total.shape for part in parts) or value_of(site.norm).shape != total.shape:
        return False
    if torch.promote_types(parts[0].dtype, parts[1].dtype) != total.dtype:
        return False
    needed = (site.psum, site.residual, *([] if site.weight is None else [site.weight]))
    ready = max(order[node] for node in needed)
    return ready < min(order[user] for user in site.add.users)


def _fuse(graph: Graph, site: NormSite) -> None:
    after = epilogue_of(site.norm, 0)
    result, total = value_of(after.last), value_of(site.add)
    kwargs: dict[str, Any] = {}
    if after.absorbed or result.dtype != total.dtype:
        kwargs = {"epilogue": after.fusion.epilogue, "dtype": result.dtype}
    arguments: Any = (site.psum.args[3], site.residual, site.weight, site.eps, site.group)
    first = next(node for node in graph.fx.nodes if node in site.add.users)
    with graph.fx.inserting_before(first):
        fused = graph.fx.call_function(ALL_REDUCE_NORM, arguments, kwargs)
        y = graph.fx.call_function(operator.getitem, (fused, 0))
        summed = graph.fx.call_function(operator.getitem, (fused, 1))
    fused.meta = {**site.norm.meta, "value": (result, total)}
    y.meta = {**after.last.meta, MARK: mark_of(site.norm)}
    summed.meta = dict(site.add.meta)
    after.last.replace_all_uses_with(y)
    for node in (*reversed(after.absorbed), site.norm):
        graph.fx.erase_node(node)
    site.add.replace_all_uses_with(summed)
    graph.fx.erase_node(site.add)
    graph.fx.erase_node(site.psum)
    if not summed.users:
        graph.fx.erase_node(summed)
