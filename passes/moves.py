"""Every way in which a value of a frame may be resharded, and what all of them cost on a grid.

What an edge can do depends on the options of its two ends, not on meshes or sizes: `Moves` is made
once per frame, as arrays. A *pair* is a reshard of one value, which several edges may share; a
*use* is a pair on one edge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch.fx
from numpy.typing import NDArray

from autopar.cost.cluster import Cluster
from autopar.cost.comm import reshard_time
from autopar.ir.graph import values_of
from autopar.ir.hint import MARK, may_reshard
from autopar.ir.lowered import GATHER_VARY, PVARY, Collective
from autopar.ir.mesh import Mesh
from autopar.ir.reshard import reshard_steps
from autopar.ir.sharding import Sharding

from .bucket_collectives import BUCKET_BYTES
from .edges import Edge
from .grid import Grid
from .options import Option

Node = torch.fx.Node
Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Step = tuple[Collective, str, tuple[str, ...]]
Way = tuple[Step, ...]  # collective, axis, other axes that split the value
Use = tuple[Edge, Sharding, Sharding, bool]


@dataclass(frozen=True)
class Moves:
    """The uses of a frame.

    `given[node]` lists (options, gives) of every edge that leaves a node, `wanted[node]` (options,
    wants) of every edge that enters it: which of the frame's gives and wants an option is. Of every
    use: its edge's number, give, want, pair, how often it is read, whether it gathers again.
    `pairs` numbers (producer, port, source, want); `values` the values of the pairs (`late`: a
    parameter, `grad`: its gradient returns), `steps` what their ways are made of, `first` where a
    pair's steps begin in `step_of`.
    """

    given: Mapping[Node, Sequence[Ints]]
    wanted: Mapping[Node, Sequence[Ints]]
    gives: int
    wants: int
    uses: Mapping[Use, int]
    give: Ints
    want: Ints
    pair: Ints
    times: Array
    again: Flags
    pairs: Mapping[tuple[Node, int, Sharding, Sharding], int]
    value: Ints
    values: Sequence[tuple[Node, int]]
    late: Flags
    grad: Flags
    steps: Sequence[Step]
    first: Ints
    step_of: Ints

    def within(
        self,
        kept: Mapping[Node, Ints],
        prices: MovePrices,
        micro_batches: int,
        room: Array,
        hidden_s: float,
    ) -> Flags:
        """Which uses between kept options cost no more than `room` seconds on some mesh.

        Collectives of parameters may take `hidden_s` more.
        """
        gives, wants = np.zeros(self.gives, dtype=np.bool_), np.zeros(self.wants, dtype=np.bool_)
        for node, options in kept.items():
            for which in self.given.get(node, ()):
                gives[which[options]] = True
            for which in self.wanted.get(node, ()):
                wants[which[options]] = True
        made: Flags = gives[self.give] & wants[self.want]
        some = np.flatnonzero(made)
        pair, again = self.pair[some], self.again[some]
        late = self.late[self.value[pair]]
        once = (prices.forward_s + prices.backward_s)[pair]
        once += again[:, None] * prices.gather_s[pair]
        often = self.times[some] * np.where(late & ~again, 1, micro_batches)
        allowed = room[None, :] + np.where(late, hidden_s, 0.0)[:, None]
        made[some] = np.any(often[:, None] * once <= allowed, axis=1)
        return made


@dataclass(frozen=True)
class MovePrices:
    """Seconds of every pair, [pairs, meshes]: each way, and of what a regather repeats."""

    forward_s: Array
    backward_s: Array
    gather_s: Array


def moves_of(
    times_read: Mapping[Edge, int],
    options: Mapping[Node, Sequence[Option]],
    mesh: Mesh,
) -> Moves:
    """The moves of a frame's options, that were made on `mesh`."""
    ways: dict[tuple[Sharding, Sharding], int] = {}
    way_steps: list[list[int] | None] = []
    step_at: dict[Step, int] = {}
    given: dict[Node, list[Ints]] = defaultdict(list)
    wanted: dict[Node, list[Ints]] = defaultdict(list)
    pairs: dict[tuple[Node, int, Sharding, Sharding], int] = {}
    values: dict[tuple[Node, int], int] = {}
    pair_way: list[int] = []
    pair_value: list[int] = []
    uses: dict[Use, int] = {}
    give, want_, pair, times, again = ([] for _ in range(5))  # type: ignore[var-annotated]
    gives = wants = 0
    for edge, often in times_read.items():
        hints = edge.producer.meta.get(MARK, ())
        value = values.setdefault((edge.producer, edge.port), len(values))
        gave: dict[tuple[Sharding, bool], int] = {}
        takes: dict[Sharding, int] = {}
        which = [
            gave.setdefault((o.gives[edge.port], o.regather), gives + len(gave))
            for o in options[edge.producer]
        ]
        given[edge.producer].append(np.array(which, dtype=np.int64))
        which = [
            takes.setdefault(o.wants[edge.slot], wants + len(takes)) for o in options[edge.consumer]
        ]
        wanted[edge.consumer].append(np.array(which, dtype=np.int64))
        gives, wants = gives + len(gave), wants + len(takes)
        for (source, regather), from_ in gave.items():
            for target, to in takes.items():
                if hints and not may_reshard(hints, source, target):
                    continue
                way = ways.get((source, target))
                if way is None:
                    way = ways[source, target] = len(ways)
                    found = () if source == target else _way(source, target, mesh)
                    way_steps.append(
                        None
                        if found is None
                        else [step_at.setdefault(s, len(step_at)) for s in found]
                    )
                if way_steps[way] is None:
                    continue
                key = (edge.producer, edge.port, source, target)
                number = pairs.get(key)
                if number is None:
                    number = pairs[key] = len(pairs)
                    pair_way.append(way)
                    pair_value.append(value)
                uses[edge, source, target, regather] = len(uses)
                give.append(from_)
                want_.append(to)
                pair.append(number)
                times.append(often)
                again.append(regather)
    steps = [way_steps[way] or [] for way in pair_way]
    return Moves(
        given,
        wanted,
        gives,
        wants,
        uses,
        np.array(give, dtype=np.int64),
        np.array(want_, dtype=np.int64),
        np.array(pair, dtype=np.int64),
        np.array(times, dtype=np.float64),
        np.array(again, dtype=np.bool_),
        pairs,
        np.array(pair_value, dtype=np.int64),
        list(values),
        np.array([_is_param(node) for node, _ in values], dtype=np.bool_),
        np.array([values_of(node)[port].requires_grad for node, port in values], dtype=np.bool_),
        list(step_at),
        np.concatenate(([0], np.cumsum([len(s) for s in steps]))).astype(np.int64),
        np.array([at for s in steps for at in s], dtype=np.int64),
    )


