"""One rank of `autopar calibrate`: times ops and collectives while every other rank does the same.

Run as `python -m autopar.runtime.calibrate_worker JOB.json`; `calibrate` writes the job and reads
the standard output of each host's first rank, one JSON object per line: progress, then the results.
Everything is timed in several rounds, each of which goes through all of it, so that a burst of
foreign load or of a busy host spoils few of the medians that are compared.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from .calibrate_clock import Clock
from .calibrate_collectives import (
    KB,
    MB,
    Sample,
    Team,
    make_teams,
    run_collectives,
    run_network,
    run_skew,
    run_slowdown,
)
from .calibrate_ops import PARAMETERS, compute_work, optimizer_work
from .load_clock import LoadClock
from .optimizer import local_steps
from .shared_memory import make_group

SECONDS = {False: 0.015, True: 0.01}  # per callable and round, by `quick`
WINDOWS = 8  # of each length and round in which the ranks' skew is measured


def collective_sizes(quick: bool) -> list[int]:
    """Bytes at which collectives are timed."""
    if quick:
        return [KB, 128 * KB, 2 * MB, 16 * MB, 64 * MB]
    return [KB, 16 * KB, 128 * KB, 512 * KB, 2 * MB, 8 * MB, 16 * MB, 32 * MB, 64 * MB]


def tiny_parameters(nproc: int) -> list[Tensor]:
    """Parameters of an optimizer as the runtime keeps them: DTensors where there are ranks."""
    parts = [torch.ones(8) for _ in range(PARAMETERS)]
    if nproc == 1:
        return [nn.Parameter(x) for x in parts]
    mesh = init_device_mesh("cpu", (nproc,))
    return [
        nn.Parameter(DTensor.from_local(x, mesh, [Replicate()], run_check=False)) for x in parts
    ]


def measure(
    clock: Clock,
    teams: tuple[dict[int, Team], dict[int, Team]],
    parameters: Sequence[Tensor],
    quick: bool,
) -> list[Sample]:
    """One round: (key, flops or bytes, seconds) of everything."""
    found: list[Sample] = []

    def skew() -> None:
        if clock.ranks > 1:
            clock.report("skew of the ranks")
            found.extend(run_skew(make_group(), WINDOWS))

    skew()
    for source in (compute_work(quick), optimizer_work(parameters)):
        for work in source:
            clock.report(work.key.removeprefix("bandwidth:"))
            seconds = clock(work.fn, work.hot, work.nbytes)
            found.append((work.key, work.x, seconds / work.times))
    skew()
    within, across = teams
    found += run_collectives(clock, within, collective_sizes(quick))
    found += run_network(clock, across, collective_sizes(quick))
    if across:
        clock.report("compute beside the network")
        found += run_slowdown(across[max(across)])
    skew()
    return found


def middle_of(rounds: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Per sample the median over rounds, then (collectives are the same) over ranks."""
    # Sizes across hosts go up to what took too long in that round.
    common = set.intersection(*({(k, x) for k, x, _ in found} for found in rounds))
    common |= {(k, x) for k, x, _ in rounds[0] if k == "slowdown"}
    rounds = [
        [s for s in found if (s[0], s[1]) in common or s[0] == "slowdown"] for found in rounds
    ]
    times = torch.tensor([[s for _, _, s in found] for found in rounds], dtype=torch.float64)
    middle = times.quantile(0.5, dim=0)
    if dist.is_initialized():
        every = [torch.empty_like(middle) for _ in range(dist.get_world_size())]
        dist.all_gather(every, middle)
        middle = torch.stack(every).quantile(0.5, dim=0)
    return [(k, x, t) for (k, x, _), t in zip(rounds[0], middle.tolist(), strict=True)]


def first_line(error: Exception) -> str:
    """What an error says, without what follows for developers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(path: str) -> None:
    """Run one rank's job and, on rank 0, print the medians."""
    job = json.loads(Path(path).read_text())
    rank, nproc, quick, rounds = job["rank"], job["nproc"], job["quick"], job["rounds"]
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    torch.manual_seed(rank)

    def reporter(number: int) -> Callable[[str], None]:
        def report(what: str) -> None:
            if rank % job["inside"] == 0:
                text = f"round {number + 1} of {rounds}: {what}"
                print(json.dumps({"progress": text}), flush=True)

        return report

    if nproc > 1:
        try:
            dist.init_process_group(
                "gloo",
                init_method=job["store"],
                rank=rank,
                world_size=nproc,
                timeout=timedelta(seconds=job["timeout_s"]),
            )
        except (dist.DistError, RuntimeError) as error:
            raise SystemExit(f"the ranks do not find each other: {first_line(error)}") from None
    inside: int = job["inside"]
    teams = make_teams(inside, nproc // inside) if nproc > 1 else ({}, {})
    local_steps()
    parameters = tiny_parameters(nproc)
    load = LoadClock()
    foreign, found = [], []
    for number in range(rounds):
        clock = Clock(SECONDS[quick], nproc, reporter(number))
        found.append(measure(clock, teams, parameters, quick))
        foreign.append(load.tick())
    results = middle_of(found)
    if nproc > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank % inside == 0:  # on every host
        load_share = statistics.median(foreign)
        print(json.dumps({"results": results, "foreign": load_share}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
