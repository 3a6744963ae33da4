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
from autopar.ir.hint import MARK, may_reshard
from autopar.ir.lowered import GATHER_VARY, PVARY, Collective
from autopar.ir.mesh import Mesh
from autopar.ir.reshard import reshard_steps
from autopar.ir.sharding import Sharding

from .bucket_collectives import BUCKET_BYTES
from .edges import Edge
from .grid import Grid
from .narrow_gathers import travelling_value
from .options import Option

Node = torch.fx.Node
Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Step = tuple[Collective, str, tuple[str, ...]]
Way = tuple[Step, ...]  # collective, axis, other axes that split the value
Ways = dict[tuple[Sharding, Sharding], Way | None]


@dataclass(frozen=True)
class EdgeMoves:
    """The uses of one edge: `number[give, want]`, -1 where there is none.

    Gives are by (identity of the sharding, regather), wants by the identity of theirs.
    """

    number: Ints
    gives: Mapping[tuple[int, bool], int]
    wants: Mapping[int, int]

    def use(self, source: Sharding, want: Sharding, regather: bool) -> int:
        return int(self.number[self.gives[id(source), regather], self.wants[id(want)]])


@dataclass(frozen=True)
class Moves:
    """The uses of a frame, whose equal shardings are one object.

    `given[node]` lists (options, gives) of every edge that leaves a node, `wanted[node]` (options,
    wants) of every edge that enters it: which of the frame's gives and wants an option is. Of every
    use: its give, want, pair, how often it is read, whether it gathers again. `values` are those of
    the pairs (`late`: a parameter, `grad`: its gradient returns). `codes` are the pairs' values and
    ways as one number, in order; `way` numbers the ways by their shardings' identities. A pair's
    steps are a row of `step_of`, filled up with the number after the last of `steps`.
    """

    edges: Mapping[Edge, EdgeMoves]
    given: Mapping[Node, Sequence[Ints]]
    wanted: Mapping[Node, Sequence[Ints]]
    gives: int
    wants: int
    give: Ints
    want: Ints
    pair: Ints
    times: Array
    again: Flags
    codes: Ints
    way: Mapping[tuple[int, int], int]
    value: Ints
    values: Mapping[tuple[Node, int], int]
    late: Flags
    grad: Flags
    steps: Sequence[Step]
    step_of: Ints

    def pair_of(self, node: Node, port: int, source: Sharding, want: Sharding) -> int:
        """The number of a pair that some edge uses."""
        code = self.values[node, port] * len(self.way) + self.way[id(source), id(want)]
        return int(np.searchsorted(self.codes, code))

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


class _Ways:
    """Numbers of (source, want), and the numbers of their steps; None where there is no way."""

    def __init__(self, known: Ways, mesh: Mesh) -> None:
        self.known, self.mesh = known, mesh
        self.number: dict[tuple[int, int], int] = {}
        self.steps: list[list[int] | None] = []
        self.step_at: dict[Step, int] = {}

    def get(self, source: Sharding, want: Sharding) -> int:
        key = (id(source), id(want))
        found = self.number.get(key)
        if found is None:
            found = self.number[key] = len(self.steps)
            self.steps.append(self._steps(source, want))
        return found

    def _steps(self, source: Sharding, want: Sharding) -> list[int] | None:
        if source is want:
            return []
        if (source, want) not in self.known:
            self.known[source, want] = _way(source, want, self.mesh)
        way = self.known[source, want]
        if way is None:
            return None
        return [self.step_at.setdefault(step, len(self.step_at)) for step in way]


