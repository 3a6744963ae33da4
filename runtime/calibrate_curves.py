"""From the timings of `autopar calibrate` to the curves of a cluster profile.

Samples are (key, x, seconds) as `calibrate_ops` and `calibrate_collectives` name them. The times of
a device are those of its last rank: the mean of the ranks times `1 + skew`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from autopar.cost.cluster import CollectiveCurve, Device
from autopar.cost.comm import fit_collective
from autopar.cost.curve import Curve

from .calibrate_collectives import Sample

WIDE = 128  # the narrowest dim of the products that give the rates
_RATES = ("matmul", "conv", "conv_backward", "attention", "attention_backward")


def skew_of(samples: Iterable[Sample]) -> float:
    """How much longer the last rank computes than the mean, as a fraction; 0 where unknown."""
    return statistics.fmean([t for key, _, t in samples if key == "skew"] or [0.0])


def device_from_samples(
    name: str, samples: Sequence[Sample], memory_bytes: float, source: str
) -> Device:
    """Curves of one device from timings; the op overhead is taken out of every one of them."""
    skew = skew_of(samples)
    slow = [(k, x, t * (1.0 + skew)) for k, x, t in samples if not k.startswith(_NOT_OPS)]
    overhead = min((t for key, _, t in slow if key == "overhead"), default=1e-6)
    optimizer = max((t for key, _, t in slow if key == "optimizer"), default=0.0)
    by_family: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for key, x, seconds in slow:
        family, _, rest = key.partition(":")
        by_family[family].append((rest, x, max(seconds - overhead, 0.2 * seconds)))
    if skew > 0:
        source += f"; times of the last rank, {1.0 + skew:.3f} x the mean"
    bandwidth = _bandwidths(by_family, source)
    products = _Products(by_family, bandwidth["matmul"], source)
    rates = {family: _by_dtype(by_family[family], source) for family in _RATES[1:]}
    return Device(
        name,
        memory_bytes,
        overhead,
        {"matmul": products.rates, **{family: t for family, t in rates.items() if t}},
        bandwidth,
        products.narrow,
        optimizer,
        products.serial,
        statistics.fmean([t for key, _, t in samples if key == "slowdown"] or [0.0]),
        sources=dict.fromkeys(_SOURCED, source),
    )


_NOT_OPS = ("collective:", "network:", "skew", "slowdown")
_SOURCED = (
    "memory_bytes",
    "op_overhead_s",
    "optimizer_overhead_s",
    "serial_traffic",
    "overlap_slowdown",
)


def _by_dtype(samples: Iterable[tuple[str, float, float]], source: str) -> dict[str, Curve]:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for dtype, x, seconds in samples:
        points[dtype].append((x, x / seconds))
    return {dtype: Curve.of(found, source) for dtype, found in points.items()}


def _bandwidths(
    samples: Mapping[str, Sequence[tuple[str, float, float]]], source: str
) -> dict[str, Curve]:
    """Bandwidth per op family; that of products from skinny ones, whose arithmetic is little."""
    made = _by_dtype(samples["bandwidth"], source)
    best = max((x / t for rest, x, t in samples["matmul"] if rest.startswith("float32")), default=0)
    points = []
    for rest, flops, seconds in samples.get("skinny", ()):
        moved = float(rest.partition("@")[2])
        points.append((moved, moved / max(seconds - flops / best, 0.5 * seconds)))
    return {
        **made,
        "default": made["pointwise"],
        "matmul": Curve.of(points, source) if points else made["pointwise"],
    }


class _Products:
    """Rates of matrix products, what a narrow dim costs, and how much of their traffic is seen.

    A product takes the longer of arithmetic and traffic and `serial` of the shorter one.
    """

    def __init__(
        self,
        samples: Mapping[str, Sequence[tuple[str, float, float]]],
        bandwidth: Curve,
        source: str,
    ) -> None:
        self._bandwidth, self._source = bandwidth, source
        self.serial: float = 1.0
        self.rates = self._rates(samples["matmul"])
        mixed = samples.get("mixed", ())
        self.serial = self._serial(mixed) if mixed else 0.0
        self.rates = self._rates(samples["matmul"])
        self.narrow = self._narrow(samples.get("narrow", ()))

    def _traffic_s(self, rest: str) -> tuple[str, float]:
        name, _, moved = rest.partition("@")
        return name, float(moved) / float(self._bandwidth(float(moved))) if moved else 0.0

    def _arithmetic_s(self, seconds: float, traffic_s: float) -> float:
        """What is left of a product's time for its arithmetic."""
        rest = seconds - self.serial * traffic_s
        if rest < traffic_s and self.serial > 0:  # traffic is the longer of the two
            rest = (seconds - traffic_s) / self.serial
        return max(rest, 0.2 * seconds)

    def _rates(self, samples: Iterable[tuple[str, float, float]]) -> dict[str, Curve]:
        points = []
        for rest, flops, seconds in samples:
            name, traffic_s = self._traffic_s(rest)
            points.append((name, flops, self._arithmetic_s(seconds, traffic_s)))
        return _by_dtype(points, self._source)

    def _serial(self, samples: Iterable[tuple[str, float, float]]) -> float:
        found = []
        for rest, flops, seconds in samples:
            _, traffic_s = self._traffic_s(rest)
            arithmetic_s = flops / float(self.rates["float32"](flops))
            longer, shorter = max(traffic_s, arithmetic_s), min(traffic_s, arithmetic_s)
            found.append((seconds - longer) / shorter)
        return float(min(max(statistics.median(found), 0.0), 1.0))

    def _narrow(self, samples: Iterable[tuple[str, float, float]]) -> Curve:
        """Smallest dim -> mean fraction (over which dim is narrow) of the rate of as many flops.

        Not above 1, never falling as the dim grows, and 1 from `WIDE` on.
        """
        fractions: dict[int, list[float]] = defaultdict(list)
        for rest, flops, seconds in samples:
            size, traffic_s = self._traffic_s(rest)
            rate = flops / self._arithmetic_s(seconds, traffic_s)
            fractions[int(size)].append(rate / self.rates["float32"](flops))
        points: list[tuple[float, float]] = []
        best = 0.0
        for smallest, found in sorted(fractions.items()):
            best = min(1.0, max(best, statistics.fmean(found)))
            points.append((float(smallest), best if smallest < WIDE else 1.0))
        return Curve.of([*points, (WIDE, 1.0)], self._source)


def collectives_from_samples(
    samples: Sequence[Sample], source: str, level: str = "collective"
) -> dict[str, tuple[CollectiveCurve, ...]]:
    """Curves per collective, by group size; `level`: "collective" in a host, "network" across."""
    times: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for key, x, seconds in samples:
        if key.startswith(f"{level}:"):
            _, kind, members = key.split(":")
            times[kind, int(members)].append((x, seconds))
    made: dict[str, list[CollectiveCurve]] = defaultdict(list)
    for (kind, group), points in sorted(times.items()):
        made[kind].append(fit_collective(kind, group, points, source))
    return {kind: tuple(curves) for kind, curves in made.items()}
