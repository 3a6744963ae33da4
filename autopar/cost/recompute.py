"""Recomputation of activations: what a segment keeps from its forward, and what it runs again.

`full` keeps what enters a copy and runs the whole copy again, its collectives included. `selective`
runs again what is cheap for the bytes that it frees: by default everything but matrix work and
collectives, whose outputs are kept (Korthikanti et al., arXiv:2205.05198, section 5, recompute the
softmax and what surrounds it for the same reason: much memory, few flops).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .step import Part, Segment, Step

NONE, SELECTIVE, FULL = "none", "selective", "full"


def recomputed_parts(
    segment: Segment, mode: str | None = None, most_s_per_byte: float | None = None
) -> frozenset[int]:
    """Indices of the parts whose forward runs again in the backward.

    `mode` is the segment's own by default. With `most_s_per_byte` a part is recomputed selectively
    if its forward takes at most so many seconds per byte that it frees, whatever op it is. Gathers
    of parameters are not listed: `Part.regather` says whether they are repeated.
    """
    mode = mode or segment.recompute
    if mode == NONE:
        return frozenset()
    if mode == FULL:
        return frozenset(i for i, part in enumerate(segment.parts) if not part.param)
    if most_s_per_byte is None:
        return frozenset(i for i, p in enumerate(segment.parts) if p.recomputable and not p.param)
    freed = freed_bytes(segment)
    return frozenset(
        i
        for i, part in enumerate(segment.parts)
        if part.is_compute
        and (part.is_view or (freed[i] and part.forward_s <= most_s_per_byte * freed[i]))
    )


def freed_bytes(segment: Segment) -> list[float]:
    """What recomputing each part frees: its output where it is kept, and tensors of its own."""
    found = [own_bytes(part) for part in segment.parts]
    for i in {source for part in segment.parts for source, _ in part.saved_from}:
        if i >= 0:
            found[i] += segment.parts[i].output_bytes
    return found


def own_bytes(part: Part) -> float:
    """Saved bytes that are not the output of another part."""
    return part.saved_bytes - sum(nbytes for _, nbytes in part.saved_from)


def kept_bytes(
    segment: Segment, mode: str | None = None, most_s_per_byte: float | None = None
) -> float:
    """Bytes of activations that one copy keeps from its forward until its backward.

    Parameters that stay gathered are not among them.
    """
    mode = mode or segment.recompute
    parts = segment.parts
    if mode == NONE:
        return sum(part.saved_bytes for part in parts if not part.param)
    if mode == FULL:
        return segment.input_bytes
    again = recomputed_parts(segment, mode, most_s_per_byte)
    # What only goes to the next copy is not made again, nor what it is made of kept.
    wanted = {source for part in parts for source, _ in part.saved_from}
    wanted |= {i for i in again if own_bytes(parts[i]) > 0}
    needed: set[int] = set()
    while wanted:
        found = _bases(parts, wanted) - needed
        needed |= found
        wanted = {dep for i in found if i in again for dep in parts[i].deps}
    kept = sum(parts[i].output_bytes for i in needed if i >= 0 and i not in again)
    kept += sum(own_bytes(p) for i, p in enumerate(parts) if i not in again and not p.param)
    return kept + segment.input_bytes


def _bases(parts: tuple[Part, ...], wanted: set[int]) -> set[int]:
    """The parts whose memory the wanted values are in: views resolved, parameters left out."""
    found: set[int] = set()
    stack = list(wanted)
    while stack:
        i = stack.pop()
        if i >= 0 and parts[i].shares_memory and parts[i].deps:
            stack.extend(parts[i].deps)
        elif i < 0 or not parts[i].param:
            found.add(i)
    return found


def recompute_s(
    segment: Segment, mode: str | None = None, most_s_per_byte: float | None = None
) -> float:
    """Seconds that one copy's backward spends on running parts again."""
    again = recomputed_parts(segment, mode, most_s_per_byte)
    return sum(segment.parts[i].forward_s for i in again)


def with_recompute(step: Step, modes: Mapping[str, tuple[int, int]]) -> Step:
    """The same step with activations recomputed: block -> copies in full, copies selectively.

    The first copies of a block are recomputed in full, the next selectively, the rest not.
    """
    segments: list[Segment] = []
    done: dict[str, int] = {}
    for segment in step.segments:
        full, selective = modes.get(segment.block, (0, 0)) if segment.block else (0, 0)
        first = done.get(segment.block, 0)
        done[segment.block] = end = first + segment.copies
        bounds = (
            (0, full, FULL),
            (full, full + selective, SELECTIVE),
            (full + selective, end, NONE),
        )
        for low, high, mode in bounds:
            copies = min(high, end) - max(low, first)
            if copies > 0:
                segments.append(replace(segment, copies=copies, recompute=mode))
    return replace(step, segments=tuple(segments))
