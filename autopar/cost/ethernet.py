"""What an Ethernet link between hosts carries, where nobody has measured it."""

from __future__ import annotations

from .cluster import COLLECTIVE_KINDS, CollectiveCurve, Level
from .curve import Curve

BITS_PER_S = 1e9  # the slowest that is common between servers: no plan is worse for a faster one
# A frame of 1500 bytes takes 1538 on the wire (IEEE 802.3: preamble, header, checksum, gap), of
# which TCP over IPv4 with time stamps leaves 1448.
PAYLOAD = 1448 / 1538
# Of a small all-reduce between two hosts of gloo ranks over TCP; `autopar calibrate --nnodes 2`.
ALPHA_S = 1e-3


def ethernet(per_host: int, hosts: int, bits_per_s: float = BITS_PER_S) -> Level:
    """A network of `hosts` hosts, of which the ranks of each share one link.

    Groups have a rank of every host, and all of a host's ranks communicate at once.
    """
    source = f"assumed: Ethernet of {bits_per_s / 1e9:g} Gbit/s, shared by {per_host} ranks"
    each = Curve.constant(bits_per_s / 8 * PAYLOAD / per_host, source)
    curve = CollectiveCurve(2, ALPHA_S, each)
    return Level("network", per_host * hosts, dict.fromkeys(COLLECTIVE_KINDS, (curve,)))
