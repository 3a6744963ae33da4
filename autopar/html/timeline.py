"""The simulated step: lanes of compute and communication, and the memory curve beneath."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from autopar.cost.timeline import TimelineSummary
from autopar.plan import Plan
from autopar.units import bytes_text, seconds_text

from .charts import stacked_bar, ticks
from .markup import Markup, element, join, table

Span = tuple[str, str, float, float, str]  # name, stream, start and end in seconds, phase

COMPUTE = "compute"
_WIDTH, _LEFT, _RIGHT = 960.0, 96.0, 8.0
_LANE, _GAP, _CURVE = 26.0, 6.0, 110.0
_CHARACTER = 7.4  # mean advance of a letter of a label
_PHASES = ("forward", "backward", "recompute", "optimizer", "wait")
_TELLING = 36.0  # units of the drawing from which a span has room for its name
_MOST_ZOOM = 400.0
_MOST_RUNS = 6
_SHORTEST_S = 1e-12
_LEAST_GAP = 0.004  # of the width: a shorter pause is not hatched
_MOST_ROWS = 40


@dataclass(frozen=True)
class _Window:
    """A stretch of the step, and where it is drawn."""

    start_s: float
    end_s: float

    def x(self, at_s: float) -> float:
        at = min(max(at_s, self.start_s), self.end_s)
        room = _WIDTH - _LEFT - _RIGHT
        return _LEFT + room * (at - self.start_s) / (self.end_s - self.start_s)


def timeline_section(summary: TimelineSummary | None) -> Markup:
    """The timeline as lanes and a memory curve, with close-ups where spans are too short."""
    if summary is None:
        return element("p", "This plan carries no timeline.", class_="absent")
    end = max([summary.step_s, *(span[3] for span in summary.spans)])
    spans = [span for span in summary.spans if span[3] > span[2]]
    if not (end > _SHORTEST_S and (spans or summary.memory)):
        return join([_parts(summary), element("p", "Its timeline has no spans.", class_="absent")])
    whole = _Window(0.0, end)
    windows = _windows(spans, end)
    lanes = _lanes(spans)
    note = (
        "Each lane is one stream of one device. Nothing is listed where compute is hatched: ops "
        "too short to be listed, further copies of a block, or idle time."
    )
    return join(
        [
            _parts(summary),
            _phases(spans),
            _drawing("The whole step", spans, lanes, whole, summary),
            element("p", class_="tip", aria_live="polite"),
            element("p", note, class_="small"),
            _close_ups(spans, lanes, windows, summary) if windows else None,
            _longest(spans),
        ]
    )


def timeline_of(plan: Plan) -> TimelineSummary | None:
    """The plan's timeline, None where it has none or one that cannot be read."""
    found = getattr(plan, "timeline", None)
    if isinstance(found, TimelineSummary):
        return found
    if isinstance(found, Mapping):
        try:
            return TimelineSummary.from_json(found)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
    return None


def _parts(summary: TimelineSummary) -> Markup:
    waits = {f"waiting for {axis}": seconds for axis, seconds in summary.exposed_s.items()}
    parts = {
        "compute": summary.compute_s,
        **waits,
        "bubble": summary.bubble_s,
        "optimizer": summary.optimizer_s,
    }
    return join(
        [
            element(
                "p",
                "Simulated step ",
                element("strong", seconds_text(summary.step_s)),
                ", peak memory ",
                element("strong", bytes_text(summary.peak_bytes)),
                ".",
            ),
            stacked_bar(parts, seconds_text, "Parts of the simulated step"),
        ]
    )


def _phases(spans: Sequence[Span]) -> Markup:
    """What the colours of the spans stand for."""
    found = list(dict.fromkeys(span[4] for span in spans))
    items = [element("li", element("i", class_=_phase(p)), p or "other") for p in found]
    return element("ul", items, class_="legend")


def _phase(phase: str) -> str:
    """A colour class of charts, which needs no more than these five and one for the rest."""
    return f"p{_PHASES.index(phase)}" if phase in _PHASES else "p5"


def _lanes(spans: Sequence[Span]) -> list[str]:
    """Streams from top to bottom: compute, then those of the mesh axes as they come."""
    streams = dict.fromkeys(span[1] for span in spans)
    return sorted(streams, key=lambda stream: stream != COMPUTE)


