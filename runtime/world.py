"""The processes of one run: starting `torch.distributed`, and the groups of a mesh."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.ir.graph import Graph
from autopar.ir.lowered import GroupRef
from autopar.ir.mesh import Mesh

from .group import Group, ProcessGroupGroup
from .shared_memory import make_group
from .staged_group import HostStagedGroup, local_gpu, ranks_share_devices


def world_size() -> int:
    """Processes of this run: of torchrun's environment, or of an initialised process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_world(device_type: str) -> None:
    """Initialise the default process group from torchrun's environment unless it is already."""
    if not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(local_gpu())
            shared = ranks_share_devices()
            dist.init_process_group("cpu:gloo,cuda:gloo" if shared else "cpu:gloo,cuda:nccl")
        else:
            dist.init_process_group("gloo")
        atexit.register(_end_world)


def _end_world() -> None:
    """Join the threads of the groups before the interpreter takes down what they run on."""
    if dist.is_initialized():
        dist.destroy_process_group()


# The meshes of each default process group by (device type, sizes, axis names): a mesh of two axes
# starts groups with sockets and threads of their own, which torch keeps until the process ends.
_MESHES: weakref.WeakKeyDictionary[
    dist.ProcessGroup, dict[tuple[str, tuple[int, ...], tuple[str, ...]], DeviceMesh]
] = weakref.WeakKeyDictionary()


def device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """The live `DeviceMesh` of a plan's mesh: one for all models that have such a mesh."""
    return _mesh(device_type, tuple(axis.size for axis in mesh), mesh.names)


def _mesh(device_type: str, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    world = dist.group.WORLD
    assert world is not None
    known = _MESHES.setdefault(world, {})
    key = (device_type, sizes, names)
    if key not in known:
        known[key] = init_device_mesh(device_type, sizes, mesh_dim_names=names)
    return known[key]


def is_of_plan(mesh: DeviceMesh) -> bool:
    """Whether the mesh is one of those that `device_mesh` gives."""
    world = dist.group.WORLD
    if world is None:
        return False
    return any(mesh is known for known in _MESHES.get(world, {}).values())


def groups_of(
    graphs: Iterable[Graph],
    mesh: DeviceMesh,
    known: dict[tuple[str, ...], Group],
    traceable: bool = False,
) -> dict[tuple[str, ...], Group]:
    """Live groups for every `GroupRef` of some graphs; `known` is extended and returned.

    With `traceable`, groups consist of functional collectives, which `torch.compile` can trace.
    Groups are created collectively: every rank must call this with the same programs.
    """
    arguments: list[Any] = [
        arg
        for graph in graphs
        for node in graph.calls()
        for arg in (*node.args, *node.kwargs.values())
    ]
    return make_groups(
        {a.axes for a in arguments if isinstance(a, GroupRef)}, mesh, known, traceable
    )


def make_groups(
    wanted: Iterable[tuple[str, ...]],
    mesh: DeviceMesh,
    known: dict[tuple[str, ...], Group],
    traceable: bool = False,
) -> dict[tuple[str, ...], Group]:
    """Live groups for axes of the mesh; `known` is extended and returned. Collective."""
    for axes in sorted(set(wanted) - set(known)):
        found = _process_group(mesh, axes)
        if mesh.device_type == "cuda" and ranks_share_devices():
            known[axes] = HostStagedGroup(make_group(found))
        else:
            known[axes] = ProcessGroupGroup(found) if traceable else make_group(found)
    return known


def _process_group(mesh: DeviceMesh, axes: tuple[str, ...]) -> dist.ProcessGroup:
    if len(axes) == 1:
        return mesh.get_group(axes[0])
    if mesh.mesh_dim_names == axes:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return mesh[axes]._flatten().get_group()


def flat_mesh(size: int, device_type: str) -> DeviceMesh:
    """All ranks along one axis: where parameters live before there is a plan."""
    return _mesh(device_type, (size,), ("world",))
