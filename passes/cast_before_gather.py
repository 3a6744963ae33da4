"""Gather parameters in the lower precision that they are used in."""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx

from autopar.ir.graph import Graph, tensor_inputs, value_of
from autopar.ir.mesh import Mesh
from autopar.ir.recomputed import MARK, mark_of
from autopar.ir.sharding import Sharding

from .narrow_gathers import is_narrowing_cast

Node = torch.fx.Node


def cast_before_gather(graph: Graph, mesh: Mesh) -> Graph:
    """Let casts of parameters to a narrower dtype run on the shards that are stored.

    A cast commutes with a gather, whose messages have half the bytes after it. Its gradient is then
    reduced and scattered in one step, not reduced whole and cut. The casts come before all other
    ops, so that gathers can be issued early, and outside of regions that the backward runs again;
    one of a parameter that is gathered again in the backward is marked as its parameter is
    (`meta["regather"]`). A cast stays where it is if that sends no less: if it is read in several
    shardings, or if its parameter has so many casts.
    Comes after `propagate`, changes the shardings and `meta["wants"]` of casts.
    """
    new = graph.copy()
    first = next((node for node in new.fx.nodes if node.op != "placeholder"), None)
    for parameter in new.placeholders("param"):
        casts = [node for node in parameter.users if is_narrowing_cast(node)]
        moved = [node for node in casts if _gathers_less(node, mesh)]
        width = sum(value_of(node).dtype.itemsize for node in moved)
        if width > value_of(parameter).dtype.itemsize:
            continue
        for node in moved:
            stored = value_of(parameter).sharding
            assert stored is not None and first is not None
            node.meta["wants"] = (stored,)
            node.meta["value"] = value_of(node).with_sharding(stored)
            node.meta[MARK] = None
            node.meta["regather"] = bool(parameter.meta.get("regather"))
            if node is first:
                first = node.next
            first.prepend(node)
    return new


def is_plain_cast(node: Node) -> bool:
    """Whether its result can be treated as a parameter: it is in no region that runs again."""
    return is_narrowing_cast(node) and mark_of(node) is None


def _gathers_less(node: Node, mesh: Mesh) -> bool:
    """Whether a cast reads a gathered parameter, and one gather of its result would do."""
    stored = value_of(tensor_inputs(node)[0]).sharding
    (wanted,) = node.meta["wants"]
    assert stored is not None
    readers = set(_wanted(node))
    return (
        stored.parts(mesh) > wanted.parts(mesh)
        and len(readers) == 1
        and not any(user.op == "output" for user in node.users)
    )


def _wanted(node: Node) -> Iterator[Sharding]:
    """The shardings that the readers of a value want it in."""
    for user in node.users:
        for source, want in zip(tensor_inputs(user), user.meta["wants"], strict=True):
            if source is node:
                yield want
