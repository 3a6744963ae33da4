"""Links between devices over time: collectives in flight, in order per group, sharing each level.

The collectives of one mesh axis run one after the other, in the order in which they were issued, as
those of one communicator do. Different axes whose groups cross the same level of the cluster share
its bandwidth equally while both are in flight.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Flow:
    """One collective in flight. `work_s` is what is left of it, in seconds of an idle link.

    `nbytes` is what a device sends, `size_bytes` what a bucket of so many `tensors` holds.
    `waits_for` are flows whose result it needs; it holds up its queue until they are done.
    `held_bytes` is memory that is given back when it is done, `gradient_bytes` what is there then.
    """

    name: str
    kind: str
    axis: str
    level: int
    work_s: float
    phase: str = ""
    nbytes: float = 0.0
    waits_for: tuple[Flow, ...] = ()
    held_bytes: float = 0.0
    gradient_bytes: float = 0.0
    segment: str = ""
    copy: int = 0
    size_bytes: float = 0.0
    tensors: int = 0
    started: bool = False
    start: float = 0.0
    end: float = 0.0
    done: bool = False


@dataclass(slots=True)
class Links:
    """Every queue of collectives, and the time up to which they have been followed."""

    now: float = 0.0
    queues: dict[str, deque[Flow]] = field(default_factory=dict)
    finished: list[Flow] = field(default_factory=list)
    busy_s: dict[tuple[str, str], float] = field(default_factory=dict)

    def issue(self, flow: Flow, at: float) -> None:
        """Put a collective at the end of its axis' queue; `at` is not before `now`."""
        self.advance(at)
        self.queues.setdefault(flow.axis, deque()).append(flow)

    def active(self) -> list[Flow]:
        """The collectives that are moving data now."""
        found = []
        for queue in self.queues.values():
            if queue:
                head = queue[0]
                if not head.waits_for or all(other.done for other in head.waits_for):
                    found.append(head)
        return found

    def advance(self, to: float) -> None:
        """Follow the links until `to`, in seconds."""
        while self.step(to):
            pass
        self.now = max(self.now, to)

    def step(self, limit: float) -> bool:
        """Go on to the next completion, at most to `limit`; whether there was one."""
        active = self.active()
        if not active:
            return False
        sharing: dict[int, int] = {}
        for flow in active:
            sharing[flow.level] = sharing.get(flow.level, 0) + 1
            if not flow.started:
                flow.started, flow.start = True, self.now
        first = min(active, key=lambda f: f.work_s * sharing[f.level])
        until = self.now + first.work_s * sharing[first.level]
        if until > limit:
            elapsed = limit - self.now
            for flow in active:
                flow.work_s -= elapsed / sharing[flow.level]
            self.now = limit
            return False
        elapsed = until - self.now
        for flow in active:
            flow.work_s -= elapsed / sharing[flow.level]
        first.work_s = 0.0
        self.now = until
        for flow in active:
            if flow.work_s <= 1e-15:
                self._finish(flow)
        return True

    def _finish(self, flow: Flow) -> None:
        flow.done, flow.end = True, self.now
        self.queues[flow.axis].popleft()
        self.finished.append(flow)
        key = (flow.kind, flow.axis)
        self.busy_s[key] = self.busy_s.get(key, 0.0) + flow.end - flow.start

    def wait(self, flow: Flow) -> float:
        """Follow the links until a flow is done; when that is."""
        while not flow.done:
            if not self.step(float("inf")):
                raise RuntimeError(f"{flow.name} waits for a collective that was never issued")
        return flow.end

    def shift(self, seconds: float) -> None:
        """Move everything in flight to a later time."""
        self.now += seconds
        for queue in self.queues.values():
            for flow in queue:
                flow.start += seconds

    def backlog(self) -> dict[str, float]:
        """Seconds of work that wait on every axis."""
        return {axis: sum(f.work_s for f in queue) for axis, queue in self.queues.items()}

    def grow(self, now: dict[str, float], before: dict[str, float], times: int) -> None:
        """Let what waits grow so many times more by as much as it has grown."""
        for axis, seconds in now.items():
            growth = seconds - before.get(axis, 0.0)
            if growth > 1e-12 and self.queues[axis]:
                last = self.queues[axis][-1]
                more = Flow("backlog", last.kind, axis, last.level, times * growth, last.phase)
                self.queues[axis].append(more)

    def signature(self) -> tuple[tuple[str, tuple[tuple[str | float, ...], ...]], ...]:
        """What is in flight, without names and times: equal states go on equally."""
        return tuple(
            (
                axis,
                tuple((f.kind, round(f.work_s, 13), f.held_bytes, f.gradient_bytes) for f in queue),
            )
            for axis, queue in sorted(self.queues.items())
            if queue
        )
