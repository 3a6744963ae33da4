"""Buckets of gradients that fill up over the copies of a block: for how long that goes on alike.

A bucket is sent when it is full. Until then copies only add to it, and nothing else depends on how
much is in it: copies that leave the machine in the same state but for that can be repeated as often
as no bucket gets full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .links import Flow

BucketKey = tuple[str, str, bool, bool]  # collective, axis, a second step, of what is regathered

_AMOUNTS = ("work_s", "size_bytes", "held_bytes", "gradient_bytes", "nbytes", "tensors")


@dataclass(frozen=True)
class Filled:
    """A bucket at some moment, and what was in it: seconds, bytes, tensors (`_AMOUNTS`)."""

    flow: Flow
    amounts: tuple[float, ...]


Filling = Mapping[BucketKey, Filled]


def filling_of(buckets: Mapping[BucketKey, Flow]) -> Filling:
    """What is in every bucket now."""
    return {
        key: Filled(flow, tuple(getattr(flow, name) for name in _AMOUNTS))
        for key, flow in buckets.items()
    }


def repeats_that_fit(then: Filling, now: Filling, bucket_bytes: float) -> float:
    """How many times more what happened between two moments can happen without a full bucket.

    Infinite where nothing fills up; 0 where buckets were sent and others are filled than then.
    """
    if then.keys() != now.keys():
        return 0
    times = math.inf
    for key, after in now.items():
        before = then[key]
        if before.flow is not after.flow:
            if _rounded(before) != _rounded(after):
                return 0
            continue
        grown = after.amounts[1] - before.amounts[1]
        if grown > 0:
            times = min(times, (bucket_bytes - after.amounts[1]) // grown - 1)
        elif before.amounts != after.amounts:  # of no bytes: each may be anything
            return 0
    return max(times, 0)


def fill(then: Filling, now: Filling, times: int) -> None:
    """Add so many times more to every bucket what was added between two moments."""
    for key, after in now.items():
        before = then[key]
        if before.flow is after.flow:
            for name, old, new in zip(_AMOUNTS, before.amounts, after.amounts, strict=True):
                setattr(after.flow, name, new + times * (new - old))


def _rounded(filled: Filled) -> tuple[float, ...]:
    work_s, *rest = filled.amounts
    return (round(work_s, 13), *rest)
