"""A segment with everything that its simulation asks of it, worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .recompute import kept_bytes, own_bytes, recomputed_parts
from .step import Part, Segment


@dataclass(frozen=True)
class Prepared:
    """A segment with what the simulation asks of every part, worked out once."""

    segment: Segment
    index: int
    again: frozenset[int]
    kept: float
    readers: tuple[tuple[int, ...], ...]
    freed: tuple[tuple[int, ...], ...]
    held: frozenset[int]
    buckets: tuple[tuple[int, ...], ...]
    opens: tuple[tuple[int, ...], ...]
    """Per part the buckets of gathered parameters that it is the first to read."""
    closes: tuple[tuple[int, ...], ...]
    """Per part the gathered parameters that it is the last to read."""
    wants: tuple[frozenset[int], ...]
    """Per part the buckets that make the largest parameter that it reads."""

    @property
    def mode(self) -> str:
        return self.segment.recompute


def prepare(
    segment: Segment, index: int, bucket_bytes: float, most_s_per_byte: float | None
) -> Prepared:
    """Work out who reads what, what is freed when, and which gathers share a message."""
    parts = segment.parts
    readers: list[list[int]] = [[] for _ in parts]
    freed: list[list[int]] = [[] for _ in range(len(parts) + 1)]
    for i, part in enumerate(parts):
        for dep in part.deps:
            if dep >= 0:
                readers[dep].append(i)
    # What is kept anyway is counted as kept.
    held = {
        i
        for i, part in enumerate(parts)
        if part.kind and not part.param and not (0 < part.output_bytes <= own_bytes(part))
    }
    for i in sorted(held):
        freed[max(i, parts[i].freed_by)].append(i)
    buckets = _buckets(parts, bucket_bytes)
    opens, closes, wants = _reads(parts, readers, buckets)
    return Prepared(
        segment,
        index,
        recomputed_parts(segment, None, most_s_per_byte),
        kept_bytes(segment, None, most_s_per_byte),
        tuple(map(tuple, readers)),
        tuple(map(tuple, freed)),
        frozenset(held),
        tuple(buckets),
        opens,
        closes,
        wants,
    )


Reads = tuple[tuple[int, ...], ...]


def _reads(
    parts: Sequence[Part], readers: Sequence[Sequence[int]], buckets: Sequence[Sequence[int]]
) -> tuple[Reads, Reads, tuple[frozenset[int], ...]]:
    """Per part: buckets that it reads first, parameters that it reads last, buckets it needs."""
    opens: list[list[int]] = [[] for _ in parts]
    closes: list[list[int]] = [[] for _ in parts]
    bucket_of = {i: number for number, bucket in enumerate(buckets) for i in bucket}
    read_by: dict[int, set[int]] = {}
    for i in reversed(range(len(parts))):
        if parts[i].param:  # what is gathered along several axes is read at the end of them
            read_by[i] = set().union(*(read_by.get(r, {r}) for r in readers[i]), set())
    for number, bucket in enumerate(buckets):
        first = [min(read_by[i]) for i in bucket if read_by[i]]
        if first:
            opens[min(first)].append(number)
        for i in bucket:
            if read_by[i]:
                closes[max(read_by[i])].append(i)
    made_of: dict[int, frozenset[int]] = {}
    wants: list[frozenset[int]] = []
    for i, part in enumerate(parts):
        chain = frozenset({bucket_of[i]}) if i in bucket_of else frozenset()
        if part.param:
            made_of[i] = chain.union(*(made_of.get(d, frozenset()) for d in part.deps))
        mine = [d for d in part.deps if d in made_of]
        largest = max(mine, key=lambda d: parts[d].output_bytes, default=-1)
        wants.append(made_of.get(largest, frozenset()))
    return tuple(map(tuple, opens)), tuple(map(tuple, closes)), tuple(wants)


def _buckets(parts: Sequence[Part], limit: float) -> list[tuple[int, ...]]:
    """Gathers of parameters that travel together: one kind, axis and depth, up to the limit."""
    found: list[list[int]] = []
    open_: dict[tuple[str, str, bool, bool], tuple[list[int], float]] = {}
    for i, part in enumerate(parts):
        if not part.param or not part.forward_s:
            continue
        key = (part.kind, part.axis, part.regather, bool(part.deps))
        bucket, size = open_.get(key, ([], 0.0))
        if not bucket or size + part.output_bytes > limit:
            bucket, size = [], 0.0
            found.append(bucket)
        bucket.append(i)
        open_[key] = (bucket, size + part.output_bytes)
    return [tuple(bucket) for bucket in found]
