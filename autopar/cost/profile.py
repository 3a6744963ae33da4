"""Cluster profiles as JSON: every number with its source, strict on load, written atomically.

Layout (version 1): numbers are `{"value": 1.0, "source": "..."}`, curves
`{"points": [[x, y], ...], "source": "..."}`::

    {"version": 1, "name": "8xH100",
     "device": {"name": "H100", "memory_bytes": number, "op_overhead_s": number,
                "optimizer_overhead_s", "serial_traffic", "overlap_slowdown": numbers, or absent: 0,
                "rates": {family: {dtype: curve}}, "narrow": curve, "bandwidth": {family: curve}},
     "single": device or null,
     "levels": [{"name": "host", "size": 8,
                 "collectives": {kind: [{"group": 8, "alpha_s": number, "bandwidth": curve}]}}]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from autopar.errors import UserError
from autopar.files import replace_file

from .cluster import COLLECTIVE_KINDS, Cluster, CollectiveCurve, Device, Level
from .curve import Curve

VERSION = 1
# Of a device; 0 where a profile has none.
OPTIONAL_FIGURES = ("optimizer_overhead_s", "serial_traffic", "overlap_slowdown")
T = TypeVar("T")


class _MalformedError(Exception):
    """What is wrong, with the path inside the document."""


def cluster_to_json(cluster: Cluster) -> dict[str, Any]:
    """The document of a cluster; `cluster_from_json` is its inverse."""
    return {
        "version": VERSION,
        "name": cluster.name,
        "device": _device_to_json(cluster.device),
        "single": None if cluster.single is None else _device_to_json(cluster.single),
        "levels": [
            {
                "name": level.name,
                "size": level.size,
                "collectives": {
                    kind: [
                        {
                            "group": c.group,
                            "alpha_s": {"value": c.alpha_s, "source": c.bandwidth.source},
                            "bandwidth": _curve_to_json(c.bandwidth),
                        }
                        for c in curves
                    ]
                    for kind, curves in level.collectives.items()
                },
            }
            for level in cluster.levels
        ],
    }


def _curve_to_json(curve: Curve) -> dict[str, Any]:
    return {"points": [list(p) for p in curve.points], "source": curve.source}


def _device_to_json(device: Device) -> dict[str, Any]:
    def number(name: str) -> dict[str, Any]:
        return {"value": getattr(device, name), "source": device.sources.get(name, "")}

    def table(curves: Mapping[str, Curve]) -> dict[str, Any]:
        return {key: _curve_to_json(curve) for key, curve in curves.items()}

    optional = {name: number(name) for name in OPTIONAL_FIGURES if getattr(device, name)}
    return {
        "name": device.name,
        "memory_bytes": number("memory_bytes"),
        "op_overhead_s": number("op_overhead_s"),
        **optional,
        "rates": {family: table(curves) for family, curves in device.rates.items()},
        "narrow": _curve_to_json(device.narrow),
        "bandwidth": table(device.bandwidth),
    }


def _fields(
    data: object, where: str, names: Iterable[str], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _MalformedError(f"{where} is not an object")
    wanted = list(names)
    for name in wanted:
        if name not in data:
            raise _MalformedError(f"{where} has no {name!r}")
    for name in data:
        if name not in wanted and name not in optional:
            raise _MalformedError(f"{where} has an unknown entry {name!r}")
    return data


def _positive(data: object, where: str) -> float:
    number = isinstance(data, (int, float)) and not isinstance(data, bool)
    if not number or not math.isfinite(data) or data <= 0:  # type: ignore[arg-type,operator]
        raise _MalformedError(f"{where} is {data!r}, not a positive number")
    return float(data)  # type: ignore[arg-type]


def _count(data: object, where: str) -> int:
    if not isinstance(data, int) or isinstance(data, bool) or data < 1:
        raise _MalformedError(f"{where} is {data!r}, not a positive whole number")
    return data


def _text(data: object, where: str) -> str:
    if not isinstance(data, str):
        raise _MalformedError(f"{where} is {data!r}, not a text")
    return data


def _fact(data: object, where: str) -> tuple[float, str]:
    fields = _fields(data, where, ("value", "source"))
    return _positive(fields["value"], f"{where}.value"), _text(fields["source"], f"{where}.source")


def _curve(data: object, where: str) -> Curve:
    fields = _fields(data, where, ("points", "source"))
    points = fields["points"]
    if not isinstance(points, list) or not points:
        raise _MalformedError(f"{where}.points is not a list of [x, y] pairs")
    read: list[tuple[float, float]] = []
    for i, point in enumerate(points):
        if not isinstance(point, list) or len(point) != 2:
            raise _MalformedError(f"{where}.points[{i}] is {point!r}, not a pair [x, y]")
        x, y = (_positive(v, f"{where}.points[{i}]") for v in point)
        if read and x <= read[-1][0]:
            raise _MalformedError(f"{where}.points are not in ascending order at index {i}")
        read.append((x, y))
    return Curve(tuple(read), _text(fields["source"], f"{where}.source"))


def _table(data: object, where: str, read: Callable[[object, str], T]) -> dict[str, T]:
    if not isinstance(data, dict):
        raise _MalformedError(f"{where} is not an object")
    return {str(key): read(item, f"{where}.{key}") for key, item in data.items()}


def _device(data: object, where: str) -> Device:
    names = ("name", "memory_bytes", "op_overhead_s", "rates", "narrow", "bandwidth")
    fields = _fields(data, where, names, OPTIONAL_FIGURES)
    memory, memory_source = _fact(fields["memory_bytes"], f"{where}.memory_bytes")
    overhead, overhead_source = _fact(fields["op_overhead_s"], f"{where}.op_overhead_s")
    given = [name for name in OPTIONAL_FIGURES if name in fields]
    optional = {name: _fact(fields[name], f"{where}.{name}") for name in given}
    rates = _table(fields["rates"], f"{where}.rates", lambda d, at: _table(d, at, _curve))
    bandwidth = _table(fields["bandwidth"], f"{where}.bandwidth", _curve)
    if not rates.get("matmul"):
        raise _MalformedError(f"{where}.rates has no 'matmul'")
    if "default" not in bandwidth:
        raise _MalformedError(f"{where}.bandwidth has no 'default'")
    return Device(
        name=_text(fields["name"], f"{where}.name"),
        memory_bytes=memory,
        op_overhead_s=overhead,
        rates=rates,
        narrow=_curve(fields["narrow"], f"{where}.narrow"),
        bandwidth=bandwidth,
        sources={
            "memory_bytes": memory_source,
            "op_overhead_s": overhead_source,
            **{name: source for name, (_, source) in optional.items()},
        },
        **{name: value for name, (value, _) in optional.items()},
    )


def _collective(data: object, where: str) -> CollectiveCurve:
    fields = _fields(data, where, ("group", "alpha_s", "bandwidth"))
    group = _count(fields["group"], f"{where}.group")
    if group < 2:
        raise _MalformedError(f"{where}.group is {group}; a group has at least 2 members")
    alpha, _ = _fact(fields["alpha_s"], f"{where}.alpha_s")
    return CollectiveCurve(group, alpha, _curve(fields["bandwidth"], f"{where}.bandwidth"))


def _level(data: object, where: str) -> Level:
    fields = _fields(data, where, ("name", "size", "collectives"))
    tables = _fields(fields["collectives"], f"{where}.collectives", COLLECTIVE_KINDS)
    collectives: dict[str, tuple[CollectiveCurve, ...]] = {}
    for kind, entries in tables.items():
        at = f"{where}.collectives.{kind}"
        if not isinstance(entries, list) or not entries:
            raise _MalformedError(f"{at} is not a list of curves")
        curves = tuple(_collective(item, f"{at}[{i}]") for i, item in enumerate(entries))
        groups = [c.group for c in curves]
        if groups != sorted(set(groups)):
            raise _MalformedError(f"{at} is not in ascending order of group")
        collectives[kind] = curves
    return Level(
        _text(fields["name"], f"{where}.name"),
        _count(fields["size"], f"{where}.size"),
        collectives,
    )


def cluster_from_json(data: object, where: str = "profile") -> Cluster:
    """Read a document; raises UserError that names `where` and the entry at fault."""
    again = "make it again with `autopar calibrate`, or use a shipped profile"
    try:
        if not isinstance(data, dict):
            raise _MalformedError("the document is not an object")
        if "version" not in data:
            raise _MalformedError("the document has no 'version'")
        if data["version"] != VERSION:
            raise UserError(
                f"cluster profile {where} has version {data['version']!r}; "
                f"this autopar reads version {VERSION}",
                fix=again,
            )
        fields = _fields(data, "the document", ("version", "name", "device", "single", "levels"))
        levels = fields["levels"]
        if not isinstance(levels, list) or not levels:
            raise _MalformedError("levels is not a list of levels")
        read = tuple(_level(item, f"levels[{i}]") for i, item in enumerate(levels))
        for inner, outer in pairwise(read):
            if outer.size % inner.size or outer.size <= inner.size:
                raise _MalformedError(
                    f"level {outer.name!r} has {outer.size} devices, "
                    f"not a multiple of the {inner.size} of level {inner.name!r}"
                )
        return Cluster(
            _text(fields["name"], "name"),
            _device(fields["device"], "device"),
            read,
            None if fields["single"] is None else _device(fields["single"], "single"),
        )
    except _MalformedError as error:
        raise UserError(f"cluster profile {where} is malformed: {error}", fix=again) from None


def load_profile(path: Path) -> Cluster:
    """Read a profile file; raises UserError where it is missing, truncated or malformed."""
    fix = "give the path of a profile that `autopar calibrate` wrote"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise UserError(f"cannot read the cluster profile {path}: {reason}", fix=fix) from None
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        at = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"cluster profile {path} is not JSON, perhaps truncated{at}",
            fix="make it again with `autopar calibrate`, or use a shipped profile",
        ) from None
    return cluster_from_json(data, str(path))


def save_profile(cluster: Cluster, path: Path) -> None:
    """Write a profile; the file at `path` is either the old one or the whole new one."""
    text = json.dumps(cluster_to_json(cluster), indent=1) + "\n"
    replace_file(path, text)


@lru_cache(maxsize=1)
def shipped_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with autopar: `cpu-gloo`, `h100`, …"""
    folder = resources.files("autopar.profiles")
    return tuple(
        sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
    )


@lru_cache(maxsize=16)
def shipped_profile(name: str) -> Cluster:
    """A shipped profile by name; raises UserError where the name or the file is not right."""
    if name not in shipped_profiles():
        known = ", ".join(shipped_profiles())
        raise UserError(f"no cluster profile is called {name!r}", fix=f"use one of {known}")
    text = resources.files("autopar.profiles").joinpath(f"{name}.json").read_text(encoding="utf-8")
    return cluster_from_json(json.loads(text), f"{name}.json")
