"""How a step is run, and the prices of a programme's columns on some meshes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .accounts import NONE

Array = NDArray[np.float64]

ILLEGAL_S = 1e6  # seconds: what no step takes


@dataclass(frozen=True)
class Variant:
    """How a step is run: micro-batches, and what repeated blocks recompute.

    `in_flight` is how many micro-batches' activations are kept at once (a pipeline's).
    """

    micro_batches: int = 1
    mode: str = NONE
    in_flight: int = 1


@dataclass(frozen=True)
class Prices:
    """Prices of columns, [columns, meshes]: seconds that block, overlap, or hide that; bytes."""

    cost: Array
    late: Array
    hides: Array
    memory: Array

    def weighed(self, at: int | slice, late: float, memory: float) -> Array:
        """Lagrangian costs with a weight of the exposed time and one per byte."""
        made = self.cost[:, at] + late * (self.late[:, at] - self.hides[:, at])
        return made + memory * self.memory[:, at] if memory else made
