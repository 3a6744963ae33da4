"""What stages exchange over their own links of the values between them, beside what their ops do.

Where values cross in parts (`pieces.Boundary`), the stage that makes one keeps a part of it, and
the stages that read it gather it; gradients go the same way back. A stage that a value only passes
through sends the part on. A collective that the ops of a stage want anyway is not paid twice: a sum
that is wanted whole is scattered where it is made and gathered where it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch.fx
from numpy.typing import NDArray

from autopar.cost.step import Part, Segment
from autopar.errors import PassError
from autopar.ir.graph import tensor_inputs, value_of
from autopar.ir.sharding import Sharding

from .columns import producer_of
from .cut_points import Unit
from .options import Option
from .pieces import Boundary
from .price import Pricer

Node = torch.fx.Node
Array = NDArray[np.float64]


def crossing_sharding(node: Node, option: Mapping[Node, Option], pricer: Pricer) -> Sharding:
    """That in which a value crosses from a stage to the next."""
    producer, port = producer_of(node)
    return Boundary.of(pricer.mesh).sharding(value_of(node), option[producer].gives[port])


@dataclass(frozen=True)
class Received:
    """[start, end] of a piece -> seconds per micro-batch that it exchanges inside its stage.

    `sent_bytes` is what one device sends for that, there and back; `axis` and `level` are those of
    the slowest links. None of all that where nothing crosses in parts.
    """

    forward_s: Array
    backward_s: Array
    sent_bytes: Array
    axis: str = ""
    level: int = 0

    @property
    def seconds(self) -> Array:
        """Of both directions."""
        found: Array = self.forward_s + self.backward_s
        return found

    def segment(self, start: int, end: int) -> Segment | None:
        """The same as a segment in front of the piece's own."""
        forward, backward = float(self.forward_s[start, end]), float(self.backward_s[start, end])
        if not forward and not backward:
            return None
        sent = float(self.sent_bytes[start, end]) / 2
        kind = "all_gather"
        part = Part(
            *("received", "", kind, forward, backward, kind, self.axis, self.level, sent, sent),
            deps=(-1,),
        )
        return Segment("received", (part,))


def received_by(units: Sequence[Unit], option: Mapping[Node, Option], pricer: Pricer) -> Received:
    """What every piece of a chain exchanges."""
    n = len(units)
    found = Received(*np.zeros((3, n + 1, n + 1)))
    scattered = Boundary.of(pricer.mesh).scattered
    if not scattered:
        return found
    at = {node: i for i, unit in enumerate(units) for node in unit.nodes}
    for node in dict.fromkeys(node for unit in units for node in unit.crossing):
        _add(found, node, at, option, pricer)
    for array in (found.forward_s, found.backward_s, found.sent_bytes):
        np.maximum(array, 0.0, out=array)
    slowest = max(scattered, key=lambda axis: axis.level)
    return Received(
        found.forward_s, found.backward_s, found.sent_bytes, slowest.name, slowest.level
    )


def _add(
    found: Received,
    node: Node,
    at: Mapping[Node, int],
    option: Mapping[Node, Option],
    pricer: Pricer,
) -> None:
    producer, port = producer_of(node)
    given, crosses = option[producer].gives[port], crossing_sharding(node, option, pricer)
    if crosses.splits == given.splits:
        return
    ends = np.arange(len(found.forward_s))
    starts, made = ends[:, None], at[producer if producer in at else node]
    readers = _readers(node, at, option)
    if not readers:
        return
    last = max(max(where) for where in readers.values())
    sends = (starts <= made) & (made < ends) & (ends <= last)
    charge = partial(_charge, found, pricer, producer, port)
    charge(sends, given, crosses)
    for want, where in readers.items():
        inside = [(starts <= unit) & (unit < ends) for unit in where]
        reads = (starts > made) & np.logical_or.reduce(inside)
        charge(reads, crosses, want)
        # What the ops of the chain pay, all of them once, where the first one reads.
        charge((starts > made) & inside[0], given, want, -1.0)


def _readers(
    node: Node, at: Mapping[Node, int], option: Mapping[Node, Option]
) -> dict[Sharding, list[int]]:
    """The units that read a value, in order, by what they want of it."""
    found: dict[Sharding, list[int]] = {}
    for user in sorted((u for u in node.users if u in at and u in option), key=lambda u: at[u]):
        for slot, source in enumerate(tensor_inputs(user)):
            if source is node:
                found.setdefault(option[user].wants[slot], []).append(at[user])
    return found


def _charge(
    found: Received,
    pricer: Pricer,
    producer: Node,
    port: int,
    where: NDArray[np.bool_],
    source: Sharding,
    want: Sharding,
    sign: float = 1.0,
) -> None:
    forward = pricer.edge_forward_s(producer, port, source, want)
    both = pricer.edge_time_s(producer, port, source, want)
    if not np.isfinite(both):
        raise PassError("received_by", "reshardable", f"no way from {source} to {want}")
    nbytes = sum(pricer.edge_bytes(producer, port, source, want).values())
    found.forward_s[where] += sign * forward
    found.backward_s[where] += sign * (both - forward)
    found.sent_bytes[where] += sign * nbytes
