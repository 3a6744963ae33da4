"""What a user asked of `parallelize`."""

from __future__ import annotations

from dataclasses import dataclass

from .cost.cluster import Cluster
from .plan import Plan


@dataclass
class Options:
    """What the user asked of `parallelize`, parsed."""

    strategy: str = "auto"
    cluster: Cluster | None = None
    plan: Plan | None = None
    memory_limit: float | None = None
    optimizer: str = "adamw"
    backend: str | None = None
    checkpoint: str | None = None
    micro_batch_statistics: bool = False
