"""Times of the all-reduce that every rank does by itself, fused with a residual and RMSNorm.

A ring moves 2 (n - 1) / n of the message per member in 2 (n - 1) steps; one shot moves n - 1 whole
messages per member in one step. So it wins where latency rules and loses where bytes do. No
constant is ours. Every member gets something from every other one directly: the bytes take as long
as in the profile's all_to_all, and the step has the latency of an all_to_all of two members, launch
and all, since the pairs of one host do not wait for each other.
"""

from __future__ import annotations

import math

from .cluster import Cluster
from .comm import collective_time, level_time
from .kernels import ACHIEVED, launches_time

# `MAX_RANKS` and `PROGRAMS * REGION_BYTES` of `runtime.kernels.all_reduce_norm`.
MOST_RANKS = 16
MOST_BYTES = 64 << 16

# Launches of the op's backward, in torch, by how many tensors of the message's size each reads and
# writes in float32 (`runtime.all_reduce_norm`): products with the gradient, the two means, the sum.
BACKWARD_TENSORS = (2, 3, 2, 3, 1, 3, 3, 1, 3, 3, 2)


def one_shot_time_s(cluster: Cluster, nbytes: float, span: tuple[int, ...]) -> float:
    """Seconds to sum a message that every member of a group holds; infinite where it cannot.

    `nbytes` are the message's, `span` that of `autopar.cost.cluster.group_span`: members must be of
    one host, since they read each other's memory.
    """
    ranks = math.prod(span)
    if ranks == 1:
        return 0.0
    if span[0] != ranks or ranks > MOST_RANKS or nbytes > MOST_BYTES:
        return math.inf
    level = cluster.levels[0]
    latency, _ = level_time(level, "all_to_all", 2 * nbytes, 2)
    _, transfer = level_time(level, "all_to_all", ranks * nbytes, ranks)
    return latency + float(transfer)


def all_reduce_norm_times(
    cluster: Cluster, elements: float, itemsize: int, span: tuple[int, ...], trained: bool
) -> tuple[float, float]:
    """Seconds of a psum, a residual and RMSNorm in one launch, and as three ops.

    Of one message of so many elements, forward, and if `trained` backward: there RMSNorm is one
    launch of its own, the sum of two gradients another one; that of the kernel's op is in torch.
    """
    device = cluster.device
    message = elements * itemsize
    curve = device.bandwidth_curve("pointwise")
    # Into symmetric memory (2), and of what is not the peers': partial, residual, sum, result.
    local = 6 * message
    achieved = ACHIEVED.get("all_reduce_norm", 1.0)
    fused = one_shot_time_s(cluster, message, span) + local / (achieved * float(curve(local)))
    unfused = float(collective_time(cluster, "all_reduce", message, span))
    unfused += launches_time(device, [3 * message, 2 * message])
    if trained:
        fused += launches_time(device, [n * elements * 4 for n in BACKWARD_TENSORS])
        unfused += launches_time(device, [3 * message, 3 * message])
    return fused, unfused
