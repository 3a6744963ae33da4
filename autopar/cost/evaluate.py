"""Evaluate cost formulas for many settings at once.

A setting is a batch size, a sequence length, the sizes of the mesh axes and the bandwidth of every
level. `compiled` turns formulas into one numpy function; curves and collectives in them are those
of a cluster, priced by `compute`'s and `comm`'s own curves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from typing import Any, cast

import numpy as np
import sympy
import torch
from numpy.typing import ArrayLike, NDArray
from sympy.core.function import AppliedUndef

from autopar.errors import PassError
from autopar.ir.mesh import Axis, Mesh

from .cluster import Cluster, Device, group_span
from .comm import collective_bytes, collective_time
from .curve import Curve
from .formula import BUCKETED, axis_size

Array = NDArray[np.float64]
CHUNK = 8192  # settings at a time: what fits in a core's cache with a block's intermediate results


@dataclass(frozen=True)
class Settings:
    """Where to evaluate: numbers, or arrays of one length.

    `sizes` maps a captured symbol's name to its size, `axes` the mesh axes, outermost first, to
    theirs, `bandwidth` the name of a level of the cluster to a factor on what its links carry.
    """

    sizes: Mapping[str, ArrayLike]
    axes: Mapping[str, ArrayLike]
    bandwidth: Mapping[str, ArrayLike] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of settings."""
        given = (*self.sizes.values(), *self.axes.values(), *self.bandwidth.values())
        return max((np.size(value) for value in given), default=1)

    def chunk(self, start: int, stop: int) -> Settings:
        """Some of the settings, every number as an array of floats where it varies."""

        def part(values: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
            found: dict[str, ArrayLike] = {}
            for name, value in values.items():
                array = np.asarray(value, dtype=np.float64).reshape(-1)
                found[name] = float(array[0]) if array.size == 1 else array[start:stop]
            return found

        return Settings(part(self.sizes), part(self.axes), part(self.bandwidth))


class Compiled:
    """Formulas as one vectorised function for a cluster; make it with `compiled`."""

    def __init__(
        self, formulas: Sequence[sympy.Expr], cluster: Cluster, bucket_bytes: float
    ) -> None:
        self.cluster = cluster
        self.bucket_bytes = bucket_bytes
        self._formulas = list(formulas)
        free: set[sympy.Symbol] = set().union(*(f.free_symbols for f in self._formulas), set())
        self._symbols = sorted(free, key=str)
        self._function = lru_cache(maxsize=2)(self._compile)

    def __call__(self, settings: Settings) -> Array:
        """Values, [number of formulas, number of settings]."""
        n = settings.length
        made = np.empty((len(self._formulas), n))
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            made[:, start:stop] = self._chunk(settings.chunk(start, stop), stop - start)
        return made

    def _chunk(self, settings: Settings, n: int) -> Array:
        rows = np.prod([np.broadcast_to(v, n) for v in settings.axes.values()], axis=0)
        alone = np.broadcast_to(rows == 1, n)
        if self.cluster.single is None or not alone.any():
            return self._evaluate(settings, n, self.cluster.device)
        made = np.empty((len(self._formulas), n))
        for some, device in ((alone, self.cluster.single), (~alone, self.cluster.device)):
            if some.any():
                made[:, some] = self._evaluate(_rows(settings, some, n), int(some.sum()), device)
        return made

    def _evaluate(self, settings: Settings, n: int, device: Device) -> Array:
        known: dict[str, Any] = dict(settings.sizes)
        known |= {axis_size(axis).name: size for axis, size in settings.axes.items()}
        groups = _groups(self.cluster, settings, n)
        values = []
        for symbol in self._symbols:
            if symbol.name in groups:
                values.append(groups[symbol.name])
            elif symbol.name in known:
                values.append(known[symbol.name])
            elif hasattr(device, symbol.name):
                values.append(getattr(device, symbol.name))
            else:
                raise PassError("evaluate", "sizes_given", f"{symbol} has no value")
        results = self._function(device.name)(*values)
        return np.stack([np.broadcast_to(np.asarray(r, dtype=np.float64), n) for r in results])

    def _compile(self, device_name: str) -> Callable[..., Sequence[Any]]:
        single = self.cluster.single
        device = self.cluster.device
        if single is not None and device_name == single.name != device.name:
            device = single
        shared = _shared_curves(self._formulas, device)
        namespace = _namespace(shared, device, self.bucket_bytes)
        made = sympy.lambdify(self._symbols, shared, modules=[namespace, "numpy"], cse=True)
        return cast(Callable[..., Sequence[Any]], made)


def compiled(
    formulas: Sequence[sympy.Expr], cluster: Cluster, bucket_bytes: float = 0.0
) -> Compiled:
    """Formulas as one function of `Settings`; equal parts of them are computed once.

    `bucket_bytes`: messages of parameters smaller than this pay their share of such a bucket.
    """
    return Compiled(formulas, cluster, bucket_bytes)


def with_bandwidth(cluster: Cluster, factors: Mapping[str, Any]) -> Cluster:
    """The cluster with what the links of some levels carry multiplied; latencies stay."""
    if not factors:
        return cluster
    levels = []
    for level in cluster.levels:
        factor = factors.get(level.name, 1.0)
        made = {
            kind: tuple(replace(c, bandwidth=_scaled(c.bandwidth, factor)) for c in curves)
            for kind, curves in level.collectives.items()
        }
        levels.append(replace(level, collectives=made))
    return replace(cluster, levels=tuple(levels))


def _scaled(curve: Curve, factor: Any) -> Curve:
    if np.ndim(factor) == 0:
        return curve.scaled(float(factor))
    return cast(Curve, _ScaledCurve(curve, factor))


@dataclass(frozen=True)
class _ScaledCurve:
    """A curve times one factor per setting."""

    curve: Curve
    factor: Array

    def __call__(self, x: Any) -> Any:
        return self.curve(x) * self.factor


class _Groups:
    """The groups along one mesh axis in every setting: spans, each with its settings."""

    def __init__(
        self,
        clusters: Sequence[Cluster],
        spans: Sequence[tuple[int, ...]],
        rows: Sequence[NDArray[np.intp]],
        n: int,
    ) -> None:
        self.clusters, self.spans, self.rows, self.n = clusters, spans, rows, n

    def time(self, kind: str, whole: Any) -> Any:
        """Seconds of a collective on tensors of `whole` bytes."""
        if len(self.spans) == 1:
            return _time(self.clusters[0], kind, whole, self.spans[0])
        made = np.empty(self.n)
        for cluster, span, rows in zip(self.clusters, self.spans, self.rows, strict=True):
            some = whole if np.ndim(whole) == 0 else whole[rows]
            made[rows] = _time(cluster, kind, some, span)
        return made


def _time(cluster: Cluster, kind: str, whole: Any, span: tuple[int, ...]) -> Any:
    group = int(np.prod(span))
    return collective_time(cluster, kind, collective_bytes(kind, whole, group), span)


def _groups(cluster: Cluster, settings: Settings, n: int) -> dict[str, _Groups]:
    """Per axis, the settings by the span of its groups."""
    names = tuple(settings.axes)
    if not names:
        return {}
    varies = any(np.ndim(v) for v in settings.axes.values())
    columns = np.stack(
        [np.broadcast_to(v, n if varies else 1).astype(np.int64) for v in settings.axes.values()]
    )
    # One number per mesh: far cheaper to sort than rows.
    code = np.zeros(columns.shape[1], dtype=np.int64)
    for column in columns:
        code = code * (int(column.max()) + 1) + column
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    made: dict[str, _Groups] = {}
    for name in names:
        members: dict[tuple[int, ...], list[int]] = {}
        for i, at in enumerate(first):
            sizes = columns[:, at]
            mesh = Mesh(tuple(Axis(a, int(k)) for a, k in zip(names, sizes, strict=True)))
            members.setdefault(group_span(cluster, mesh, (name,)), []).append(i)
        rows = [np.flatnonzero(np.isin(inverse, which)) for which in members.values()]
        scaled = [
            with_bandwidth(cluster, _picked(settings.bandwidth, some, len(members) > 1))
            for some in rows
        ]
        made[name] = _Groups(scaled, list(members), rows, n)
    return made


def _picked(
    values: Mapping[str, ArrayLike], rows: NDArray[np.intp], pick: bool
) -> dict[str, ArrayLike]:
    return {
        name: np.asarray(value)[rows] if pick and np.ndim(value) else value
        for name, value in values.items()
    }


def _rows(settings: Settings, some: NDArray[np.bool_], n: int) -> Settings:
    rows = np.flatnonzero(np.broadcast_to(some, n))
    return Settings(
        _picked(settings.sizes, rows, True),
        _picked(settings.axes, rows, True),
        _picked(settings.bandwidth, rows, True),
    )


# ---------------------------------------------------------------------------------------------
# Named functions


def _namespace(
    formulas: Sequence[sympy.Expr], device: Device, bucket_bytes: float
) -> dict[str, Callable[..., Any]]:
    """What every named function of the formulas computes."""
    made: dict[str, Callable[..., Any]] = {}
    for formula in formulas:
        for function in formula.atoms(AppliedUndef):
            name = function.func.__name__
            if name not in made:
                made[name] = _function(name, device, bucket_bytes)
    return made


def _function(name: str, device: Device, bucket_bytes: float) -> Callable[..., Any]:
    simple: Mapping[str, Callable[..., Any]] = {
        "ceil": np.ceil,
        "max": lambda *of: reduce(np.maximum, of),
        "min": lambda *of: reduce(np.minimum, of),
    }
    if name in simple:
        return simple[name]
    curve = _curve(name, device)
    if curve is not None:
        return curve
    if name.endswith(BUCKETED):
        return _bucketed(name.removesuffix(BUCKETED), bucket_bytes)
    return lambda whole, group: group.time(name, whole)


def _bucketed(kind: str, bucket_bytes: float) -> Callable[..., Any]:
    def time(whole: Any, group: _Groups) -> Any:
        if np.ndim(whole) == 0 and whole >= bucket_bytes:
            return group.time(kind, whole)
        share = np.minimum(whole / bucket_bytes, 1.0)
        return group.time(kind, np.maximum(whole, bucket_bytes)) * share

    return time


def _curve(name: str, device: Device) -> Callable[..., Any] | None:
    """The device's curve that a function stands for, or None if it is not one."""
    kind, _, rest = name.partition("_")
    if kind == "bandwidth":
        return device.bandwidth_curve(rest)
    if kind == "rate":
        words = rest.split("_")
        for at in range(1, len(words)):
            dtype = "_".join(words[at:])
            if isinstance(getattr(torch, dtype, None), torch.dtype):
                return device.rate_curve(dtype, "_".join(words[:at]))
    figure = getattr(device, name, None)
    return figure if isinstance(figure, Curve) else None


def _shared_curves(formulas: Sequence[sympy.Expr], device: Device) -> list[sympy.Expr]:
    """Call curves that the device does not tell apart by one name, so that cse finds them."""
    first: dict[Curve, Any] = {}
    renamed: dict[Any, Any] = {}
    functions = {f.func for g in formulas for f in g.atoms(AppliedUndef)}
    for function in sorted(functions, key=lambda f: str(f.__name__)):
        curve = _curve(function.__name__, device)
        if isinstance(curve, Curve) and first.setdefault(curve, function) is not function:
            renamed[function] = first[curve]
    if not renamed:
        return list(formulas)
    return [
        f.replace(lambda e: getattr(e, "func", None) in renamed, lambda e: renamed[e.func](*e.args))
        for f in formulas
    ]
