"""Where a plan should use autopar's own kernels: where they are predicted to take less time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch.fx

from autopar.cost.cluster import Cluster, Device, group_span
from autopar.cost.kernels import (
    Forms,
    adamw_forms,
    cross_entropy_forms,
    dropout_forms,
    form_times,
    int8_times,
    pack_forms,
    permute_forms,
)
from autopar.cost.one_shot import all_reduce_norm_times
from autopar.ir.graph import Graph, Value, value_of
from autopar.ir.lowered import CLOSE, GATHER_VARY, PVARY, ROUTED_GATHER, ROUTED_SCATTER
from autopar.ir.mesh import Mesh
from autopar.kernel_use import NOWHERE, ON_AXES, OPTIMIZER, KernelUse, Places, everywhere
from autopar.plan import Plan

from .fuse_all_reduce_norm import NormSite, norm_sites
from .rank_program import rank_program
from .step_formula import BATCH
from .use_kernels import Site, sites

Node = torch.fx.Node
Key = tuple[str, str, str, Forms]

ADAMS = ("adam", "adamw")  # optimizers that have a kernel
# Devices, by parts of their names, on which every kernel falls back to torch, as `runtime.kernels`
# says it: CPUs, and GPUs before compute capability 8.0.
_WITHOUT = ("cpu", "V100", "P100", "T4")
_AMD = ("MI2", "MI3")  # GPUs whose ranks have no flags in symmetric memory


def choose_kernels(
    graph: Graph,
    symbols: Mapping[sympy.Symbol, int],
    plan: Plan,
    cluster: Cluster,
    mode: str = "auto",
    compressed: tuple[str, ...] = (),
    optimizer: str = "adamw",
) -> tuple[KernelUse, ...]:
    """The kernels of a plan, with what they take and what is taken without them.

    `graph` is the prepared captured graph, `symbols` the sizes of the whole batch. `mode` "auto"
    has those that are faster, and none on devices that cannot run them (CPUs, GPUs older than the
    A100); "all" and "interpret" all there are; "off" none. Along the axes `compressed` gradients
    are to travel as int8, whatever it takes.
    """
    places = _allowed(cluster.device.name) if mode == "auto" else everywhere()
    if mode == "off":
        places = NOWHERE
    if compressed:
        places = Places({**places.of, "int8": frozenset(compressed)})
    if not places:
        return ()
    k, device = plan.micro_batches, cluster.device_for(plan.world_size)
    sizes = {symbol: n // k if symbol == BATCH else n for symbol, n in symbols.items()}
    one = replace(plan, mesh=plan.stage_mesh, pipeline=None)
    program = rank_program(graph, sizes, one, 0, check=False)
    norms = list(norm_sites(program)) if "all_reduce_norm" in places.of else []
    fused_norms = [_norm(cluster, one.mesh, site, k) for site in norms]
    groups: dict[Key, list[Site]] = defaultdict(list)
    summed: dict[str, list[Node]] = defaultdict(list)
    for site in sites(program, one.mesh, places):
        if site.kernel == "int8":
            summed[site.place].append(site.node)
            continue
        groups[site.kernel, site.fusion, site.note, _forms(site)].append(site)
    uses = [_use(key, found, k, device) for key, found in groups.items()]
    uses += [use for use in fused_norms if math.isfinite(use.time_s)]
    uses += [_int8(cluster, one.mesh, axis, nodes) for axis, nodes in summed.items()]
    if places.has("adamw", OPTIMIZER):
        uses += _adamw(program, plan, device, optimizer)
    if mode == "auto":
        # What is at nodes is chosen size by size, what is on an axis for all of its buckets.
        uses = [use for use in uses if use.kernel in ON_AXES or use.time_s < use.unfused_s]
    return tuple(
        use
        for use in _together(uses)
        if mode != "auto" or use.kernel == "int8" or use.time_s < use.unfused_s
    )


def _allowed(device: str) -> Places:
    """The kernels that a device of this name can run."""
    if any(part in device for part in _WITHOUT):
        return NOWHERE
    of = dict(everywhere().of)
    if any(part in device for part in _AMD):
        del of["all_reduce_norm"]
    return Places(of)


def _use(key: Key, found: list[Site], micro_batches: int, device: Device) -> KernelUse:
    kernel, fusion, note, forms = key
    with_it, without = form_times(device, kernel, forms)
    # Parameters are packed once per step, all else once per micro-batch.
    count = len(found) * (1 if kernel == "pack" else micro_batches)
    return KernelUse(
        kernel,
        tuple(dict.fromkeys(site.place for site in found)),
        fusion,
        count,
        with_it * count,
        without * count,
        int(forms.saved_bytes * len(found)),
        note,
    )


def _together(uses: list[KernelUse]) -> list[KernelUse]:
    """One use for all of a kernel that differ only in sizes, in order."""
    found: dict[tuple[str, str, str], KernelUse] = {}
    for use in uses:
        key = (use.kernel, use.fusion, use.note)
        first = found.get(key)
        if first is None:
            found[key] = use
            continue
        found[key] = replace(
            first,
            where=tuple(dict.fromkeys((*first.where, *use.where))),
            count=first.count + use.count,
            time_s=first.time_s + use.time_s,
            unfused_s=first.unfused_s + use.unfused_s,
            saved_bytes=first.saved_bytes + use.saved_bytes,
        )
    return list(found.values())


def _forms(site: Site) -> Forms:
    made: Forms = _FORMS[site.kernel](site.node)
    return made


def _dropout(node: Node) -> Forms:
    value = value_of(node)
    fusion: Any = node.kwargs["kernel"]  # a Fusion
    return dropout_forms(
        int(value.numel()),
        value.dtype.itemsize,
        value.rank,
        fusion.prologue.extras if fusion.prologue else None,
        fusion.epilogue.extras if fusion.epilogue else None,
        fusion.saves_inputs,
    )


def _cross_entropy(node: Node) -> Forms:
    args: Any = node.args
    logits, prologue = value_of(args[0]), node.kwargs["kernel"]
    tokens = int(value_of(args[1]).numel())
    return cross_entropy_forms(
        tokens,
        int(logits.numel()) // max(tokens, 1),
        logits.dtype.itemsize,
        args[8] is not None,
        bool(node.kwargs.get("in_place")),
        bool(prologue),
        value_of(node).dtype.itemsize,
    )


def _permute(node: Node) -> Forms:
    value = value_of(node)
    width = int(value.shape[-1]) if value.rank > 1 else 1
    ways: Any = node.kwargs.get("ways", 1) if node.target is ROUTED_GATHER else 1
    rows = int(value.numel()) // max(width, 1) * ways
    return permute_forms(rows, width, value.dtype.itemsize, node.target is ROUTED_SCATTER)


def _pack(node: Node) -> Forms:
    """Packed before the message of either direction; unpacked after those that gather."""
    args: Any = node.args
    tensors = args[4:] if node.target is CLOSE else args[3:]
    values = [value_of(t) for t in tensors]
    sizes = [float(v.numel()) for v in values]
    joins = node.target is CLOSE and args[0] is not PVARY
    return pack_forms(sizes, values[0].dtype.itemsize, joins)


_FORMS: Mapping[str, Any] = {
    "dropout": _dropout,
    "cross_entropy": _cross_entropy,
    "permute": _permute,
    "pack": _pack,
}


def _norm(cluster: Cluster, mesh: Mesh, site: NormSite, micro_batches: int) -> KernelUse:
    value = value_of(site.psum)
    span = group_span(cluster, mesh, site.group.axes)
    elements, trained = float(value.numel()), value.requires_grad
    times = all_reduce_norm_times(cluster, elements, value.dtype.itemsize, span, trained)
    fused, unfused = (micro_batches * seconds for seconds in times)
    return KernelUse("all_reduce_norm", (site.norm.name,), "", micro_batches, fused, unfused)


def _int8(cluster: Cluster, mesh: Mesh, axis: str, nodes: list[Node]) -> KernelUse:
    """The sums of gradients over an axis, once per step."""
    span = group_span(cluster, mesh, tuple(axis.split("&")))
    fused, unfused = 0.0, 0.0
    for node in nodes:
        args: Any = node.args
        scatters = args[0] is GATHER_VARY
        values = [value_of(t) for t in args[3:]]
        elements = sum(float(v.numel()) for v in values) * (math.prod(span) if scatters else 1)
        times = int8_times(cluster, span, elements, values[0].dtype.itemsize, scatters)
        fused, unfused = fused + times[0], unfused + times[1]
    return KernelUse("int8", (axis,), "", len(nodes), fused, unfused)


def _adamw(program: Graph, plan: Plan, device: Device, optimizer: str) -> list[KernelUse]:
    if optimizer not in ADAMS:
        return []
    sizes: list[float] = []
    itemsize = 4
    for node in program.placeholders("param"):
        value = node.meta["value"]
        if not isinstance(value, Value) or not value.requires_grad:
            continue
        stored = next((plan.params[n] for n in node.meta["fqns"] if n in plan.params), None)
        if stored is not None and stored.stages and stored.stages[0] != 0:
            continue  # of another stage than the first
        sizes.append(float(math.prod(map(int, value.shape))))
        itemsize = value.dtype.itemsize
    if not sizes:
        return []
    forms = adamw_forms(sizes, itemsize)
    fused, unfused = form_times(device, "adamw", forms)
    return [KernelUse("adamw", (OPTIMIZER,), "", 1, fused, unfused)]