def _gaps(spans: Sequence[Span], window: _Window) -> list[tuple[float, float]]:
    """Stretches of the window in which no span of compute is listed."""
    least = _LEAST_GAP * (window.end_s - window.start_s)
    reached, gaps = window.start_s, []
    for _, stream, start, end, _ in sorted(spans, key=lambda span: span[2]):
        if stream == COMPUTE and end > window.start_s and start < window.end_s:
            if start - reached > least:
                gaps.append((reached, start))
            reached = max(reached, end)
    if window.end_s - reached > least:
        gaps.append((reached, window.end_s))
    return gaps


def _windows(spans: Sequence[Span], end_s: float) -> list[_Window]:
    """Where to look closer: the stretches that are listed if they are a few short ones.

    Else the densest stretch of forward and of backward, and the step's end, so long that half of
    the spans of compute have room for a name; none if they have it in the whole step.
    """
    gaps = _gaps(spans, _Window(0.0, end_s))
    edges = [0.0, *(at for gap in gaps for at in gap), end_s]
    runs = [_Window(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    runs = [run for run in runs if run.end_s - run.start_s > end_s / _MOST_ZOOM]
    if gaps and len(runs) <= _MOST_RUNS and all(r.end_s - r.start_s < end_s / 3 for r in runs):
        return runs
    return _densest(spans, end_s)


def _densest(spans: Sequence[Span], end_s: float) -> list[_Window]:
    """A window each for forward, backward and the end; none if the whole step is as readable."""
    lengths = [end - start for _, stream, start, end, _ in spans if stream == COMPUTE]
    if not lengths:
        return []
    length = max(median(lengths) * _WIDTH / _TELLING, end_s / _MOST_ZOOM)
    if length > end_s / 3:
        return []
    found = []
    for phase in ("forward", "backward"):
        starts = sorted(start for _, _, start, _, p in spans if p == phase)
        if starts:
            ends = [bisect_right(starts, start + length) for start in starts]
            best = max(range(len(starts)), key=lambda i: ends[i] - i)
            found.append(min(starts[best], end_s - length))
    found.append(end_s - length)
    kept: list[float] = []
    for start in sorted(found):
        if not kept or start - kept[-1] > length / 2:
            kept.append(start)
    return [_Window(start, start + length) for start in kept]


def _drawing(
    title: str,
    spans: Sequence[Span],
    lanes: Sequence[str],
    window: _Window,
    summary: TimelineSummary,
) -> Markup:
    """Lanes, time axis and memory curve of one window."""
    bottom = len(lanes) * (_LANE + _GAP)
    has_compute = COMPUTE in lanes
    has_memory = len(summary.memory) > 1
    height = bottom + 22 + (_CURVE + 10 if has_memory else 0)
    return element(
        "svg",
        element("title", title),
        _axis(window, bottom, height),
        [_lane(i, lane, spans, window) for i, lane in enumerate(lanes)],
        [_hatched(start, end, window) for start, end in _gaps(spans, window)]
        if has_compute
        else None,
        _memory(summary, window, bottom + 26) if has_memory else None,
        viewBox=f"0 0 {_WIDTH:g} {height:g}",
        role="img",
        aria_label=f"{title}: lanes of {', '.join(lanes)}; the longest spans are in the table",
        class_="chart timeline",
    )


def _axis(window: _Window, bottom: float, height: float) -> list[Markup]:
    step = ticks(0.0, window.end_s - window.start_s, False)[0]
    first = math.ceil(window.start_s / step - 1e-6)
    drawn = []
    for i in range(first, int(window.end_s / step) + 1):
        x = window.x(i * step)
        drawn.append(element("line", x1=x, x2=x, y1=0.0, y2=height, class_="grid"))
        anchor = "end" if x > _WIDTH - 60 else "middle"
        label = _at_text(i * step, step)
        drawn.append(element("text", label, x=x, y=bottom + 14, text_anchor=anchor, class_="tick"))
    return drawn


def _at_text(at_s: float, step_s: float) -> str:
    """A time on an axis, with as many digits as its step needs."""
    unit, scale = ("s", 1.0) if at_s >= 1 else ("ms", 1e3) if at_s >= 1e-3 else ("us", 1e6)
    decimals = max(0, math.ceil(-math.log10(step_s * scale) - 1e-6))
    return f"{at_s * scale:.{decimals}f} {unit}" if at_s else "0"


def _lane(index: int, lane: str, spans: Sequence[Span], window: _Window) -> list[Markup]:
    top = index * (_LANE + _GAP)
    name = lane if len(lane) <= 13 else lane[:12] + "…"
    drawn = [
        element("text", name, x=_LEFT - 8, y=top + 17, text_anchor="end", class_="tick"),
        element("rect", x=_LEFT, y=top, width=_WIDTH - _LEFT - _RIGHT, height=_LANE, class_="lane"),
    ]
    for name, stream, start, end, phase in spans:
        if stream != lane or end <= window.start_s or start >= window.end_s:
            continue
        x = window.x(start)
        width = max(0.4, window.x(end) - x)
        tip = f"{name}, {phase}: {seconds_text(end - start)} from {seconds_text(start)}"
        drawn.append(
            element(
                "rect",
                element("title", tip),
                x=x,
                y=top + 1,
                width=width,
                height=_LANE - 2,
                class_=f"span {_phase(phase)}",
                data_tip=tip,
            )
        )
        room = int((width - 6) / _CHARACTER)
        if room >= 5:
            short = name if len(name) <= room else name[: room - 2] + "…"
            drawn.append(element("text", short, x=x + 3, y=top + 17, class_="label"))
    return drawn


def _hatched(start: float, end: float, window: _Window) -> Markup:
    """Slanted lines in the compute lane, where nothing is listed."""
    left, right = window.x(start), window.x(end)
    step, lines = 7.0, []
    at = left
    while at < right:
        over = min(_LANE - 2, right - at)
        lines.append(f"M{at:.1f} {_LANE - 1:.1f}l{over:.1f} {-over:.1f}")
        at += step
    tip = f"nothing listed for {seconds_text(end - start)}"
    return element(
        "g",
        element("title", tip),
        element("rect", x=left, y=1.0, width=right - left, height=_LANE - 2, class_="copies"),
        element("path", d="".join(lines), class_="hatch"),
        data_tip=tip,
    )


def _memory(summary: TimelineSummary, window: _Window, top: float) -> list[Markup]:
    """The staircase of memory over time as an area, its peak marked."""
    most = max(max(nbytes for _, nbytes in summary.memory), 1.0)
    bottom = top + _CURVE

    def y(nbytes: float) -> float:
        return bottom - _CURVE * 0.88 * nbytes / most

    before = [n for t, n in summary.memory if t <= window.start_s] or [summary.memory[0][1]]
    points = [(t, n) for t, n in summary.memory if window.start_s < t < window.end_s]
    path = f"M{window.x(window.start_s):.1f} {bottom:.1f}"
    path += f"V{y(before[-1]):.1f}"
    path += "".join(f"H{window.x(t):.1f}V{y(n):.1f}" for t, n in points)
    path += f"H{window.x(window.end_s):.1f}V{bottom:.1f}Z"
    peak_s, peak = max(summary.memory, key=lambda point: point[1])
    drawn = [
        element("path", d=path, class_="memory"),
        element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="base"),
    ]
    for level in ticks(0.0, most, False, 1024.0)[::2]:
        drawn.append(
            element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(level), y2=y(level), class_="grid")
        )
        drawn.append(
            element(
                "text",
                bytes_text(level),
                x=_LEFT - 8,
                y=y(level) + 4,
                text_anchor="end",
                class_="tick",
            )
        )
    if window.start_s <= peak_s <= window.end_s:
        x = window.x(peak_s)
        anchor = "start" if x < _WIDTH / 2 else "end"
        away = 7.0 if anchor == "start" else -7.0
        drawn.append(element("circle", cx=x, cy=y(peak), r=3.5, class_="peak"))
        text = f"peak {bytes_text(peak)} at {seconds_text(peak_s)}"
        drawn.append(element("text", text, x=x + away, y=y(peak) - 3, text_anchor=anchor))
    label = "memory per device"
    return [*drawn, element("text", label, x=_LEFT + 6, y=top + 10, class_="tick")]


def _close_ups(
    spans: Sequence[Span],
    lanes: Sequence[str],
    windows: Sequence[_Window],
    summary: TimelineSummary,
) -> Markup:
    """The windows in the order of the step, each as wide as the page."""
    drawn: list[Markup] = []
    for window in windows:
        title = f"From {seconds_text(window.start_s)} to {seconds_text(window.end_s)}"
        drawn.append(
            element(
                "details",
                element("summary", title),
                _drawing(title, spans, lanes, window, summary),
                open=True,
            )
        )
    return element("div", element("h3", "Close up"), drawn)


def _longest(spans: Sequence[Span]) -> Markup:
    """The longest spans as a table."""
    ranked = sorted(spans, key=lambda span: span[2] - span[3])[:_MOST_ROWS]
    rows = [
        (name, stream, phase, seconds_text(start), seconds_text(end - start))
        for name, stream, start, end, phase in ranked
    ]
    return element(
        "details",
        element("summary", "The longest spans as a table"),
        table(
            "Longest spans of the step", ("what", "stream", "phase", ">start", ">duration"), rows
        ),
    )
