"""A squarified treemap as SVG.

Layout: Bruls, Huizing and van Wijk, "Squarified Treemaps", VisSym 2000, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .markup import Markup, element

FONT = 12.0
_CHARACTER = 0.6 * FONT  # mean advance of a sans-serif letter, bold ones included
_HEADER = 18.0
_GAP = 2.0
_LEAST = 1.5  # a narrower rectangle cannot be seen, nor pointed at


@dataclass(frozen=True)
class Tree:
    """A named size, and what it consists of; `value` is the sum of the children's, if any."""

    name: str
    value: float
    children: tuple[Tree, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Box:
    """A rectangle, its upper left corner first."""

    x: float
    y: float
    width: float
    height: float


def squarified(values: Sequence[float], box: Box) -> list[Box]:
    """A box per value inside `box`, of proportional area and as square as the greedy order allows.

    Values are positive and in falling order.
    """
    total = sum(values)
    if not values or total <= 0:
        return []
    areas = [value * box.width * box.height / total for value in values]
    found: list[Box] = []
    start = 0
    while start < len(areas):
        side = min(box.width, box.height)
        end = start + 1
        while end < len(areas) and _worst(areas[start : end + 1], side) <= _worst(
            areas[start:end], side
        ):
            end += 1
        row, box = _row(areas[start:end], box)
        found += row
        start = end
    return found


def _worst(areas: Sequence[float], side: float) -> float:
    """The largest aspect ratio of a row of these areas along a side of this length."""
    total = sum(areas)
    if side <= 0 or min(areas) <= 0:
        return float("inf")
    return max(side**2 * max(areas) / total**2, total**2 / (side**2 * min(areas)))


def _row(areas: Sequence[float], box: Box) -> tuple[list[Box], Box]:
    """The areas in a row along the shorter side, and the box that is left."""
    total = sum(areas)
    made: list[Box] = []
    if box.width >= box.height:
        width, y = (total / box.height if box.height else 0.0), box.y
        for area in areas:
            height = area / width if width else 0.0
            made.append(Box(box.x, y, width, height))
            y += height
        return made, Box(box.x + width, box.y, max(0.0, box.width - width), box.height)
    height, x = (total / box.width if box.width else 0.0), box.x
    for area in areas:
        width = area / height if height else 0.0
        made.append(Box(x, box.y, width, height))
        x += width
    return made, Box(box.x, box.y + height, box.width, max(0.0, box.height - height))


def treemap(roots: Sequence[Tree], width: float, height: float, label: str) -> Markup:
    """The trees as nested rectangles, one colour class (`c0`, `c1`...) per root."""
    drawn = [
        _drawn(tree, box, f"c{index}", 0, "")
        for index, tree, box in _laid_out(roots, Box(0, 0, width, height))
    ]
    return element(
        "svg",
        element("title", label),
        [list(each) for each in drawn],
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        class_="treemap",
    )


def _laid_out(trees: Sequence[Tree], box: Box) -> list[tuple[int, Tree, Box]]:
    """(index, tree, its box) of the trees that have a size, the largest first."""
    order = sorted(
        (i for i, tree in enumerate(trees) if tree.value > 0), key=lambda i: -trees[i].value
    )
    boxes = squarified([trees[i].value for i in order], box)
    return [(i, trees[i], b) for i, b in zip(order, boxes, strict=True)]


def _drawn(tree: Tree, box: Box, colour: str, depth: int, path: str) -> Iterator[Markup]:
    box = Box(box.x, box.y, max(0.0, box.width - _GAP), max(0.0, box.height - _GAP))
    if min(box.width, box.height) < _LEAST:
        return
    name = f"{path} / {tree.name}" if path else tree.name
    tip = f"{name}: {tree.detail}"
    inner = tree.children and box.height > 2 * _HEADER and box.width > 2 * _HEADER
    yield element(
        "rect",
        element("title", tip),
        x=box.x,
        y=box.y,
        width=box.width,
        height=box.height,
        class_=f"{colour} d{depth}" + (" leaf" if not inner else ""),
        data_tip=tip,
    )
    yield from _label(tree, box, depth)
    if inner:
        inside = Box(box.x + _GAP, box.y + _HEADER, box.width - _GAP, box.height - _HEADER)
        for _, child, place in _laid_out(tree.children, inside):
            yield from _drawn(child, place, colour, depth + 1, name)


def _label(tree: Tree, box: Box, depth: int) -> Iterator[Markup]:
    """The name, and the size where there is room: beside it, or on a second line of a leaf."""
    room = int((box.width - 8) / _CHARACTER)
    if room < 4 or box.height < FONT + 4:
        return
    beside = len(tree.name) + len(tree.detail) + 2 <= room
    text = f"{tree.name}  {tree.detail}" if beside else _shortened(tree.name, room)
    yield element("text", text, x=box.x + 5, y=box.y + FONT + 1, class_=f"t{depth}")
    if not beside and not tree.children and box.height > 2 * FONT + 8 and len(tree.detail) <= room:
        yield element("text", tree.detail, x=box.x + 5, y=box.y + 2 * FONT + 4, class_="size")


def _shortened(name: str, room: int) -> str:
    """The name, else its last components from a word on, cut at the end if it is still too long."""
    if len(name) > room:
        parts = name.split(".")
        start = max((i for i, part in enumerate(parts) if part[:1].isalpha()), default=0)
        tail = ".".join(parts[start:])
        name = tail if len(tail) <= room else name
    return name if len(name) <= room else name[: room - 2] + "…"
