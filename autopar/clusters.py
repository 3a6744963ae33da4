"""The cluster that a run plans for: given, named by the environment, or a shipped profile."""

from __future__ import annotations

import json
import os
import warnings

import torch
import torch.distributed as dist

from .cost.cluster import Cluster, parse_cluster
from .cost.profile import cluster_from_json, cluster_to_json
from .errors import ShardingWarning, UserError
from .runtime import agree
from .runtime.hosts import ranks_per_host


def cluster_of_run(device_type: str, given: Cluster | None) -> Cluster:
    """The cluster of all ranks; collective. Hosts plan for rank 0's, whatever they have themselves.

    Raises UserError where hosts have different numbers of ranks, or where there is no profile.
    """
    size, inside = dist.get_world_size(), ranks_per_host()
    if inside == size:
        return given or default_cluster(device_type, size)
    text = None
    if dist.get_rank() == 0:
        try:
            found = given or default_cluster(device_type, inside, size // inside)
            text = json.dumps({"cluster": cluster_to_json(found)})
            _warn_of_guesses(found, inside, size // inside)
        except UserError as error:
            text = json.dumps({"error": [error.what, error.where, error.fix]})
    answer = json.loads(agree.from_rank_zero(text))
    if "error" in answer:
        what, where, fix = answer["error"]
        raise UserError(what, where=where, fix=fix)
    return cluster_from_json(answer["cluster"], "of rank 0")


def default_cluster(device_type: str, per_host: int, hosts: int = 1) -> Cluster:
    """The cluster to plan for: `AUTOPAR_CLUSTER` (a path or a spec), else the shipped profile.

    The shipped one is that of this kind of device, with `per_host` of them in each host.
    """
    named = os.environ.get("AUTOPAR_CLUSTER")
    if named:
        return parse_cluster(named)
    several = f"{hosts}x" if hosts > 1 else ""
    if device_type == "cpu":
        return parse_cluster(f"{several}cpu:{per_host}")
    name = torch.cuda.get_device_name()
    for known in ("H100", "H200", "B200", "A100", "V100", "MI300X"):
        if known in name.upper():
            return parse_cluster(f"{several}{per_host}x{known}")
    raise UserError(
        f"there is no profile of {name!r}",
        fix="make one with `autopar calibrate`, and pass it as cluster=",
    )


def _warn_of_guesses(cluster: Cluster, inside: int, hosts: int) -> None:
    """Say where the cluster is not known to be the one that the ranks run on."""
    message = ""
    if cluster.size == inside * hosts and len(cluster.levels) > 1 and cluster.host_size != inside:
        message = (
            f"the cluster {cluster.name} has {cluster.host_size} ranks on a host, and this run has "
            f"{inside} on each of {hosts}"
        )
    elif cluster.size == inside * hosts and len(cluster.levels) == 1 and inside > 1:
        message = f"the cluster {cluster.name} is one host, and this run has {hosts}"
    else:
        curves = next(iter(cluster.levels[-1].collectives.values()))
        if curves[0].bandwidth.source.startswith("assumed"):
            message = f"the network is {curves[0].bandwidth.source}"
    if message:
        command = f"autopar calibrate --nnodes {hosts} --nproc {inside}"
        warnings.warn(
            f"{message}: measure it with `{command}` on every host, and name the profile in "
            "AUTOPAR_CLUSTER",
            ShardingWarning,
            stacklevel=4,
        )
