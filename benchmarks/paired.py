"""Ratios of two things that were timed in turns: what the machine did meanwhile hit both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Median over turns of a ratio, and an interval that holds the true one in 95 of 100 cases."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def paired_ratio(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Ratio:
    """Seconds of `a` over those of `b`, turn by turn, each with the times of its steps.

    The interval is that of the sign test: order statistics of the turns' ratios, all of them where
    there are too few turns (below six) for the confidence. Raises ValueError where turns are
    missing.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} turns do not pair")
    ratios = sorted(
        statistics.median(mine) / statistics.median(theirs)
        for mine, theirs in zip(a, b, strict=True)
    )
    skip = _outside(len(ratios))
    return Ratio(statistics.median(ratios), ratios[skip], ratios[-1 - skip])


def _outside(n: int) -> int:
    """How many of n ordered ratios may be left out at either end."""
    below, k = 0.5**n, 0
    while k + 1 <= (n - 1) // 2 and 2 * below <= 1 - CONFIDENCE:
        k += 1
        below += math.comb(n, k) * 0.5**n
    return k if 2 * below <= 1 - CONFIDENCE else max(k - 1, 0)
