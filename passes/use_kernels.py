"""Let autopar's own kernels run where the plan says, and do what stands beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.fx

from autopar.cost.families import op_name
from autopar.ir.graph import Graph, Value, value_of
from autopar.ir.lowered import (
    CLOSE,
    CROSS_ENTROPY,
    DROPOUT,
    EXCHANGE,
    GATHER_VARY,
    OPEN,
    PVARY,
    ROUTED_GATHER,
    ROUTED_SCATTER,
)
from autopar.ir.mesh import Mesh
from autopar.ir.pointwise import PLAIN, Fusion
from autopar.ir.recomputed import mark_of
from autopar.kernel_use import Places

from .combine_rows import combine_rows
from .fold_neighbours import Neighbours, described, epilogue_of, is_parameter, prologue_of
from .spread_rows import spread_rows

Node = torch.fx.Node
REDUCES_GRADIENTS = (PVARY, GATHER_VARY)

_MATMULS = frozenset({"linear", "mm", "matmul", "addmm", "bmm"})  # they do not save what they give
_VIEWS = frozenset({"view", "reshape", "flatten", "unsqueeze", "squeeze", "alias", "_unsafe_view"})


@dataclass(frozen=True)
class Site:
    """A kernel in a program: at which node, under which name of a plan, what it does besides."""

    kernel: str
    place: str
    node: Node
    fusion: str = ""
    note: str = ""


def use_kernels(graph: Graph, mesh: Mesh, places: Places) -> Graph:
    """Set `kernel=` on the ops of one rank's program that have one and are among `places`.

    Element-wise neighbours that only such an op reads, or that alone read it, become its prologue
    and epilogue. Without places nothing changes. Establishes: `kernels_fit`.
    """
    if not places:
        return graph
    new = graph.copy()
    for _ in sites(new, mesh, places):
        pass
    return new


def sites(graph: Graph, mesh: Mesh, places: Places) -> Iterator[Site]:
    """Put the kernels in, in place; every one of them as it is done."""
    for node in list(graph.fx.nodes):
        if node.op != "call_function" or any(0 in v.shape for v in _values(node)):
            continue
        if node.target is DROPOUT and places.has("dropout", node.name):
            yield _dropout(graph, node)
        elif node.target is CROSS_ENTROPY and places.has("cross_entropy", node.name):
            yield _cross_entropy(graph, node)
        elif _moves_rows(node) and places.has("permute", node.name):
            node.kwargs = {**node.kwargs, "kernel": True}
            folded = combine_rows(graph, node) or spread_rows(graph, node)
            yield Site("permute", node.name, node, folded)
        elif node.target in (EXCHANGE, OPEN, CLOSE):
            yield from _exchange(node, mesh, places)


def _dropout(graph: Graph, node: Node) -> Site:
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    before = prologue_of(node, source)
    after = epilogue_of(node, 4 - len(before.extras))
    fusion = Fusion(before.fusion.prologue, after.fusion.epilogue)
    extras = (*before.extras, *after.extras)
    result = value_of(after.last)
    if after.last is not node:
        after.last.append(node)  # where its last operand is there
        after.last.replace_all_uses_with(node)
    node.args = (before.source, *node.args[1:])
    kwargs: Any = {"kernel": fusion, "extras": extras, "dtype": result.dtype}
    node.kwargs = kwargs  # of a lowered op, FX's type of arguments does not hold
    node.meta = {**node.meta, "value": result}
    _erase(graph, (*before.absorbed, *reversed(after.absorbed)))
    return Site("dropout", node.name, node, described(fusion), before.why or after.why)


def _cross_entropy(graph: Graph, node: Node) -> Site:
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    before = prologue_of(node, source)
    if before.extras:  # this kernel reads the logits alone
        before = Neighbours(PLAIN, source, (), (), node, "it reads other tensors, too")
    program, logits = before.fusion.prologue, before.source
    kwargs: Any = {"kernel": program}
    if before.absorbed:
        kwargs["dtype"] = value_of(source).dtype
    node.args = (logits, *node.args[1:])
    _erase(graph, before.absorbed)
    kept = why_kept(node, logits)
    if not kept:
        kwargs["in_place"] = True
    node.kwargs = kwargs
    note = "; ".join(
        text for text in (before.why, f"logits are kept: {kept}" if kept else "") if text
    )
    return Site("cross_entropy", node.name, node, described(program), note)


def why_kept(reader: Node, logits: Node) -> str:
    """Why the gradient may not be written over the logits, as a clause; nothing if it may."""
    node = logits
    after = reader
    while True:
        if list(node.users) != [after]:
            return "others read them"
        if mark_of(node) is not None or mark_of(reader) is not None:
            return "they are recomputed"
        if node.op != "call_function":
            return "they are an input"
        name = op_name(node.target)
        if name in _MATMULS:
            return ""
        if name not in _VIEWS:
            return f"{name}, which makes them, may save them"
        before = node.args[0]
        assert isinstance(before, torch.fx.Node)
        node, after = before, node


def _exchange(node: Node, mesh: Mesh, places: Places) -> Iterator[Site]:
    args: Any = node.args
    group = args[2]
    axis = str(group)
    if _reduces_gradients(node) and places.has("int8", axis):
        node.kwargs = {**node.kwargs, "kernel": "int8"}
        yield Site("int8", axis, node)
    elif _packs(node) and places.has("pack", axis):
        node.kwargs = {**node.kwargs, "kernel": True}
        yield Site("pack", axis, node)


def _reduces_gradients(node: Node) -> bool:
    """Whether the backward of an exchange sums gradients of parameters."""
    if node.target is CLOSE or node.args[0] not in REDUCES_GRADIENTS:
        return False
    return all(is_parameter(n) for n in node.args[3:] if isinstance(n, torch.fx.Node))


def _moves_rows(node: Node) -> bool:
    """Whether rows of floating point numbers are routed; positions are not a kernel's."""
    return node.target in (ROUTED_GATHER, ROUTED_SCATTER) and all(
        v.dtype.is_floating_point for v in _values(node)
    )


def _packs(node: Node) -> bool:
    """Whether a collective has several tensors, which travel as one."""
    tensors = node.args[3:] if node.target is not CLOSE else node.args[4:]
    op = node.args[0]
    return len(tensors) > 1 and (op.forward is not None or op.backward is not None)  # type: ignore[union-attr]


def _values(node: Node) -> tuple[Value, ...]:
    value = node.meta.get("value")
    return (value,) if isinstance(value, Value) else ()


def _erase(graph: Graph, nodes: tuple[Node, ...]) -> None:
    for node in nodes:
        graph.fx.erase_node(node)
