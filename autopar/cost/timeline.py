"""What a simulated step was: times by cause, memory over time, and what every stream did when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # [n, 2]: seconds, bytes


@dataclass(frozen=True)
class Span:
    """Something that a stream did: `compute`, or a collective on the stream of a mesh axis.

    Times in seconds from the start of the step; `phase` is forward, recompute, backward, optimizer
    or wait (the compute stream waits for a collective), `nbytes` what the device sends. `segment`
    and `copy` say where compute was when it was issued.
    """

    name: str
    stream: str
    start_s: float
    end_s: float
    phase: str
    nbytes: float = 0.0
    segment: str = ""
    copy: int = 0


@dataclass(frozen=True)
class StageUse:
    """What a pipeline stage did: busy and idle seconds, peak memory, micro-batches in flight.

    `what` are the modules that it holds, in short.
    """

    compute_s: float
    exposed_s: float
    bubble_s: float
    peak_bytes: float
    in_flight: float
    what: str = ""


@dataclass(frozen=True)
class Timeline:
    """A simulated training step of one device; of a pipeline, the stage that ends last.

    `step_s` is `compute_s + sum(exposed_s) + bubble_s + optimizer_s`. Recomputation and the slowing
    down of compute by communication are part of `compute_s`, and given by themselves, too.
    `exposed_s` is what compute waited for, by collective and axis (`all_reduce dp`), `busy_s` how
    long those were in flight. `exact` is false where micro-batches did not settle into a rhythm and
    one stands for the rest. `memory` are points of a staircase: bytes from this time on.
    """

    step_s: float
    compute_s: float
    optimizer_s: float
    exposed_s: Mapping[str, float]
    busy_s: Mapping[str, float]
    peak_bytes: float
    peak_at_s: float
    peak_phase: str
    memory: Points = field(compare=False)
    bubble_s: float = 0.0
    recompute_s: float = 0.0
    slowdown_s: float = 0.0
    micro_batches: int = 1
    spans: tuple[Span, ...] = ()
    stages: tuple[StageUse, ...] = ()
    exact: bool = True

    @property
    def exposed_total_s(self) -> float:
        return sum(self.exposed_s.values())

    def exposed_by_axis(self) -> dict[str, float]:
        """Seconds that compute waited for the collectives of every mesh axis."""
        found: dict[str, float] = {}
        for name, seconds in self.exposed_s.items():
            axis = name.rpartition(" ")[2]
            found[axis] = found.get(axis, 0.0) + seconds
        return found


@dataclass(frozen=True)
class TimelineSummary:
    """A timeline in short, for plan files and reports: plain numbers and texts.

    `exposed_s` is by mesh axis. `spans` are those of the first copy of every segment as (name,
    stream, start, end, phase), `memory` at most 200 points (seconds, bytes) that keep the peak,
    `stages` those of a pipeline.
    """

    step_s: float
    compute_s: float
    exposed_s: Mapping[str, float]
    bubble_s: float
    optimizer_s: float
    peak_bytes: int
    spans: tuple[tuple[str, str, float, float, str], ...] = ()
    memory: tuple[tuple[float, float], ...] = ()
    stages: tuple[StageUse, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "step_s": self.step_s,
            "compute_s": self.compute_s,
            "exposed_s": dict(self.exposed_s),
            "bubble_s": self.bubble_s,
            "optimizer_s": self.optimizer_s,
            "peak_bytes": self.peak_bytes,
            "spans": [list(span) for span in self.spans],
            "memory": [list(point) for point in self.memory],
            "stages": [asdict(stage) for stage in self.stages],
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> TimelineSummary:
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError on anything else."""
        return TimelineSummary(
            float(raw["step_s"]),
            float(raw["compute_s"]),
            {str(axis): float(seconds) for axis, seconds in raw["exposed_s"].items()},
            float(raw["bubble_s"]),
            float(raw["optimizer_s"]),
            int(raw["peak_bytes"]),
            tuple((str(n), str(s), float(a), float(b), str(p)) for n, s, a, b, p in raw["spans"]),
            tuple((float(t), float(n)) for t, n in raw["memory"]),
            tuple(_stage_use(stage) for stage in raw.get("stages", ())),
        )


def _stage_use(raw: Mapping[str, Any]) -> StageUse:
    return StageUse(
        float(raw["compute_s"]),
        float(raw["exposed_s"]),
        float(raw["bubble_s"]),
        float(raw["peak_bytes"]),
        float(raw["in_flight"]),
        str(raw["what"]),
    )


def summarise(timeline: Timeline, most_points: int = 200, most_spans: int = 400) -> TimelineSummary:
    """A timeline in short: of every segment what its first copy does, the longest spans of that."""
    first: dict[tuple[str, str, str, str], Span] = {}
    for span in timeline.spans:
        if span.copy == 0 and span.end_s > span.start_s:
            first.setdefault((span.segment, span.name, span.stream, span.phase), span)
    spans = sorted(first.values(), key=lambda s: s.start_s - s.end_s)[:most_spans]
    return TimelineSummary(
        timeline.step_s,
        timeline.compute_s,
        timeline.exposed_by_axis(),
        timeline.bubble_s,
        timeline.optimizer_s,
        int(timeline.peak_bytes),
        tuple(
            (s.name, s.stream, s.start_s, s.end_s, s.phase)
            for s in sorted(spans, key=lambda s: (s.start_s, s.stream))
        ),
        tuple((float(t), float(n)) for t, n in thinned(timeline.memory, most_points)),
        timeline.stages,
    )


def thinned(points: Points, most: int) -> Points:
    """At most `most` points: the highest of each of as many spans of equal length."""
    if len(points) <= most:
        return points
    start, end = points[0, 0], points[-1, 0]
    bins = np.minimum(
        ((points[:, 0] - start) / max(end - start, 1e-30) * most).astype(int), most - 1
    )
    order = np.lexsort((-points[:, 1], bins))
    _, first = np.unique(bins[order], return_index=True)
    return points[np.sort(order[first])]
