"""Settle the candidates of the outer search, the best first, until no other can be the best.

What a step needs for a moment (gradients that wait for the network, say) is not in the programme: a
candidate whose simulated peak is above the limit comes back with less room and its relaxation in
it, behind those that are faster by then. Once something fits, the outer search is asked for all
that its programme can be beaten by.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from autopar.ir.graph import Graph

from .accounts import NONE
from .frame import Variant
from .propose import NEAR, WORTH, Frames, Outer, Proposal, Request
from .settle import Settled, room_after, settle

Progress = Callable[[str], None]

SETTLED = 3  # candidates that are simulated where they are close to the best
SERIAL = 2  # of those that would take least if nothing overlapped
ATTEMPTS = 4  # at leaving a candidate less room
ROUNDS = 6  # of the outer search, each for slower steps than the one before
TIGHTER = 2  # searches with less room where nothing fits
WIDER = 1.25  # how much slower a step is looked for where nothing fits
# Work that settling may take, in columns and ops: ten candidates of eighty layers, or all of a few.
WORK = 450_000
LIKELY = 0.75  # share of what others took too much that is expected of a candidate
MOST = 30  # times that a candidate is settled
PER_OP = 5  # columns that an op of the simulated step is worth


@dataclass
class Found:
    """Settled candidates within the limit, those above it, and all proposals.

    `left_s` is below what the programme says of any candidate that was not settled.
    """

    fitting: list[Settled] = field(default_factory=list)
    above: list[Settled] = field(default_factory=list)
    proposals: Sequence[Proposal] = ()
    left_s: float = math.inf

    @property
    def best(self) -> Settled | None:
        """The fastest that fits."""
        return min(self.fitting, key=lambda s: s.timeline.step_s, default=None)


def settle_best(
    frames: Frames, graph: Graph, request: Request, progress: Progress = lambda _: None
) -> Found:
    """The best plans of a request, simulated within its limit; none where nothing was found."""
    found = _Settling(frames, graph, request, request.memory_limit, progress).run()
    room = request.memory_limit
    for _ in range(TIGHTER):
        if found.fitting or not found.above:
            break
        # All take too much for a moment: look for what leaves as much to it as the best did.
        over = min(one.timeline.peak_bytes for one in found.above) - request.memory_limit
        room = max(room - max(over, 0.05 * room), 0.5 * room)
        less = replace(request, memory_limit=room)
        tight = _Settling(frames, graph, less, request.memory_limit, progress).run()
        found = Found(tight.fitting, [*found.above, *tight.above], found.proposals, found.left_s)
    return found


class _Settling:
    def __init__(
        self,
        frames: Frames,
        graph: Graph,
        request: Request,
        limit: float,
        progress: Progress,
    ) -> None:
        self.frames, self.graph, self.request = frames, graph, request
        self.limit, self.progress = limit, progress  # the limit of the simulated step
        self.outer = Outer(frames, request, SETTLED, progress)
        self.found = Found()
        self.queue: list[tuple[float, int, Proposal, float, int]] = []
        self.number = itertools.count()
        self.known: list[Proposal] = []
        self.queued: set[int] = set()
        self.waiting: dict[int, tuple[float, Proposal]] = {}  # not settled yet
        self.count = 0
        self.moment: dict[Variant, float] = {}
        self.work = 0
        self.optimism = 1.0  # the least simulated time over the programme's

    def run(self) -> Found:
        found, until_s = self.found, 0.0
        for _ in range(ROUNDS):
            found.proposals = self.outer.run(until_s)
            self._add(self.outer.solved)
            self._drain()
            best, reached = found.best, self.outer.best_s
            if self._is_enough:
                break
            if best is None:
                until_s = WIDER * reached
            else:  # with few to choose from, also what may be simulated as faster
                few = len(found.fitting) < SETTLED
                until_s = self._worth(best) if few else best.programme_s
            if not reached * (1 + WORTH) < until_s < self.request.better_than_s:
                break
        self._drain_rest()
        # What is left counts: candidates in the queue, and those that have bounds alone.
        waiting = [least for least, _ in self.waiting.values()]
        bounded = [p.bound_s for p in found.proposals if p.left]
        found.left_s = min([*waiting, *bounded], default=math.inf)
        return found

    @property
    def _is_enough(self) -> bool:
        return self.work > WORK or self.count >= MOST

    def _worth(self, best: Settled) -> float:
        """Seconds of a programme that may still be simulated as faster than the best."""
        return max(best.programme_s, best.timeline.step_s / self.optimism) * (1 - WORTH)

    def _add(self, solved: Sequence[Proposal]) -> None:
        """Queue what was solved since; of candidates that do the same on more axes, none."""
        self.known = distinct([*self.known, *(p for p in solved if p not in self.known)])
        for p in self.known:
            if id(p) not in self.queued:
                self.queued.add(id(p))
                self.waiting[id(p)] = (p.bound_s, p)
                self._push(p.bound_s, p, self.request.room, 0)

    def _push(self, time_s: float, proposal: Proposal, room: float, tries: int) -> None:
        heapq.heappush(self.queue, (time_s, next(self.number), proposal, room, tries))

    def _drain(self) -> None:
        """Settle what is queued while it can be the best."""
        # The programme takes collectives of parameters to overlap as well as they can; where they
        # cannot, what takes least without overlap may be better.
        serial = sorted(
            (entry for entry in self.queue if entry[2].relaxed),
            key=lambda entry: entry[2].relaxed.serial_s if entry[2].relaxed else 0.0,
        )
        if not self.found.fitting:
            for entry in serial[:SERIAL]:
                self.queue.remove(entry)
                heapq.heapify(self.queue)
                self._settle(*entry[2:])
        while self.queue and not self._is_enough:
            time_s, _, proposal, room, tries = self.queue[0]
            if not self._is_wanted(time_s):
                return
            heapq.heappop(self.queue)
            if tries or not self._deferred(proposal, room):
                self._settle(proposal, room, tries)

    def _drain_rest(self) -> None:
        """Where there is little to do, settle what was put off as well."""
        for time_s, _, proposal, room, tries in sorted(
            self.queue, key=lambda entry: entry[2].bound_s
        ):
            best = self.found.best
            if self._is_enough or self.work > WORK / 4:
                return
            if time_s == math.inf and (best is None or proposal.bound_s < best.programme_s):
                self.queue = [entry for entry in self.queue if entry[2] is not proposal]
                self._settle(proposal, room, tries)

    def _is_wanted(self, time_s: float) -> bool:
        best = self.found.best
        if best is None:
            return True
        if len(self.found.fitting) < SETTLED and time_s < best.timeline.step_s * NEAR:
            return True
        return time_s < self._worth(best)

    def _deferred(self, proposal: Proposal, room: float) -> bool:
        """Whether a candidate waits, as others of its variant took too much for a moment.

        It comes back where its relaxation in so much less room is.
        """
        short = LIKELY * self.moment.get(proposal.variant, 0.0)
        relaxed, relaxation = proposal.relaxed, proposal.relaxation
        if relaxed is None or relaxation is None or relaxed.memory_bytes <= room - short:
            return False
        tight = relaxation.solve(proposal.at, room - short)
        if tight is not None and tight.time_s <= relaxed.time_s * (1 + WORTH):
            return False
        self._push(math.inf if tight is None else tight.time_s, proposal, room, 1)
        return True

    def _settle(self, proposal: Proposal, room: float, tries: int) -> None:
        """Settle a candidate; queue it again with less room where it takes too much."""
        assert proposal.relaxation is not None
        request, variant = self.request, proposal.variant
        problem = self.frames.problem_at(
            self.graph, request.at(variant.micro_batches), request.cluster
        )
        self.count += 1
        self.waiting.pop(id(proposal), None)
        self.work += proposal.relaxation.columns.size + PER_OP * len(problem.blocks.representative)
        family = problem.family("auto", proposal.frame.roles)
        given = request.given_bytes
        made = settle("auto", problem, proposal.mesh, family, variant, room + given, near=proposal)
        self.progress(f"{proposal.mesh}: solved exactly")
        if made is None:
            return
        if made.programme_s:
            self.optimism = min(self.optimism, made.timeline.step_s / made.programme_s)
        if made.timeline.peak_bytes <= self.limit:
            self.found.fitting.append(made)
            return
        self.found.above.append(made)
        over = made.timeline.peak_bytes - self.limit
        self.moment[variant] = min(over, self.moment.get(variant, over))
        room = room_after(made, room + given, self.limit) - given
        if tries >= ATTEMPTS or room <= proposal.least_bytes:
            return
        again = proposal
        if proposal.relaxed is not None and proposal.relaxed.memory_bytes > room:
            relaxed = proposal.relaxation.solve(proposal.at, room)
            if relaxed is None:
                return
            again = replace(proposal, relaxed=relaxed, bound_s=relaxed.time_s)
            self.waiting[id(again)] = (again.bound_s, again)
        # Recomputation that is shared out takes less than all of it.
        time_s = again.bound_s if variant.mode == NONE else min(again.bound_s, made.programme_s)
        self._push(time_s, again, room, tries + 1)


def distinct(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Solved candidates; of those that do the same on more axes and on fewer, the latter."""
    kept: list[Proposal] = []
    for p in proposals:
        if p.relaxed is None:
            continue
        twin = next((i for i, q in enumerate(kept) if _alike(p, q)), None)
        if twin is None:
            kept.append(p)
        elif (len(p.mesh.axes), p.bound_s) < (len(kept[twin].mesh.axes), kept[twin].bound_s):
            kept[twin] = p
    return kept


def _alike(p: Proposal, q: Proposal) -> bool:
    if p.relaxed is None or q.relaxed is None or p.variant != q.variant:
        return False
    if str(p.mesh) == str(q.mesh):
        return True
    a, b = p.relaxed, q.relaxed
    return (
        abs(a.time_s - b.time_s) < 1e-3 * a.time_s
        and abs(a.memory_bytes - b.memory_bytes) < 1e-2 * a.memory_bytes
    )