def moves_of(
    times_read: Mapping[Edge, int],
    options: Mapping[Node, Sequence[Option]],
    mesh: Mesh,
    known: Ways,
) -> Moves:
    """The moves of a frame's options, that were made on `mesh`; `known` are ways on such a mesh."""
    ways = _Ways(known, mesh)
    edges: dict[Edge, EdgeMoves] = {}
    given: dict[Node, list[Ints]] = defaultdict(list)
    wanted: dict[Node, list[Ints]] = defaultdict(list)
    values: dict[tuple[Node, int], int] = {}
    parts: list[Ints] = []
    gives = wants = uses = 0
    for edge, often in times_read.items():
        hints = edge.producer.meta.get(MARK, ())
        value = values.setdefault((edge.producer, edge.port), len(values))
        gave: dict[tuple[int, bool], int] = {}
        takes: dict[int, int] = {}
        sources: list[Sharding] = []
        targets: list[Sharding] = []
        from_, to = [], []
        for o in options[edge.producer]:
            source = o.gives[edge.port]
            at = gave.setdefault((id(source), o.regather), len(gave))
            if at == len(sources):
                sources.append(source)
            from_.append(at)
        for o in options[edge.consumer]:
            target = o.wants[edge.slot]
            at = takes.setdefault(id(target), len(takes))
            if at == len(targets):
                targets.append(target)
            to.append(at)
        number = np.array([[ways.get(s, t) for t in targets] for s in sources], dtype=np.int64)
        ok = np.array([[ways.steps[w] is not None for w in row] for row in number.tolist()])
        if hints:
            ok &= np.array([[may_reshard(hints, s, t) for t in targets] for s in sources])
        g, w = np.nonzero(ok)
        regather = np.array([again for _, again in gave], dtype=np.int64)
        parts.append(
            np.stack(
                [
                    g + gives,
                    w + wants,
                    np.full(len(g), value),
                    number[g, w],
                    np.full(len(g), often),
                    regather[g],
                ]
            )
        )
        place = np.full(ok.shape, -1, dtype=np.int64)
        place[g, w] = np.arange(uses, uses + len(g))
        edges[edge] = EdgeMoves(place, gave, takes)
        given[edge.producer].append(np.array(from_, dtype=np.int64) + gives)
        wanted[edge.consumer].append(np.array(to, dtype=np.int64) + wants)
        gives, wants, uses = gives + len(sources), wants + len(targets), uses + len(g)
    give, want, of, way, times, again = np.concatenate(parts, axis=1)
    codes, pair = np.unique(of * len(ways.number) + way, return_inverse=True)
    none = len(ways.step_at)
    longest = max((len(s) for s in ways.steps if s), default=0)
    step_of = np.full((len(ways.steps), longest), none, dtype=np.int64)
    for row, steps in zip(step_of, ways.steps, strict=True):
        row[: len(steps or ())] = steps or ()
    return Moves(
        edges,
        given,
        wanted,
        gives,
        wants,
        give,
        want,
        pair.reshape(-1),
        times.astype(np.float64),
        again.astype(np.bool_),
        codes,
        ways.number,
        codes // len(ways.number),
        values,
        np.array([_is_param(node) for node, _ in values], dtype=np.bool_),
        np.array(
            [travelling_value(node, port).requires_grad for node, port in values], dtype=np.bool_
        ),
        list(ways.step_at),
        step_of[codes % len(ways.number)],
    )


def price_moves(moves: Moves, grid: Grid, sizes: Array) -> MovePrices:
    """Seconds of all pairs on a grid: each distinct collective once, then summed along the ways.

    `sizes` are the bytes of the whole values.
    """
    # Values of one size, parameters or not, cost the same.
    kinds, kind = np.unique(np.stack([sizes, moves.late]), axis=1, return_inverse=True)
    n = kinds.shape[1]
    code = moves.step_of * n + kind.reshape(-1)[moves.value][:, None]
    code[moves.step_of == len(moves.steps)] = -1  # no step
    atoms, at = _distinct(code)
    forward, backward = (np.zeros((len(atoms), len(grid))) for _ in range(2))
    groups: dict[tuple[Collective, str, bool], list[int]] = defaultdict(list)
    gathers = np.zeros((len(atoms), 1))
    for i, atom in enumerate(atoms.tolist()):
        if atom >= 0:
            op, axis, _ = moves.steps[atom // n]
            groups[op, axis, bool(kinds[1, atom % n])].append(i)
            gathers[i] = op is GATHER_VARY
    for (op, axis, late), members in groups.items():
        nbytes = np.stack(
            [kinds[0, a % n] / grid.product(moves.steps[a // n][2]) for a in atoms[members]]
        )
        for span, some in grid.spans[axis]:
            there = np.ix_(np.array(members), some)
            forward[there], backward[there] = _collective(
                grid.cluster, op, nbytes[:, some], span, late
            )
    grad = moves.grad[moves.value][:, None]
    return MovePrices(
        _along(forward, at), _along(backward, at) * grad, _along(forward * gathers, at) * grad
    )


def _distinct(code: Ints) -> tuple[Ints, Ints]:
    """The different numbers, in order, and the place of each; of numbers from -1 on, not too large.

    As `np.unique`, without sorting millions of them.
    """
    found = np.zeros(code.max(initial=-1) + 2, dtype=np.bool_)
    found[code + 1] = True
    place = np.cumsum(found) - 1
    return np.flatnonzero(found) - 1, place[code + 1]


def _along(prices: Array, at: Ints) -> Array:
    """Sums of the prices of the steps of every pair."""
    made = np.zeros((len(at), prices.shape[1]))
    for column in at.T:
        made += prices[column]
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
