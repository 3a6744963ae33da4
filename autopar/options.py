"""What a user asked of `parallelize`."""

from __future__ import annotations

from dataclasses import dataclass

from .cost.cluster import Cluster
from .passes.pipelined import Wanted
from .plan import Plan


@dataclass
class Options:
    """What the user asked of `parallelize`, parsed; `pipelines` are those that may be tried."""

    strategy: str = "auto"
    cluster: Cluster | None = None
    plan: Plan | None = None
    memory_limit: float | None = None
    optimizer: str = "adamw"
    backend: str | None = None
    checkpoint: str | None = None
    micro_batch_statistics: bool = False
    micro_batches: int | None = None
    compress: str | None = None
    kernels: str = "auto"
    pipelines: Wanted | None = None
