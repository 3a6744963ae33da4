"""Times of collectives.

Byte conventions (pinned by tests/cost/test_comm.py). `nbytes` is

=================  ==========================================================================
all_reduce         bytes of the tensor that every member holds
all_gather         bytes of the *gathered output* (group size × a shard)
reduce_scatter     bytes of the *input* that every member holds (group size × a shard)
all_to_all         bytes of the *local* tensor that a member sends (and as much it receives)
broadcast          bytes of the tensor
=================  ==========================================================================

so for one tensor of W bytes, as the group sees it whole: all_reduce, all_gather and
reduce_scatter take W, all_to_all takes W / group size.

A group of g members moves `wire_factor(kind, g) * nbytes` per member (the bus bytes of nccl-tests),
and takes `alpha + wire bytes / bandwidth(nbytes)`. A group that crosses hosts is priced level by
level as a hierarchical algorithm: the latencies add, the transfers overlap (NCCL's rings pipeline
them), so that the slowest level counts. On CPU they add, too: `autopar.runtime.two_level` does one
after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from autopar.ir.lowered import Collective

from .cluster import Cluster, CollectiveCurve, Level
from .curve import Curve, Number


def wire_factor(kind: str, group: int) -> float:
    """Bytes that a member sends per byte of `nbytes`: the optimum for a ring.

    nccl-tests, doc/PERFORMANCE.md.
    """
    if kind == "broadcast":
        return 1.0
    return (2.0 if kind == "all_reduce" else 1.0) * (group - 1) / group


def fit_collective(
    kind: str, group: int, times: Iterable[tuple[float, float]], source: str
) -> CollectiveCurve:
    """A curve that gives back measured (nbytes, seconds).

    Times are first made to rise with size (each is at most the next), which removes spikes. The
    latency is 0.9 of the smallest time, so that what is left for the bandwidth stays positive.
    """
    rising: list[tuple[float, float]] = []
    least = math.inf
    for x, seconds in sorted(times, reverse=True):
        least = min(least, seconds)
        rising.append((x, least))
    alpha = 0.9 * least
    factor = wire_factor(kind, group)
    points = [(x, factor * x / (seconds - alpha)) for x, seconds in rising]
    return CollectiveCurve(group, alpha, Curve.of(points, source))


def _curve_time(curve: CollectiveCurve, kind: str, nbytes: Number) -> tuple[float, Number]:
    wire = wire_factor(kind, curve.group) * nbytes
    return curve.alpha_s, wire / curve.bandwidth(nbytes)


def level_time(level: Level, kind: str, nbytes: Number, group: int) -> tuple[float, Number]:
    """(latency, transfer) in seconds among `group` units of one level.

    Between two measured group sizes both are interpolated in log(group). Outside them the
    bandwidth per wire byte stays and the latency grows (or shrinks) with log2(group).
    """
    curves = level.collectives[kind]
    below = max((c for c in curves if c.group <= group), key=lambda c: c.group, default=None)
    above = min((c for c in curves if c.group >= group), key=lambda c: c.group, default=None)
    if below is None or above is None:
        near = above or below
        assert near is not None  # a profile has at least one curve per kind
        alpha, transfer = _curve_time(near, kind, nbytes)
        scale = math.log2(group) / math.log2(near.group)
        return alpha * scale, transfer * (wire_factor(kind, group) / wire_factor(kind, near.group))
    alpha0, transfer0 = _curve_time(below, kind, nbytes)
    if below is above:
        return alpha0, transfer0
    alpha1, transfer1 = _curve_time(above, kind, nbytes)
    part = math.log(group / below.group) / math.log(above.group / below.group)
    return alpha0 + part * (alpha1 - alpha0), transfer0 + part * (transfer1 - transfer0)


def collective_time(cluster: Cluster, kind: str, nbytes: Number, span: tuple[int, ...]) -> Number:
    """Seconds of one collective; `nbytes` a number or an array, by the convention of its kind.

    `span` is the group's members per level, from `cluster.group_span(cluster, mesh, axes)`:
    `(4,)` inside a host, `(8, 2)` over two hosts. A group of one member takes no time.
    """
    crossed = [i for i, members in enumerate(span) if members > 1]
    latency = 0.0
    transfer: Number = 0.0
    inner = 1
    for i in crossed:
        members = span[i]
        if kind == "all_to_all":
            share = nbytes / math.prod(span[i + 1 :])
        elif kind == "broadcast":
            share = nbytes
        else:
            share = nbytes / inner
        alpha, part = level_time(cluster.levels[i], kind, share, members)
        latency += alpha
        transfer = transfer + part if cluster.levels_in_turn else np.maximum(transfer, part)
        inner *= members
    if not crossed:
        return nbytes * 0.0
    return latency + transfer


def collective_bytes(kind: str | None, whole_bytes: Number, group: int) -> Number:
    """`nbytes` of a collective on a tensor of `whole_bytes` as its group sees it whole."""
    if kind is None:
        return whole_bytes * 0.0
    return whole_bytes / group if kind == "all_to_all" else whole_bytes


def reshard_time(
    cluster: Cluster, collective: Collective, whole_bytes: Number, span: tuple[int, ...]
) -> tuple[Number, Number]:
    """(forward, backward) seconds of a lowered collective.

    `whole_bytes` are the bytes of the tensor *as the group sees it whole*: the local bytes if it
    were replicated along the group's axes, still divided by every other axis that splits it. The
    gradient is taken to have the value's dtype.
    """
    group = math.prod(span)

    def time(kind: str | None) -> Number:
        if kind is None:
            return whole_bytes * 0.0
        return collective_time(cluster, kind, collective_bytes(kind, whole_bytes, group), span)

    return time(collective.forward), time(collective.backward)


def wire_bytes(kind: str | None, whole_bytes: Number, group: int) -> Number:
    """Bytes that one member sends for a collective (0 for None): what reports add up per step."""
    if kind is None or group == 1:
        return whole_bytes * 0.0
    return wire_factor(kind, group) * collective_bytes(kind, whole_bytes, group)
