"""Memory through which the ranks of one host hand each other what they send.

A rank copies what it sends into memory that its peers read, and takes the room again when all have
read it. The pages stay with it, so what counts is the most that waits at once, whenever that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from .step import Part, Segment

NAME = "communication buffers"


def staged_bytes(
    segments: Sequence[Segment], sizes: Mapping[str, int], bucket_bytes: float
) -> float:
    """Bytes that one rank holds for its peers; `sizes` are those of the mesh axes.

    Gathers of parameters that happen once begin together, before the first op, and their reductions
    end together, after the last one: all of them wait at once. Any other collective ends before the
    next one on its axis begins, but a slower peer may not have read it yet: two wait at once.
    """
    return sum(_on_axis(segments, axis, group, bucket_bytes) for axis, group in sizes.items())


def _on_axis(segments: Sequence[Segment], axis: str, group: int, bucket_bytes: float) -> float:
    if group == 1:
        return 0.0
    gathered = reduced = 0.0
    for segment in segments:
        for part in segment.parts:
            if part.axis == axis and part.param and part.once:
                gathered += segment.copies * _posted(part.kind, part.sent_bytes, group)
                sent = part.backward_sent_bytes
                reduced += segment.copies * _posted(part.backward_kind, sent, group)
    waits = _one_by_one(segments, axis, group, bucket_bytes)
    return max(gathered, reduced) + max((a + b for a, b in pairwise([0.0, *waits])), default=0.0)


def _one_by_one(
    segments: Sequence[Segment], axis: str, group: int, bucket_bytes: float
) -> list[float]:
    """What each message that is waited for holds, in order; of equal copies two."""
    forward: list[float] = []
    backward: list[float] = []
    for segment in segments:
        mine = [p for p in segment.parts if p.axis == axis and not (p.param and p.once)]
        messages = _messages(mine, bucket_bytes)
        one = [sum(_posted(p.kind, p.sent_bytes, group) for p in m) for m in messages]
        forward = [*forward, *one * min(segment.copies, 2)]
        one = []
        for message in reversed(messages):  # what is gathered again, then its gradients
            again = sum(_posted(p.kind, p.sent_bytes, group) for p in message if p.regather)
            sums = sum(_posted(p.backward_kind, p.backward_sent_bytes, group) for p in message)
            one += [again, sums] if again else [sums]
        backward = [*one * min(segment.copies, 2), *backward]
    return [posted for posted in (*forward, *backward) if posted]


def _messages(parts: Iterable[Part], bucket_bytes: float) -> list[list[Part]]:
    """Parts that travel together: parameters of a segment, up to `bucket_bytes`."""
    found: list[list[Part]] = []
    whole = bucket_bytes  # of the bucket that is being filled
    for part in parts:
        if part.param and whole + part.output_bytes <= bucket_bytes:
            found[-1].append(part)
            whole += part.output_bytes
        else:
            found.append([part])
            whole = part.output_bytes if part.param else bucket_bytes
    return found


def _posted(kind: str, sent: float, group: int) -> float:
    """Bytes that a rank leaves for its peers, of a collective in which a ring sends `sent`.

    An all-reduce leaves the input and this rank's share of the result, an all-gather its shard, the
    others their input.
    """
    if not kind or not sent:
        return 0.0
    if kind == "all_reduce":
        return sent * (group + 1) / (2 * (group - 1))
    if kind == "all_gather":
        return sent / (group - 1)
    return sent if kind == "broadcast" else sent * group / (group - 1)
