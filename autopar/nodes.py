"""The hosts of a run, as torchrun's options name them."""

from __future__ import annotations

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
