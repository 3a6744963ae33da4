"""Clusters: what a device computes per second and what its links carry, level by level.

A `Cluster` has one kind of `Device` and nested `Level`s: level 0 joins the devices of a host,
level 1 joins hosts. It is described by a spec (`cpu:4`, `8xH100`, `2x8xH100`) or a JSON profile
(`autopar.cost.profile`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from autopar.errors import UserError
from autopar.ir.mesh import Axis, Mesh

from .curve import Curve

COLLECTIVE_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


@dataclass(frozen=True)
class Device:
    """What one rank computes with.

    `memory_bytes`: what the plan may use at most. `op_overhead_s`: time of an op on tiny tensors
    (launch, dispatch), paid by every op that is not a view. `optimizer_overhead_s`: what the update
    of a parameter takes whatever its size. `serial_traffic`: of the memory traffic of a matrix
    product the share that its arithmetic does not hide. `overlap_slowdown`: by how much compute
    slows down while a collective runs beside it.
    `rates`: family ("matmul" always, "conv", "attention", and these + "_backward") -> dtype name ->
    flop/s as a function of the op's flops. `narrow`: the smallest of m, n, k of a matmul ->
    fraction of that rate. `bandwidth`: op family -> bytes/s as a function of bytes moved;
    "default" always exists.
    On a host whose ranks share memory all of these are measured with all ranks busy, and are those
    of the last of them, for which the others wait.
    """

    name: str
    memory_bytes: float
    op_overhead_s: float
    rates: Mapping[str, Mapping[str, Curve]] = field(hash=False)
    bandwidth: Mapping[str, Curve] = field(hash=False)
    narrow: Curve = field(default=Curve.constant(1.0), hash=False)
    optimizer_overhead_s: float = 0.0
    serial_traffic: float = 0.0
    overlap_slowdown: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    def peak(self, dtype: str) -> float:
        """Best matmul rate in flop/s."""
        return self.rate_curve(dtype).peak

    def rate_curve(self, dtype: str, family: str = "matmul") -> Curve:
        """Rate of a family and dtype, by flops.

        What was not measured falls back: `x_backward` to `x`, any family to matmul, from one
        16-bit format to the other, from any dtype to float32 (float64 to half of it).
        """
        twin = {"bfloat16": "float16", "float16": "bfloat16"}.get(dtype, dtype)
        for key in (family, family.removesuffix("_backward"), "matmul"):
            for name in (dtype, twin):
                if name in self.rates.get(key, {}):
                    return self.rates[key][name]
        table = self.rates["matmul"]
        base = table["float32"] if "float32" in table else next(iter(table.values()))
        return base.scaled(0.5) if dtype == "float64" else base

    def bandwidth_curve(self, family: str) -> Curve:
        """Bandwidth of a family; `x_backward` falls back to `x`, everything to "default"."""
        for name in (family, family.removesuffix("_backward")):
            if name in self.bandwidth:
                return self.bandwidth[name]
        return self.bandwidth["default"]


@dataclass(frozen=True)
class CollectiveCurve:
    """One collective in groups of `group` members.

    Takes `alpha_s + wire_bytes / bandwidth(tensor bytes)`; `autopar.cost.comm` defines both byte
    counts. Measured while all groups of the level communicate at once.
    """

    group: int
    alpha_s: float
    bandwidth: Curve


@dataclass(frozen=True)
class Level:
    """One level of the cluster: `size` devices can reach each other without leaving it.

    `collectives` maps each of `COLLECTIVE_KINDS` to curves by ascending group size, where the
    members of a group are units of the level below (devices at level 0, hosts at level 1).
    """

    name: str
    size: int
    collectives: Mapping[str, tuple[CollectiveCurve, ...]] = field(hash=False)


@dataclass(frozen=True)
class Cluster:
    """`levels[-1].size` devices of one kind. `single`, where it exists, is the device that *one*
    process makes of the whole host (all threads of a CPU): what a mesh of size 1 runs on.
    """

    name: str
    device: Device
    levels: tuple[Level, ...]
    single: Device | None = None

    @property
    def size(self) -> int:
        return self.levels[-1].size

    @property
    def host_size(self) -> int:
        return self.levels[0].size

    @property
    def levels_in_turn(self) -> bool:
        """Whether a collective uses one level after the other, and not all at once."""
        return self.device.name.startswith("cpu")

    def device_for(self, mesh_size: int) -> Device:
        """The device that each of `mesh_size` ranks has."""
        return self.single if mesh_size == 1 and self.single is not None else self.device

    def resized(self, per_host: int, hosts: int = 1, name: str | None = None) -> Cluster:
        """The same hardware with `hosts` hosts of `per_host` devices."""
        levels = [replace(self.levels[0], size=per_host)]
        if hosts > 1:
            levels.append(replace(self.levels[1], size=per_host * hosts))
        made = name or (f"{hosts}x" if hosts > 1 else "") + f"{per_host}x{self.device.name}"
        return replace(self, name=made, levels=tuple(levels))

    def __str__(self) -> str:
        return self.name


def axis_level(cluster: Cluster, stride: int, size: int) -> int:
    """Outermost level that a group of `size` ranks, `stride` apart, crosses."""
    if size == 1:
        return 0
    for index, level in enumerate(cluster.levels):
        if level.size % (stride * size) == 0:
            return index
    return len(cluster.levels) - 1


def mesh_levels(cluster: Cluster, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Level of each axis, for axis sizes given inner to outer: inner axes fill a host first."""
    strides = [math.prod(sizes[:i]) for i in range(len(sizes))]
    return tuple(axis_level(cluster, stride, n) for stride, n in zip(strides, sizes, strict=True))


