"""The hosts of a run, as torchrun's options name them."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class Nodes:
    """How many hosts a run has, which of them this is (None: whatever is free), where they meet.

    `host` and `port` are of the first host; `backend` is "static", or "c10d" where the hosts agree
    on their order; `run_id` is the same on all hosts.
    """

    count: int = 1
    this: int | None = 0
    host: str = ""
    port: int = 0
    backend: str = "static"
    run_id: str = "autopar"

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"


def check_nodes(
    count: int, this: int | None, endpoint: str, backend: str = "", run_id: str = "autopar"
) -> Nodes:
    """The hosts that --nnodes, --node-rank and --rdzv-endpoint describe; UserError for nonsense."""
    if count < 1:
        raise UserError(f"a run cannot have {count} hosts", fix="use --nnodes 1 or more")
    if count == 1:
        if this:
            raise UserError(f"--node-rank {this} of one host", fix="add --nnodes")
        return Nodes()
    chosen = backend or ("static" if this is not None else "c10d")
    if chosen not in ("static", "c10d"):
        raise UserError(f"unknown rendezvous {backend!r}", fix="use static or c10d")
    if chosen == "static" and this is None:
        raise UserError(
            "which host is this?",
            fix=f"give each of the {count} hosts its --node-rank, 0 to {count - 1}",
        )
    if this is not None and not 0 <= this < count:
        raise UserError(
            f"--node-rank {this} of {count} hosts", fix=f"use 0 to {count - 1}, each on one host"
        )
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"--rdzv-endpoint {endpoint!r} is no HOST:PORT"
            if endpoint
            else "several hosts need a place to meet",
            fix="give all hosts the same --rdzv-endpoint: the address of the first one and a free "
            "port on it, such as 10.0.0.1:29500",
        )
    return Nodes(count, this, host.strip("[]"), int(port), chosen, run_id)


MEET_FIX = (
    "start the same command on every host, each with its own --node-rank; the first one must be "
    "reachable at that address and port"
)


def meet(nodes: Nodes, timeout_s: float) -> None:
    """Wait on the other hosts until the first one listens, and tell gloo the way to it.

    Raises UserError where the first host does not answer in time.
    """
    if nodes.count == 1:
        return
    _await_first(nodes, timeout_s)
    found = interface_to(nodes)
    if found:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)


def _await_first(nodes: Nodes, timeout_s: float) -> None:
    if not nodes.this:
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((nodes.host, nodes.port), timeout=5).close()
            return
        except socket.gaierror as error:
            reason = f"no host is called {nodes.host!r} ({error.strerror})"
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"the first of the {nodes.count} hosts did not answer at {nodes.endpoint} in "
                f"{timeout_s:g} s: {reason}",
                fix=MEET_FIX,
            )
        time.sleep(0.2)


def first_line(error: Exception) -> str:
    """What an error of torch says, without what follows for its developers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_to(nodes: Nodes) -> str | None:
    """The network interface through which this host reaches the first one; None if unknown.

    Gloo would otherwise take the address that the host's own name has, which often is a loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((nodes.host, nodes.port))  # of a datagram: sends nothing
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:  # an interface without such an address
                    continue
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    except OSError:
        return None
    return None
