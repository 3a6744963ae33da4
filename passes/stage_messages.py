"""Memory of what the stages of a pipeline send each other, and of what their ranks exchange.

Beside what the ops of a piece keep, a rank holds what it was sent and what it sends until the
backward of that micro-batch, for a moment the gradients that arrive and leave, and what peers of
its own stage have yet to read (`cost.staging`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray

from autopar.cost.recompute import NONE
from autopar.cost.schedules import Schedule
from autopar.cost.staging import staged_bytes
from autopar.cost.step import Segment
from autopar.ir.graph import tensor_inputs, value_of
from autopar.ir.sharding import Sharding

from .blocks import Blocks
from .bucket_collectives import BUCKET_BYTES
from .columns import producer_of
from .cut_points import Unit
from .kept import own_outputs
from .options import Option
from .price import Pricer

Node = torch.fx.Node
Array = NDArray[np.float64]

# What `runtime.pipeline_stage` holds on schedules that send beside compute: messages of gradients
# that leave, and of either kind that arrive before they are wanted.
SENT_GRADIENTS = 3
ARRIVED_EARLY = 1


@dataclass(frozen=True)
class Crosser:
    """A value that crosses a cut: bytes on one device, the units that make it and keep it.

    `kept_by` is the unit among whose activations it is counted, -1 where it is in none.
    `part_bytes` are those of the part that crosses where that is not all a device has; the part is
    held beside the value.
    """

    nbytes: float
    has_gradient: bool
    dtype: torch.dtype
    made_by: int
    kept_by: int
    part_bytes: float = 0.0

    @property
    def sent_bytes(self) -> float:
        """Of a message."""
        return self.part_bytes or self.nbytes


@dataclass(frozen=True)
class Messages:
    """What crosses the cut before every unit of a chain; nothing does before the first."""

    cuts: tuple[tuple[Crosser, ...], ...]

    def kept(self, schedule: Schedule, segments: Sequence[Segment]) -> Array:
        """[start, end] -> bytes of a micro-batch from its forward until its backward.

        Without what the ops of the piece keep themselves.
        """
        n = len(self.cuts)
        found = np.zeros((n + 1, n + 1))
        starts = np.arange(n + 1)
        plain = [segment.recompute == NONE for segment in segments]
        for cut, crossers in enumerate(self.cuts):
            for c in crossers:
                counted = c.kept_by if c.kept_by >= 0 and plain[c.kept_by] else None
                inside = starts > n  # nowhere
                if counted is not None:
                    inside = (starts <= counted) & (counted < cut)
                sent = (starts <= c.made_by) & ~inside
                found[:cut, cut] += c.nbytes * sent[:cut] + c.part_bytes
                ends = starts
                inside = (cut <= counted) & (counted < ends) if counted is not None else ends < 0
                if not plain[cut]:  # what enters a unit that runs again is kept with it
                    inside = inside | (ends > cut)
                found[cut, cut + 1 :] += c.nbytes * ~inside[cut + 1 :] + c.part_bytes
        if schedule.kind != "1f1b":
            packed = np.array([*map(packed_bytes, self.cuts), 0.0])
            found += np.triu(np.broadcast_to(packed[None, :], found.shape), 1)
        return found

    def moment(self, schedule: Schedule) -> Array:
        """[start, end] -> bytes of messages that are there for a moment, of one micro-batch."""
        arrives = np.array([*(sum(c.sent_bytes for c in cut) for cut in self.cuts), 0.0])
        gradients = np.array(
            [*(sum(c.sent_bytes for c in cut if c.has_gradient) for cut in self.cuts), 0.0]
        )
        early, leaving = (ARRIVED_EARLY, SENT_GRADIENTS) if _beside(schedule) else (0, 1)
        by_end = (1 + early) * gradients
        if schedule.kind == "1f1b":
            by_end = by_end + np.array([*map(packed_bytes, self.cuts), 0.0])
        by_start = early * arrives + leaving * gradients
        return np.triu(by_start[:, None] + by_end[None, :], 1)


def _beside(schedule: Schedule) -> bool:
    """Whether sends go on beside compute, waited for later."""
    return schedule.chunks > 1 or schedule.kind == "zero_bubble"


def packed_bytes(crossers: Sequence[Crosser]) -> float:
    """Bytes of messages that are copies: those of several values of one dtype."""
    several = Counter(c.dtype for c in crossers)
    return sum(c.sent_bytes for c in crossers if several[c.dtype] > 1)


def messages_of(
    units: Sequence[Unit],
    blocks: Blocks,
    option: Mapping[Node, Option],
    pricer: Pricer,
    sent_bytes: Mapping[Node, float],
) -> Messages:
    """The messages of a chain; `sent_bytes` are what one device sends of every crossing value."""
    at = {node: i for i, unit in enumerate(units) for node in unit.nodes}
    known: dict[Node, Crosser] = {}
    for unit in units:
        for node in unit.crossing:
            if node not in known:
                value = value_of(node)
                producer, port = producer_of(node)
                given = option[producer].gives[port]
                whole = pricer.local_bytes(value, Sharding(given.splits))
                known[node] = Crosser(
                    whole,
                    value.requires_grad,
                    value.dtype,
                    at[producer if producer in at else node],
                    _kept_by(node, at, blocks, option, pricer),
                    sent_bytes[node] if sent_bytes[node] < whole else 0.0,
                )
    return Messages(tuple(tuple(known[n] for n in unit.crossing) for unit in units))


def _kept_by(
    node: Node,
    at: Mapping[Node, int],
    blocks: Blocks,
    option: Mapping[Node, Option],
    pricer: Pricer,
) -> int:
    """The first unit whose ops keep a value as it is made: its producer, or who reads it first."""
    producer, port = producer_of(node)
    given = option[producer].gives[port]
    if port in own_outputs(producer):
        return at[producer]
    for user in sorted((u for u in node.users if u in at), key=lambda u: at[u]):
        for slot, source in enumerate(tensor_inputs(user)):
            same = source is node and option[user].wants[slot] == given
            if same and pricer.saves_input(blocks.representative[user], slot):
                return at[user]
    return -1


@dataclass(frozen=True)
class Staging:
    """What a rank leaves for the peers of its own stage; `sizes` are those of the stage's axes.

    Empty sizes: ranks do not share memory.
    """

    sizes: Mapping[str, int]

    def of(self, segments: Sequence[Segment]) -> float:
        """Bytes of a piece."""
        return staged_bytes(segments, self.sizes, BUCKET_BYTES)

    def spans(self, segments: Sequence[Segment]) -> Array:
        """[start, end] -> bytes of a piece.

        What waits at once adds up, of what waits one by one the largest counts.
        """
        known: dict[int, tuple[float, float]] = {}
        for segment in segments:
            if id(segment) not in known:
                once = tuple(p for p in segment.parts if p.param and p.once)
                rest = tuple(p for p in segment.parts if not (p.param and p.once))
                known[id(segment)] = (
                    self.of([replace(segment, parts=once)]),
                    self.of([replace(segment, parts=rest)]),
                )
        each = np.array([known[id(s)] for s in segments])
        total = np.concatenate([[0.0], np.cumsum(each[:, 0])])
        found: Array = np.triu(total[None, :] - total[:, None])
        for start in range(len(segments)):
            found[start, start + 1 :] += np.maximum.accumulate(each[start:, 1])
        return found


def staging_of(pricer: Pricer, stage_axes: Sequence[str]) -> Staging:
    """The staging on the axes of a stage; of ranks that are processes of one host."""
    if pricer.cluster.single is None:
        return Staging({})
    return Staging({name: pricer.mesh[name].size for name in stage_axes})