def make_mesh(cluster: Cluster, sizes: Mapping[str, int]) -> Mesh:
    """Lay named axes, outermost first, over the cluster; `Axis.level` is set.

    Raises UserError when the axes need more devices than there are or a size is not positive.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"mesh axis {name!r} has size {size}", fix="use a size of at least 1")
    total = math.prod(sizes.values())
    if total > cluster.size:
        shape = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"the mesh {shape} needs {total} devices, but {cluster.name} has {cluster.size}",
            fix="choose axis sizes whose product is the number of devices",
        )
    levels = mesh_levels(cluster, tuple(sizes.values())[::-1])[::-1]
    return Mesh(
        tuple(Axis(name, n, at) for (name, n), at in zip(sizes.items(), levels, strict=True))
    )


def group_span(cluster: Cluster, mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Members of a group along `axes`, per level: (devices in one host, hosts).

    The product is the group's size, or more where members are spread unevenly over hosts.
    """
    return _group_span(tuple(level.size for level in cluster.levels), mesh, axes)


@lru_cache(maxsize=4096)
def _group_span(sizes: tuple[int, ...], mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    ranks: tuple[int, ...] = mesh.group(0, axes)
    span: list[int] = []
    for size in sizes:
        units = {rank // size for rank in ranks}
        largest = max(sum(rank // size == unit for rank in ranks) for unit in units)
        span.append(largest)
        ranks = tuple(unit * size for unit in sorted(units))
    return tuple(span)


_SPEC = re.compile(r"(?:(\d+)x)?(\d+)x([a-z][a-z0-9-]*)", re.IGNORECASE)


def parse_cluster(spec: str) -> Cluster:
    """`cpu:4`, `8xH100`, `2xcpu:2` or `2x8xH100` (hosts × devices per host), or a profile's path.

    Raises UserError with what is accepted where the spec is none of these.
    """
    from .ethernet import ethernet
    from .profile import load_profile, shipped_profile, shipped_profiles

    text = spec.strip()
    if text.endswith(".json") or "/" in text:
        return load_profile(Path(text))
    devices = ", ".join(sorted(name.upper() for name in shipped_profiles() if "cpu" not in name))
    accepted = (
        "write `cpu:4`, `2xcpu:2`, `8xH100` or `2x8xH100` (hosts x devices per host) with one of "
        f"{devices}, or the path of a profile (`.json`)"
    )
    match = re.fullmatch(r"(?:(\d+)x)?cpu:(\d+)", text, re.IGNORECASE)
    if match:
        hosts, per_host, device = int(match.group(1) or 1), int(match.group(2)), "cpu-gloo"
    else:
        match = _SPEC.fullmatch(text)
        if match is None or match.group(3).lower() not in shipped_profiles():
            raise UserError(f"cannot read the cluster {spec!r}", fix=accepted)
        hosts, per_host, device = (
            int(match.group(1) or 1),
            int(match.group(2)),
            match.group(3).lower(),
        )
    if hosts < 1 or per_host < 1:
        raise UserError(f"the cluster {spec!r} has no devices", fix=accepted)
    cluster = shipped_profile(device)
    if device == "cpu-gloo":
        # Ranks share the host's memory; rates stay those measured with every core busy.
        share = cluster.host_size / per_host
        shared = replace(cluster.device, memory_bytes=cluster.device.memory_bytes * share)
        host = replace(cluster, device=shared).resized(per_host, name=text.lower())
        return (
            host if hosts == 1 else replace(host, levels=(*host.levels, ethernet(per_host, hosts)))
        )
    if per_host > cluster.host_size:
        raise UserError(
            f"the cluster {spec!r} has {per_host} devices in one host, but a host of "
            f"{device.upper()} has {cluster.host_size}",
            fix=f"write hosts x devices, for example `{-(-per_host // cluster.host_size)}"
            f"x{cluster.host_size}x{device.upper()}`",
        )
    name = (f"{hosts}x" if hosts > 1 else "") + f"{per_host}x{device.upper()}"
    return cluster.resized(per_host, hosts, name=name)
