"""Charts of candidates (time against memory) and of a step's parts, as SVG and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autopar.units import bytes_text, seconds_text

from .markup import Markup, element

_WIDTH, _HEIGHT = 960, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 24, 16, 48
_CHARACTER = 7.2  # mean advance of a letter of a label, bold ones included
_LONGEST = 44  # letters of a label
_LOG_FROM = 8.0  # largest over smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Point:
    """A candidate with both figures."""

    name: str
    time_s: float
    memory_bytes: float
    chosen: bool = False
    why: str = ""


@dataclass(frozen=True)
class _Scale:
    """Values to coordinates; logarithmic if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def _scale(values: Sequence[float], start: float, end: float) -> _Scale:
    low, high = min(values), max(values)
    if low > 0 and high / low >= _LOG_FROM:
        return _Scale(low / 1.3, high * 1.3, start, end, True)
    around = 0.2 * (high - low)
    if not around:
        return _Scale(0.0, high * 1.5 or 1.0, start, end, False)
    return _Scale(max(0.0, low - around), high + around, start, end, False)


def ticks(scale_low: float, scale_high: float, log: bool, base: float = 10.0) -> list[float]:
    """Round values between the two: 1, 2 and 5 times powers of ten, or powers of two in bytes."""
    steps = (
        (1.0, 2.0, 5.0)
        if base == 10.0
        else (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
    )
    if log:
        first, last = (math.floor(math.log(v, base)) for v in (scale_low, scale_high))
        found = [s * base**p for p in range(first, last + 1) for s in steps]
        found = [v for v in found if scale_low <= v <= scale_high]
        return found[:: max(1, math.ceil(len(found) / 8))]
    raw = (scale_high - scale_low) / 6
    power = base ** math.floor(math.log(raw, base))
    step = next((s * power for s in steps if s * power >= raw), base * power)
    first = max(1, math.ceil(scale_low / step - 1e-9))
    return [step * i for i in range(first, int(scale_high / step + 1e-9) + 1)]


def drawable(point: Point) -> bool:
    """Whether both figures are large enough for an axis."""
    return point.time_s > 1e-12 and point.memory_bytes >= 1


def scatter(points: Sequence[Point], limit_bytes: float | None) -> Markup:
    """Time across, memory up; the limit as a line; the chosen point marked; labels that fit."""
    shown = [p for p in points if drawable(p)]
    memories = [p.memory_bytes for p in shown] + ([limit_bytes] if limit_bytes else [])
    x = _scale([p.time_s for p in shown], _LEFT, _WIDTH - _RIGHT)
    y = _scale(memories, _HEIGHT - _BOTTOM, _TOP)
    boxes: list[tuple[float, float, float, float]] = [
        (x(p.time_s) - 6, y(p.memory_bytes) - 6, x(p.time_s) + 6, y(p.memory_bytes) + 6)
        for p in shown
    ]
    if limit_bytes:  # the place of the limit's label
        boxes.append((_WIDTH - 150, y(limit_bytes) - 18, _WIDTH, y(limit_bytes) + 1))
    order = sorted(shown, key=lambda p: (not p.chosen, p.time_s))
    return element(
        "svg",
        element("title", "Candidates: step time against memory per device"),
        _grid(x, y),
        _limit(limit_bytes, y),
        [_point(p, x, y, boxes) for p in order],
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="group",
        aria_label="Candidates: step time against memory per device; the table has the figures",
        class_="chart scatter",
    )


def _grid(x: _Scale, y: _Scale) -> list[Markup]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    lines = []
    for t in ticks(x.low, x.high, x.log):
        lines.append(element("line", x1=x(t), x2=x(t), y1=_TOP, y2=bottom, class_="grid"))
        label = seconds_text(t)
        lines.append(
            element("text", label, x=x(t), y=bottom + 16, text_anchor="middle", class_="tick")
        )
    for m in ticks(y.low, y.high, y.log, 1024.0):
        lines.append(element("line", x1=_LEFT, x2=right, y1=y(m), y2=y(m), class_="grid"))
        label = bytes_text(m)
        lines.append(
            element("text", label, x=_LEFT - 6, y=y(m) + 4, text_anchor="end", class_="tick")
        )
    middle = (_LEFT + right) / 2
    return [
        *lines,
        element("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="base"),
        element("line", x1=_LEFT, x2=_LEFT, y1=_TOP, y2=bottom, class_="base"),
        element(
            "text",
            "predicted step time" + (" (logarithmic)" if x.log else ""),
            x=middle,
            y=_HEIGHT - 8,
            text_anchor="middle",
            class_="tick",
        ),
        element(
            "text",
            "memory per device" + (" (logarithmic)" if y.log else ""),
            x=_LEFT + 8,
            y=_TOP + 12,
            class_="tick",
        ),
    ]


def _limit(limit_bytes: float | None, y: _Scale) -> list[Markup]:
    if not limit_bytes:
        return []
    at, right = y(limit_bytes), _WIDTH - _RIGHT
    return [
        element("line", x1=_LEFT, x2=right, y1=at, y2=at, class_="limit"),
        element(
            "text",
            f"limit {bytes_text(limit_bytes)}",
            x=right - 4,
            y=at - 5,
            text_anchor="end",
            class_="limit-label",
        ),
    ]


def _point(
    p: Point, x: _Scale, y: _Scale, boxes: list[tuple[float, float, float, float]]
) -> Markup:
    at_x, at_y = x(p.time_s), y(p.memory_bytes)
    text = f"{p.name}: {seconds_text(p.time_s)}, {bytes_text(p.memory_bytes)}"
    tip = text + (" (chosen)" if p.chosen else f" ({p.why})" if p.why else "")
    label = p.name if len(p.name) <= _LONGEST else p.name[: _LONGEST - 1] + "…"
    placed = _free(label, at_x, at_y, boxes)
    side = "start" if at_x < _WIDTH / 2 else "end"
    label_x, label_y, anchor = placed or (at_x, at_y - 12, side)
    return element(
        "g",
        element("title", tip),
        element("circle", cx=at_x, cy=at_y, r=8 if p.chosen else 5.5),
        element(
            "text",
            label,
            x=label_x,
            y=label_y,
            text_anchor=anchor,
            class_=None if placed else "crowded",
        ),
        class_="point chosen" if p.chosen else "point",
        tabindex=0,
        role="img",
        aria_label=tip,
        data_tip=tip,
    )


def _free(
    name: str, at_x: float, at_y: float, boxes: list[tuple[float, float, float, float]]
) -> tuple[float, float, str] | None:
    """A place for the label that no point and no other label has; it is taken from then on."""
    width = len(name) * _CHARACTER
    for dx, dy, anchor in (
        *((11.0, 4.0, "start"), (-11.0, 4.0, "end"), (0.0, -12.0, "middle"), (0.0, 22.0, "middle")),
        *(
            (11.0, -10.0, "start"),
            (11.0, 18.0, "start"),
            (-11.0, -10.0, "end"),
            (-11.0, 18.0, "end"),
        ),
    ):
        x, y = at_x + dx, at_y + dy
        left = x - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
        box = (left, y - 11, left + width, y + 3)
        inside = (
            left >= _LEFT + 2 and box[2] <= _WIDTH - 2 and y >= _TOP + 20 and y <= _HEIGHT - _BOTTOM
        )
        if inside and not any(_overlap(box, other) for other in boxes):
            boxes.append(box)
            return x, y, anchor
    return None


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def stacked_bar(parts: Mapping[str, float], text: Callable[[float], str], label: str) -> Markup:
    """Parts of one sum side by side in a bar, and a legend with their figures."""
    shown = {name: size for name, size in parts.items() if size > 0}
    total = sum(shown.values())
    if not total:
        return Markup()
    bars, at = [], 0.0
    for i, (name, size) in enumerate(shown.items()):
        width = 960 * size / total
        tip = f"{name}: {text(size)}"
        bars.append(
            element(
                "rect",
                element("title", tip),
                x=at,
                y=0,
                width=max(0.5, width - 1),
                height=18,
                class_=f"s{i % 6}",
            )
        )
        at += width
    legend = [
        element("li", element("i", class_=f"s{i % 6}"), f"{name} ", element("b", text(size)))
        for i, (name, size) in enumerate(shown.items())
    ]
    return element(
        "figure",
        element(
            "svg",
            bars,
            viewBox="0 0 960 18",
            preserveAspectRatio="none",
            role="img",
            aria_label=label,
            class_="bar",
        ),
        element("ul", legend, class_="legend"),
    )
