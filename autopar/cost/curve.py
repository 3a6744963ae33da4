"""Measured curves: a rate (or a fraction) as a function of size, interpolated between points."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Number = Any  # a float for scalars, a numpy array of floats for many candidates at once


@dataclass(frozen=True)
class Curve:
    """Points (x, y), x ascending, both positive; log-log linear in between, constant outside.

    `source` says where the points come from. Calling it takes a number or a numpy array.
    """

    points: tuple[tuple[float, float], ...]
    source: str = field(default="", compare=False)

    @staticmethod
    def constant(y: float, source: str = "") -> Curve:
        return Curve(((1.0, float(y)),), source)

    @staticmethod
    def of(points: Iterable[tuple[float, float]], source: str = "") -> Curve:
        """Build from unsorted points; of two with the same x the larger y stays."""
        best: dict[float, float] = {}
        for x, y in points:
            best[float(x)] = max(float(y), best.get(float(x), 0.0))
        return Curve(tuple(sorted(best.items())), source)

    @cached_property
    def _log(self) -> tuple[list[float], list[float]]:
        return [math.log(x) for x, _ in self.points], [math.log(y) for _, y in self.points]

    @property
    def peak(self) -> float:
        return max(y for _, y in self.points)

    def __call__(self, x: Number) -> Number:
        if len(self.points) == 1:
            return self.points[0][1]
        xs, ys = self._log
        if isinstance(x, np.ndarray):
            return np.exp(np.interp(np.log(np.maximum(x, 1e-9)), xs, ys))
        at = math.log(max(float(x), 1e-9))
        if at <= xs[0]:
            return self.points[0][1]
        if at >= xs[-1]:
            return self.points[-1][1]
        i = bisect_right(xs, at)
        part = (at - xs[i - 1]) / (xs[i] - xs[i - 1])
        return math.exp(ys[i - 1] + part * (ys[i] - ys[i - 1]))

    def scaled(self, factor: float) -> Curve:
        return Curve(tuple((x, y * factor) for x, y in self.points), self.source)
