"""Turn reshards into typed collectives, one mesh axis at a time."""

from __future__ import annotations

from typing import Any

import torch.fx

from autopar.ir.graph import Graph, value_of
from autopar.ir.lowered import COLLECTIVE, RESHARD, Collective
from autopar.ir.mesh import Mesh
from autopar.ir.reshard import reshard_steps
from autopar.ir.sharding import Sharding

Node = torch.fx.Node


def lower_collectives(graph: Graph, mesh: Mesh) -> Graph:
    """Replace every `reshard(x, sharding)` by its sequence of `collective(op, axis, x)`.

    Two reshards of one value share the steps that they begin with. Ends: reshards. Establishes:
    `types_follow`, every value's sharding follows from its op and inputs.
    """
    new = graph.copy()
    made: dict[tuple[Node, Collective, str, Sharding], Node] = {}
    for node in list(new.fx.nodes):
        if node.target is not RESHARD:
            continue
        current, target = node.args
        assert isinstance(current, torch.fx.Node) and isinstance(target, Sharding)
        value = value_of(current)
        assert value.sharding is not None
        for step in reshard_steps(value.sharding, target, mesh):
            key = (current, step.op, step.axis, step.after)
            if key not in made:
                arguments: Any = (step.op, step.axis, current)
                with new.fx.inserting_before(node):
                    call = new.fx.call_function(COLLECTIVE, arguments)
                call.meta = {**node.meta, "value": value.with_sharding(step.after)}
                made[key] = call
            current = made[key]
        node.replace_all_uses_with(current)
        new.fx.erase_node(node)
    return new
