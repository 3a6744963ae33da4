"""What a stage gathers over its own links of what it receives, priced beside the ops of the stage.

Where values cross in parts (`pieces.Boundary`), the stage that makes one keeps a part of it, and
the next one gathers it; gradients go the same way back. A collective that the ops wanted anyway is
not paid twice: a sum that is wanted whole is scattered here and gathered there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch.fx

from autopar.cost.step import Part, Segment
from autopar.ir.graph import tensor_inputs, value_of
from autopar.ir.sharding import Sharding

from .columns import producer_of
from .cut_points import Unit
from .options import Option
from .pieces import Boundary
from .price import Pricer

Node = torch.fx.Node


def crossing_sharding(node: Node, option: Mapping[Node, Option], pricer: Pricer) -> Sharding:
    """That in which a value crosses from a stage to the next."""
    producer, port = producer_of(node)
    return Boundary.of(pricer.mesh).sharding(value_of(node), option[producer].gives[port])


def received_by(
    units: Sequence[Unit], option: Mapping[Node, Option], pricer: Pricer
) -> tuple[Segment | None, ...]:
    """For a cut before each unit, the collectives inside the stages that it adds, if any.

    Seconds are of one micro-batch; those of both sides of the cut count after it.
    """
    scattered = Boundary.of(pricer.mesh).scattered
    if not scattered:
        return (None,) * len(units)
    at = {node: i for i, unit in enumerate(units) for node in unit.nodes}
    level = max(axis.level for axis in scattered)
    axes = "&".join(axis.name for axis in scattered)
    found: list[Segment | None] = []
    for i, unit in enumerate(units):
        each = [_added(node, i, at, option, pricer) for node in unit.crossing]
        forward = sum(f for f, _ in each)
        backward = sum(b for _, b in each)
        if not forward and not backward:
            found.append(None)
            continue
        kind = "all_gather"
        part = Part("received", "", kind, forward, backward, kind, axes, level, deps=(-1,))
        found.append(Segment("received", (part,)))
    return tuple(found)


def _added(
    node: Node,
    cut: int,
    at: Mapping[Node, int],
    option: Mapping[Node, Option],
    pricer: Pricer,
) -> tuple[float, float]:
    """Seconds (forward, backward) that a value takes longer in parts than straight to readers."""
    producer, port = producer_of(node)
    given, crosses = option[producer].gives[port], crossing_sharding(node, option, pricer)
    if crosses.splits == given.splits:
        return 0.0, 0.0
    wants = {
        option[user].wants[slot]
        for user in node.users
        if at.get(user, -1) >= cut and user in option
        for slot, source in enumerate(tensor_inputs(user))
        if source is node
    }
    legs = [(given, crosses, 1.0)]
    legs += [(crosses, want, 1.0) for want in wants]
    legs += [(given, want, -1.0) for want in wants]
    forward = sum(
        sign * pricer.edge_forward_s(producer, port, source, want) for source, want, sign in legs
    )
    both = sum(
        sign * pricer.edge_time_s(producer, port, source, want) for source, want, sign in legs
    )
    if not math.isfinite(both):
        return 0.0, 0.0
    return max(0.0, forward), max(0.0, both - forward)