def price_moves(moves: Moves, grid: Grid, sizes: Array) -> MovePrices:
    """Seconds of all pairs on a grid: each distinct collective once, then summed along the ways.

    `sizes` are the bytes of the whole values.
    """
    # Values of one size, parameters or not, cost the same.
    kinds, kind = np.unique(np.stack([sizes, moves.late]), axis=1, return_inverse=True)
    owner = np.repeat(np.arange(len(moves.value)), np.diff(moves.first))
    code = moves.step_of * kinds.shape[1] + kind.reshape(-1)[moves.value[owner]]
    atoms, at = np.unique(code, return_inverse=True)
    forward, backward = (np.zeros((len(atoms), len(grid))) for _ in range(2))
    groups: dict[tuple[Collective, str, bool], list[int]] = defaultdict(list)
    for i, atom in enumerate(atoms):
        op, axis, _ = moves.steps[atom // kinds.shape[1]]
        groups[op, axis, bool(kinds[1, atom % kinds.shape[1]])].append(i)
    for (op, axis, late), members in groups.items():
        nbytes = np.stack(
            [
                kinds[0, atoms[i] % kinds.shape[1]]
                / grid.product(moves.steps[atoms[i] // kinds.shape[1]][2])
                for i in members
            ]
        )
        for span, some in grid.spans[axis]:
            there = np.ix_(members, some)
            forward[there], backward[there] = _collective(
                grid.cluster, op, nbytes[:, some], span, late
            )
    gathers = np.array([moves.steps[a // kinds.shape[1]][0] is GATHER_VARY for a in atoms])
    grad = moves.grad[moves.value][:, None]
    return MovePrices(
        _along(forward, at, moves.first),
        _along(backward, at, moves.first) * grad,
        _along(forward * gathers[:, None], at, moves.first) * grad,
    )


def _along(prices: Array, at: Ints, first: Ints) -> Array:
    """Sums of the prices of the steps of every pair."""
    made = np.zeros((len(first) - 1, prices.shape[1]))
    some = np.flatnonzero(np.diff(first))
    if len(some):
        made[some] = np.add.reduceat(prices[at], first[some], axis=0)
    return made


def _collective(
    cluster: Cluster, op: Collective, nbytes: Array, span: tuple[int, ...], late: bool
) -> tuple[Array, Array]:
    pair = reshard_time(cluster, op, nbytes, span)
    forward, backward = (np.broadcast_to(p, nbytes.shape) for p in pair)
    if not late or op not in (PVARY, GATHER_VARY):
        return forward, backward
    full = reshard_time(cluster, op, float(BUCKET_BYTES), span)
    share, small = nbytes / BUCKET_BYTES, nbytes < BUCKET_BYTES
    return (
        np.where(small, float(full[0]) * share, forward),
        np.where(small, float(full[1]) * share, backward),
    )


def _way(source: Sharding, want: Sharding, mesh: Mesh) -> Way | None:
    try:
        steps = reshard_steps(source, want, mesh)
    except ValueError:
        return None
    way, before = [], source
    for step in steps:
        split = before if step.op.before == "S" else step.after
        axes = sorted(a for s in split.splits for a in s.axes if a != step.axis)
        way.append((step.op, step.axis, tuple(axes)))
        before = step.after
    return tuple(way)


def _is_param(node: Node) -> bool:
    return node.op == "placeholder" and node.meta.get("role") == "param"
