"""Scatter of predicted against measured as SVG, without dependencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e")
SIDE, MARGIN = 460, 56


def scatter(
    points: Sequence[tuple[str, float, float]], title: str, x_label: str, y_label: str
) -> str:
    """Log-log scatter of (series, x, y), with the diagonal and a band of 20 % around it."""
    values = [v for _, x, y in points for v in (x, y) if v > 0] or [1.0, 10.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def at(value: float) -> float:
        return (math.log10(value) - low) / (high - low) * SIDE

    def xy(x: float, y: float) -> tuple[float, float]:
        return MARGIN + at(x), MARGIN + SIDE - at(y)

    series = list(dict.fromkeys(name for name, _, _ in points))
    width = MARGIN * 2 + SIDE + 150
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{SIDE + 2 * MARGIN}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="24" font-size="15">{escape(title)}</text>',
    ]
    parts += _grid(low, high, xy)
    for factor, dash in ((0.8, "4 4"), (1.0, ""), (1.2, "4 4")):
        (x0, y0), (x1, y1) = _diagonal(10.0**low, 10.0**high, factor, xy)
        parts.append(
            f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#888" '
            f'stroke-dasharray="{dash}"/>'
        )
    for name, x, y in points:
        colour = COLOURS[series.index(name) % len(COLOURS)]
        px, py = xy(x, y)
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}" fill-opacity="0.7"/>'
        )
    for i, name in enumerate(series):
        y = MARGIN + 16 * i + 8
        parts.append(
            f'<circle cx="{MARGIN + SIDE + 16}" cy="{y}" r="4" '
            f'fill="{COLOURS[i % len(COLOURS)]}"/>'
            f'<text x="{MARGIN + SIDE + 26}" y="{y + 4}">{escape(name)}</text>'
        )
    middle = MARGIN + SIDE / 2
    parts.append(
        f'<text x="{middle}" y="{SIDE + 2 * MARGIN - 14}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text x="16" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle})">{escape(y_label)}</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def _grid(low: int, high: int, xy: object) -> list[str]:
    parts = [
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{SIDE}" height="{SIDE}" fill="none" '
        'stroke="#444"/>'
    ]
    for power in range(low, high + 1):
        value = 10.0**power
        x, _ = xy(value, value)  # type: ignore[operator]
        _, y = xy(value, value)  # type: ignore[operator]
        parts.append(
            f'<line x1="{x:.1f}" y1="{MARGIN}" x2="{x:.1f}" y2="{MARGIN + SIDE}" stroke="#ddd"/>'
            f'<line x1="{MARGIN}" y1="{y:.1f}" x2="{MARGIN + SIDE}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{x:.1f}" y="{MARGIN + SIDE + 16}" text-anchor="middle">{value:g}</text>'
            f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    return parts


def _diagonal(
    low: float, high: float, factor: float, xy: object
) -> tuple[tuple[float, float], tuple[float, float]]:
    """End points of y = factor x inside the frame."""
    start = low if factor >= 1 else low / factor
    end = high / factor if factor >= 1 else high
    return xy(start, factor * start), xy(end, factor * end)  # type: ignore[operator]
