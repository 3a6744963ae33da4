"""Send the gradients, and the gathered shards, of many parameters in one message."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch.fx

from autopar.ir.graph import Graph, value_of
from autopar.ir.lowered import BUCKET, COLLECTIVE, GATHER_VARY, PVARY, Collective
from autopar.ir.mesh import Mesh
from autopar.ir.recomputed import mark_of

from .cast_before_gather import is_plain_cast
from .mark_blocks import block_of

Node = torch.fx.Node

BUCKET_BYTES = 25 * 2**20  # what DistributedDataParallel uses, too


def bucket_collectives(graph: Graph, mesh: Mesh, limit_bytes: int = BUCKET_BYTES) -> Graph:
    """Merge the collectives that parameters go through before their first use into buckets.

    Parameters, cast to a lower precision or not, share a bucket if they make the same step
    (collective, axis, dtype) at the same depth from the parameter, and are alike in being gathered
    again in the backward (`meta["regather"]`) and, if they are, in the block that reads them first
    and the region that is recomputed with them there: what is dropped after use must not wait for
    the use of another block.
    A bucket holds about `limit_bytes` of local data, in the order of first use, so that its
    gradients are complete together.
    """
    new = graph.copy()
    order = {node: i for i, node in enumerate(new.fx.nodes)}
    groups: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
    depth: dict[Node, int] = dict.fromkeys(new.placeholders("param"), 0)
    depth |= dict.fromkeys((node for node in new.calls() if is_plain_cast(node)), 0)
    dropped = {node for node in depth if node.meta.get("regather")}
    for node in new.fx.nodes:
        if node.target is COLLECTIVE and node.args[2] in depth:
            op, axis, source = node.args
            depth[node] = depth[source] + 1
            dropped.update({node} if source in dropped else ())
            if op in (PVARY, GATHER_VARY) and value_of(node).requires_grad:
                together = (True, _region(node), block_of(node)[0]) if source in dropped else ()
                key = (depth[node], op, axis, value_of(node).dtype, *together)
                groups[key].append(node)

    def first_use(node: Node) -> int:
        users = [order[u] if u not in depth else first_use(u) for u in node.users]
        return min(users, default=len(order))

    for (_, op, axis, *_), nodes in sorted(groups.items(), key=lambda g: g[0][0]):
        for bucket in _packed(sorted(nodes, key=first_use), mesh, limit_bytes):
            if len(bucket) > 1:
                _merge(new, op, axis, bucket)
    return _sorted(new)


def _region(node: Node) -> str:
    """The recomputed region that reads a gathered parameter first, or nothing."""
    marks = [mark_of(reader) for reader in node.users]
    return marks[0].region if marks and marks[0] is not None else ""


def _packed(nodes: list[Node], mesh: Mesh, limit_bytes: int) -> list[list[Node]]:
    buckets: list[list[Node]] = [[]]
    size = 0.0
    for node in nodes:
        value = value_of(node)
        assert value.sharding is not None
        parts = value.sharding.parts(mesh)
        local = int(value.numel()) * value.dtype.itemsize / parts
        if buckets[-1] and size + local > limit_bytes:
            buckets.append([])
            size = 0.0
        buckets[-1].append(node)
        size += local
    return buckets


def _merge(graph: Graph, op: Collective, axis: str, nodes: list[Node]) -> None:
    with graph.fx.inserting_before(nodes[-1]):
        arguments: Any = (op, axis, [node.args[2] for node in nodes])
        bucket = graph.fx.call_function(BUCKET, arguments)
        bucket.meta = {"value": tuple(value_of(node) for node in nodes), "source": ""}
        for i, node in enumerate(nodes):
            item = graph.fx.call_function(operator.getitem, (bucket, i))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
    for node in nodes:
        graph.fx.erase_node(node)


def _sorted(graph: Graph) -> Graph:
    """Bring the nodes into an order where definitions precede uses, as late as they are needed."""
    out = torch.fx.Graph()
    env: dict[Node, Node] = {}

    def emit(node: Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [n for n in top.all_input_nodes if n not in env]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                stack.pop()
                if top not in env:
                    env[top] = out.node_copy(top, lambda n: env[n])
                    env[top].meta = dict(top.meta)

    lazy = {n for n in graph.fx.nodes if n.target in (BUCKET, COLLECTIVE)}
    lazy |= {n for n in graph.fx.nodes if n.target is operator.getitem and n.args[0] in lazy}
    for node in graph.fx.nodes:
        if node not in lazy:
            emit(node)
    return Graph(out, graph.outputs, graph.mutated)
