"""Sequences of operations in which one block repeats: find the block, insert more copies of it.

An item refers to others by number. What `probe` records of a running module and the nodes of a
captured graph are both such sequences, so that both are checked and lengthened by the same code.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .repeats import KEPT, Places

ITEM = "item"


class CannotFoldError(Exception):
    """The model is not a repetition of blocks, or not in a way that is understood; says why."""


class Ref(NamedTuple):
    """Something that an item uses: `tag` of number `number` among its `kind`.

    Kind `ITEM` is an earlier item; an int is the unit of the run of that number; None is anything
    that does not depend on the layer.
    """

    kind: Hashable
    tag: Hashable
    number: int = 0


def reference(name: str, places: Places, what: str = "") -> Ref:
    """The reference to what has a dotted name; `what` tells apart uses of one name."""
    place = places.of(name)
    if place is None:
        return Ref(None, (what, name))
    return Ref(place.run, (what, place.offset, place.rest), place.unit)


class Item(NamedTuple):
    """One operation: what it is apart from what it refers to, its references, and its origin."""

    key: Hashable
    refs: tuple[Ref, ...]
    origin: Any = None


@dataclass(frozen=True)
class Repeat:
    """`items[start : start + period]` and as many after it are the last two copies of a block.

    `runs` are the numbers of the runs whose units it counts.
    """

    start: int
    period: int
    runs: frozenset[int]


def find_repeat(items: Sequence[Item], run: int, units: int) -> Repeat | None:
    """The block of `items` that repeats with the units of `run`, or None.

    All copies but the first must be equal but for the numbers they refer to, each of which is the
    same in all copies or grows by one block (one unit) from copy to copy.
    """
    first = _first_uses(items, run)
    if len(first) != units or set(first) != set(range(units)):
        return None
    period = first[2] - first[1]
    if period <= 0 or any(first[u] != first[1] + (u - 1) * period for u in range(1, units)):
        return None
    begin = end = first[1]
    while end + period < len(items) and _equal(items[end], items[end + period], period):
        end += 1
    while begin > 0 and _equal(items[begin - 1], items[begin - 1 + period], period):
        begin -= 1
    if end - begin < (units - 2) * period:
        return None
    start = end - period
    block = range(start, end)
    runs: set[int] = set()
    for j in block:
        for a, b in zip(items[j].refs, items[j + period].refs, strict=True):
            if a.kind == ITEM and a.number == b.number >= begin:
                return None  # both use one operation inside the repeated part
            if isinstance(a.kind, int) and a.number != b.number:
                runs.add(a.kind)
    return Repeat(start, period, frozenset(runs))


def lengthen(items: Sequence[Item], repeat: Repeat, copies: int) -> list[Item]:
    """`items` with `copies` more copies of the repeated block after the last one."""
    start, period = repeat.start, repeat.period
    end = start + 2 * period
    result = list(items[:end])
    steps = [
        tuple(b.number - a.number for a, b in zip(items[j - period].refs, item.refs, strict=True))
        for j, item in enumerate(items[end - period : end], end - period)
    ]
    for copy in range(1, copies + 1):
        for item, step in zip(items[end - period : end], steps, strict=True):
            refs = tuple(
                Ref(ref.kind, ref.tag, ref.number + copy * by)
                for ref, by in zip(item.refs, step, strict=True)
            )
            result.append(Item(item.key, refs, item.origin))

    def after(ref: Ref) -> Ref:
        """A reference of what follows the block to its last copy, or to what follows."""
        if ref.kind == ITEM and ref.number >= end - period:
            return ref._replace(number=ref.number + copies * period)
        if ref.kind in repeat.runs and ref.number >= KEPT - 1:
            return ref._replace(number=ref.number + copies)
        return ref

    result += [Item(item.key, tuple(map(after, item.refs)), item.origin) for item in items[end:]]
    return result


def lengthen_all(items: Sequence[Item], units: Sequence[int]) -> list[Item] | None:
    """`items`, in which every run has `KEPT` units, with `units[run]` of each; None if irregular.

    Runs whose units are used together (`zip(norms, layers)`) are one block.
    """
    result = list(items)
    left = set(range(len(units)))
    for run in range(len(units)):
        if run not in left:
            continue
        repeat = find_repeat(result, run, KEPT)
        if repeat is None or run not in repeat.runs or not repeat.runs <= left:
            return None
        if any(units[other] != units[run] for other in repeat.runs):
            return None
        result = lengthen(result, repeat, units[run] - KEPT)
        left -= repeat.runs
    return result


def same_sequence(a: Sequence[Item], b: Sequence[Item]) -> bool:
    """Whether two sequences differ in nothing but where their items come from."""
    return len(a) == len(b) and all(
        x.refs == y.refs and x.key == y.key for x, y in zip(a, b, strict=True)
    )


def _first_uses(items: Sequence[Item], run: int) -> dict[int, int]:
    """The position of the first item that refers to each unit of a run."""
    first: dict[int, int] = {}
    for position, item in enumerate(items):
        for ref in item.refs:
            if ref.kind == run and isinstance(ref.kind, int):
                first.setdefault(ref.number, position)
    return first


def _equal(a: Item, b: Item, period: int) -> bool:
    return (
        len(a.refs) == len(b.refs)
        and a.key == b.key
        and all(
            x.kind == y.kind
            and x.tag == y.tag
            and (
                x.number == y.number
                or (x.kind is not None and y.number - x.number == (period if x.kind == ITEM else 1))
            )
            for x, y in zip(a.refs, b.refs, strict=True)
        )
    )
