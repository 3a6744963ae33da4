"""Which ranks share a host, and whether they lie as clusters are described: host after host."""

from __future__ import annotations

import os
import socket
from collections.abc import Hashable, Sequence
from itertools import groupby
from pathlib import Path

import torch.distributed as dist

from autopar.errors import UserError

HOST = "AUTOPAR_HOST"  # environment variable: the name of this host, where its own does not do


def host_identity() -> str:
    """What processes of one host have in common: `AUTOPAR_HOST`, or name, last boot, PID namespace.

    Containers of one machine can have the first two in common.
    """
    named = os.environ.get(HOST)
    if named:
        return named
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return f"{socket.gethostname()} {boot} {processes}"


def even_hosts(hosts: Sequence[Hashable]) -> int | None:
    """Members per host, where each host has equally many that follow each other; else None."""
    runs = [(host, len(list(run))) for host, run in groupby(hosts)]
    if len({host for host, _ in runs}) < len(runs) or len({n for _, n in runs}) > 1:
        return None
    return runs[0][1]


def ranks_per_host() -> int:
    """Ranks on each host of this run, on every rank; collective.

    Raises UserError on all ranks where hosts have different numbers of ranks, or where the ranks of
    a host do not follow each other.
    """
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, host_identity())
    each = even_hosts(everyone)
    if each is not None:
        return each
    count = {host: everyone.count(host) for host in dict.fromkeys(everyone)}
    told = ", ".join(f"{host.split()[0]}: {n}" for host, n in count.items())
    if len(set(count.values())) > 1:
        raise UserError(
            f"the hosts have different numbers of ranks ({told})",
            fix="start equally many on every host: --nproc-per-node of torchrun, --nproc of "
            "autopar run",
        )
    raise UserError(
        f"the ranks of a host do not follow each other ({told})",
        fix="number the ranks host by host, as torchrun does",
    )
