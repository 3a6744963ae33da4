"""The priced chain of a model on the mesh of one stage, and the step of any piece of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch.fx
from numpy.typing import NDArray

from autopar.cost.recompute import FULL, NONE, SELECTIVE, kept_bytes
from autopar.cost.simulate import passes_of
from autopar.cost.simulator import How
from autopar.cost.stages import segment_s
from autopar.cost.step import Segment, Step
from autopar.ir.graph import Graph, value_of
from autopar.plan import PIPELINE_AXIS

from .blocks import Blocks
from .chunks import Chunk
from .cut_points import Unit
from .options import Option
from .price import Pricer
from .received import Received, crossing_sharding, received_by
from .stage_messages import Messages, Staging, messages_of, staging_of
from .step_of import alike, segments_of
from .stored import stored_state

Node = torch.fx.Node
Array = NDArray[np.float64]
Shares = Mapping[int, tuple[int, int]]  # block -> copies in full, copies selectively


@dataclass(frozen=True)
class Stored:
    """A parameter: what its owner stores by name, bytes, and the units that read it in order."""

    node: Node
    state: Mapping[str, float]
    optimizer_s: float
    units: tuple[int, ...]

    @property
    def guest_bytes(self) -> dict[str, float]:
        """What a piece holds that uses the parameter of another: its value and its gradient."""
        return {name: n for name, n in self.state.items() if name != "optimizer state"}


@dataclass(frozen=True)
class Chain:
    """The units of a model with their prices for one micro-batch on one device of a stage.

    `segments[i]` is unit `i`; units that do the same share one. `crossing_bytes[i]` is what one
    device sends over the cut before unit `i`, `received` what stages exchange inside for it;
    `messages` are the same as memory, `staging` is the memory of collectives.
    """

    units: tuple[Unit, ...]
    segments: tuple[Segment, ...]
    crossing_bytes: tuple[float, ...]
    received: Received
    stored: tuple[Stored, ...]
    micro_batches: int
    messages: Messages
    staging: Staging
    given_bytes: float = 0.0

    def __len__(self) -> int:
        return len(self.units)

    def recomputed(self, shares: Shares) -> Chain:
        """The chain with the first copies of each block recomputed in full, the next selectively.

        Blocks are numbered as units' `region`.
        """
        made: dict[tuple[int, str], Segment] = {}
        found = []
        for unit, segment in zip(self.units, self.segments, strict=True):
            full, selective = shares.get(unit.region, (0, 0))
            mode = FULL if unit.copy < full else SELECTIVE if unit.copy < full + selective else NONE
            if unit.region < 0:
                mode = NONE
            key = (id(segment), mode)
            if key not in made:
                made[key] = segment if mode == segment.recompute else _in_mode(segment, mode)
            found.append(made[key])
        return replace(self, segments=tuple(found))

    def piece(self, start: int, end: int) -> Step:
        """The step of the units from `start` up to `end`."""
        first = self.received.segment(start, end)
        segments: list[Segment] = [] if first is None else [first]
        last: Segment | None = None
        for segment in self.segments[start:end]:
            if segment is last and segment.block:
                segments[-1] = replace(segments[-1], copies=segments[-1].copies + 1)
            else:
                segments.append(segment)
            last = segment
        state = dict.fromkeys(("parameters", "gradients", "optimizer state"), 0.0)
        optimizer_s = 0.0
        for stored in self.stored:
            if any(start <= unit < end for unit in stored.units):
                owned = start <= stored.units[0] < end
                for name, nbytes in (stored.state if owned else stored.guest_bytes).items():
                    state[name] += nbytes
                optimizer_s += stored.optimizer_s if owned else 0.0
        return Step(tuple(segments), optimizer_s, state, self.micro_batches)

    def users(self, bounds: Sequence[int], stages: int) -> dict[Node, tuple[int, ...]]:
        """The stages that use each parameter, its owner first; `bounds` are where pieces begin."""
        piece_of = np.searchsorted(np.array(bounds), np.arange(len(self)), side="right") - 1
        return {
            stored.node: tuple(dict.fromkeys(int(piece_of[unit]) % stages for unit in stored.units))
            for stored in self.stored
        }

    # -- sums over pieces: [start, end] arrays ------------------------------------------------

    @cached_property
    def seconds(self) -> Array:
        """Forward and backward of one micro-batch, without collectives of parameters."""
        return _spans([segment_s(s) for s in self.segments]) + self.received.seconds

    @cached_property
    def kept(self) -> Array:
        """Bytes from the forward of a micro-batch until its backward."""
        return _spans([s.copies * kept_bytes(s) for s in self.segments])

    @cached_property
    def optimizer_s(self) -> Array:
        """Seconds of the update, where a piece owns its parameters."""
        seconds = np.zeros(len(self))
        for stored in self.stored:
            seconds[stored.units[0]] += stored.optimizer_s
        return _spans(seconds)

    @cached_property
    def state(self) -> Array:
        """Bytes that are always there: of owned parameters all, of those of others two copies.

        And copies of parameters that stay gathered.
        """
        each = np.zeros(len(self))
        twice = np.zeros((len(self) + 1, len(self) + 1))
        starts, ends = np.arange(len(self) + 1)[:, None], np.arange(len(self) + 1)[None, :]
        for stored in self.stored:
            guest = sum(stored.guest_bytes.values())
            each[stored.units[0]] += sum(stored.state.values())
            for before, unit in zip(stored.units, stored.units[1:], strict=False):
                each[unit] += guest
                twice += guest * ((starts <= before) & (unit < ends))
        for i, segment in enumerate(self.segments):
            each[i] += sum(p.saved_bytes for p in segment.parts if p.param)
        return _spans(each) - twice

    def working(self, how: How) -> Array:
        """Bytes that a single micro-batch needs for a moment beyond what it keeps."""
        known: dict[int, float] = {}
        for segment in self.segments:
            if id(segment) not in known:
                alone = Step((replace(segment, copies=1),), 0.0, {}, self.micro_batches)
                known[id(segment)] = passes_of(alone, how).working_bytes
        each = np.array([known[id(s)] for s in self.segments])
        n = len(self)
        found = np.zeros((n + 1, n + 1))
        for start in range(n):
            found[start, start + 1 :] = np.maximum.accumulate(each[start:])
        return found


def chain_of(
    graph: Graph,
    blocks: Blocks,
    units: Sequence[Unit],
    option: Mapping[Node, Option],
    pricer: Pricer,
    micro_batches: int,
    given_bytes: float = 0.0,
) -> Chain:
    """The chain of an assignment; `graph` has the sizes of one micro-batch.

    `given_bytes` are those of inputs and buffers, which all devices of all stages have.
    """
    chunks = [Chunk(unit.region, unit.nodes) for unit in units]
    segments: list[Segment] = []
    known: dict[tuple[object, ...], list[Segment]] = {}
    made = segments_of(chunks, blocks, option, pricer)
    made[-1] = _results_once(made[-1], micro_batches)
    for segment in made:
        key = (segment.block, len(segment.parts), segment.input_bytes)
        same = next((s for s in known.get(key, ()) if alike(s, segment)), None)
        if same is None:
            known.setdefault(key, []).append(segment)
        segments.append(same or segment)
    at = {node: i for i, unit in enumerate(units) for node in unit.nodes}
    crossing = {node for unit in units for node in unit.crossing}
    each = {
        node: pricer.local_bytes(value_of(node), crossing_sharding(node, option, pricer))
        for node in crossing
    }
    sent = [sum(each[node] for node in unit.crossing) for unit in units]
    stored = []
    for node in graph.placeholders("param"):
        if node in option:
            read = tuple(sorted({at[user] for user in node.users if user in at})) or (0,)
            state = stored_state([node], option, pricer)
            stored.append(Stored(node, state, option[node].time_s, read))
    axes = [name for name in pricer.mesh.names if name != PIPELINE_AXIS]
    return Chain(
        tuple(units),
        tuple(segments),
        tuple(sent),
        received_by(units, option, pricer),
        tuple(stored),
        micro_batches,
        messages_of(units, blocks, option, pricer, each),
        staging_of(pricer, axes),
        given_bytes,
    )


def _results_once(segment: Segment, micro_batches: int) -> Segment:
    """The last segment, whose results (a loss, usually) are reduced once per step, at its end."""
    parts, at = list(segment.parts), len(segment.parts)
    while at and not parts[at - 1].is_compute and not parts[at - 1].param:
        at -= 1
        part = parts[at]
        parts[at] = replace(
            part,
            forward_s=part.forward_s / micro_batches,
            backward_s=part.backward_s / micro_batches,
            sent_bytes=part.sent_bytes / micro_batches,
            backward_sent_bytes=part.backward_sent_bytes / micro_batches,
        )
    return replace(segment, parts=tuple(parts))


def _in_mode(segment: Segment, mode: str) -> Segment:
    return replace(segment, recompute=mode)


def _spans(each: Sequence[float] | Array) -> Array:
    """[start, end] -> the sum from start up to end; zero where there is nothing between."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(each, dtype=np.float64))])
    return np.triu(total[None, :] - total[:, None])
