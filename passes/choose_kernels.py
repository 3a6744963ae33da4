"""Where a plan should use autopar's own kernels: where they are predicted to take less time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch.fx

from autopar.collector import collector_paused
from autopar.cost.cluster import Cluster, Device, group_span
from autopar.cost.kernels import (
    adamw_forms,
    form_times,
    int8_change,
    int8_sent,
    int8_times,
    step_change,
)
from autopar.cost.one_shot import all_reduce_norm_times
from autopar.ir.graph import Graph, Value, value_of
from autopar.ir.lowered import (
    GATHER_VARY,
)
from autopar.kernel_use import NOWHERE, ON_AXES, OPTIMIZER, KernelUse, Places, everywhere
from autopar.plan import Plan

from .fuse_all_reduce_norm import NormSite
from .kernel_sites import Key, kernel_sites
from .rank_program import rank_program
from .short_program import ShortProgram, short_program
from .step_formula import BATCH

Node = torch.fx.Node

ADAMS = ("adam", "adamw")  # optimizers that have a kernel
# Devices, by parts of their names, on which every kernel falls back to torch, as `runtime.kernels`
# says it: CPUs, and GPUs before compute capability 8.0.
_WITHOUT = ("cpu", "V100", "P100", "T4")
_AMD = ("MI2", "MI3")  # GPUs whose ranks have no flags in symmetric memory


@collector_paused()
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

    What each changes of the predicted step (`KernelUse.step_s`) is counted with care: nothing on
    devices that run none, of messages only what compute waits for, and of what a pipeline gains
    what the stage with the fewest of the places has.
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
    found = kernel_sites(short_program(graph, sizes, one, 0), one.mesh, places)
    if not found.is_periodic:
        whole = ShortProgram(rank_program(graph, sizes, one, 0, check=False))
        found = kernel_sites(whole, one.mesh, places)
    stages = _stages(graph, plan)
    uses = [_use(key, places_of, k, device, stages) for key, places_of in found.placed().items()]
    fused_norms = [
        replace(_norm(cluster, plan, site), where=(name,)) for site, name in found.placed_norms()
    ]
    uses += [use for use in fused_norms if math.isfinite(use.time_s)]
    uses += [_int8(cluster, plan, axis, nodes) for axis, nodes in found.sums().items()]
    if places.has("adamw", OPTIMIZER):
        uses += _adamw(graph, found.short, plan, device, optimizer)
    if mode == "auto":
        # What is at nodes is chosen size by size, what is on an axis for all of its buckets.
        uses = [use for use in uses if use.kernel in ON_AXES or use.time_s < use.unfused_s]
    if not _allowed(cluster.device.name):  # all of them fall back to torch, or are for tests
        uses = [replace(use, step_s=0.0, sent_bytes={}) for use in uses]
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


def _stages(graph: Graph, plan: Plan) -> Mapping[str, int]:
    """The stage of every node by name; empty where there is no pipeline."""
    if plan.pipeline is None:
        return {}
    order = {node.name: i for i, node in enumerate(graph.fx.nodes)}
    cuts = sorted(order[name] for name in plan.pipeline.cuts if name in order)
    return {name: bisect_right(cuts, i) % plan.stages for name, i in order.items()}


def _counted_share(places: Sequence[str], stages: Mapping[str, int]) -> float:
    """The share of places that the stage with the fewest of them has; 1 without stages."""
    if not stages:
        return 1.0
    at = Counter(stages.get(place) for place in places)
    return min(at[stage] for stage in set(stages.values())) / len(places)


def _use(
    key: Key,
    found: list[str],
    micro_batches: int,
    device: Device,
    stages: Mapping[str, int],
) -> KernelUse:
    kernel, fusion, note, forms = key
    with_it, without = form_times(device, kernel, forms)
    change = step_change(device, kernel, forms)
    if change < 0:
        change *= _counted_share(found, stages)
    # Parameters are packed once per step, all else once per micro-batch.
    count = len(found) * (1 if kernel == "pack" else micro_batches)
    return KernelUse(
        kernel,
        tuple(dict.fromkeys(found)),
        fusion,
        count,
        with_it * count,
        without * count,
        int(forms.saved_bytes * len(found)),
        note,
        change * count,
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
            step_s=first.step_s + use.step_s,
        )
    return list(found.values())


def _waited(plan: Plan, axes: Sequence[str]) -> float:
    """Seconds of a step in which compute waits for messages along some axes."""
    exposed = plan.timeline.exposed_s if plan.timeline is not None else {}
    return sum(s for name, s in exposed.items() if set(name.split("&")) <= set(axes))


def _norm(cluster: Cluster, plan: Plan, site: NormSite) -> KernelUse:
    """The step gains no more than the site's share of what compute waits for on its axes."""
    value, k = value_of(site.psum), plan.micro_batches
    span = group_span(cluster, plan.stage_mesh, site.group.axes)
    elements, trained = float(value.numel()), value.requires_grad
    times = all_reduce_norm_times(cluster, elements, value.dtype.itemsize, span, trained)
    fused, unfused = (k * seconds for seconds in times)
    change = fused - unfused
    if change < 0:
        sent = sum(t.sent_bytes for t in plan.traffic if t.axis in site.group.axes)
        ranks = math.prod(span)
        own = 2 * (ranks - 1) / ranks * elements * value.dtype.itemsize * k
        waited = _waited(plan, site.group.axes) * min(1.0, own / max(sent, own, 1.0))
        change = 0.0 if plan.pipeline is not None else -min(-change, waited)
    where = (site.norm.name,)
    return KernelUse("all_reduce_norm", where, "", k, fused, unfused, step_s=change)


def _int8(cluster: Cluster, plan: Plan, axis: str, nodes: list[Node]) -> KernelUse:
    """The sums of gradients over an axis, once per step.

    Of what compute waits for on the axis they have their share by bytes; none in a pipeline.
    """
    axes = tuple(axis.split("&"))
    span = group_span(cluster, plan.stage_mesh, axes)
    messages: list[tuple[float, int, bool]] = []
    sent: Counter[str] = Counter()
    fused, unfused = 0.0, 0.0
    for node in nodes:
        args: Any = node.args
        scatters = args[0] is GATHER_VARY
        values = [value_of(t) for t in args[3:]]
        elements = sum(float(v.numel()) for v in values) * (math.prod(span) if scatters else 1)
        messages.append((elements, values[0].dtype.itemsize, scatters))
        times = int8_times(cluster, span, *messages[-1])
        fused, unfused = fused + times[0], unfused + times[1]
        sent.update(int8_sent(span, *messages[-1]))
    exposed = 0.0
    if unfused > 0 and plan.pipeline is None:
        own = -sum(n for n in sent.values() if n < 0)
        all_sent = sum(t.sent_bytes for t in plan.traffic if t.axis in (axis, *axes))
        waited = _waited(plan, axes) * own / max(all_sent, own, 1)
        exposed = min(1.0, waited / unfused)
    change = sum(int8_change(cluster, span, *message, exposed) for message in messages)
    stages = plan.stages  # what a device of one of them sends, if they are alike
    changed = {kind: n // stages for kind, n in sent.items()}
    use = KernelUse("int8", (axis,), "", len(nodes), fused, unfused)
    return replace(use, step_s=change, sent_bytes=changed)


def _adamw(
    graph: Graph, short: ShortProgram, plan: Plan, device: Device, optimizer: str
) -> list[KernelUse]:
    if optimizer not in ADAMS:
        return []
    fqns = {node.name: node.meta["fqns"] for node in graph.placeholders("param")}
    there = [(node, node.name) for node in short.program.placeholders("param")]
    sizes: list[float] = []
    itemsize = 4
    for node, name in short.all_of(there, lambda one: one[1], lambda one, n: (one[0], n)):
        value = node.meta["value"]
        if not isinstance(value, Value) or not value.requires_grad:
            continue
        stored = next((plan.params[n] for n in fqns[name] if n in plan.params), None)
        if stored is not None and stored.stages and stored.stages[0] != 0:
            continue  # of another stage than the first
        sizes.append(float(math.prod(map(int, value.shape))))
        itemsize = value.dtype.itemsize
    if not sizes:
        return []
    forms = adamw_forms(sizes, itemsize)
    fused, unfused = form_times(device, "adamw", forms)
    change = step_change(device, "adamw", forms)
    if plan.pipeline is not None:  # the sizes are of the first stage
        change = max(0.0, change)
    return [KernelUse("adamw", (OPTIMIZER,), "", 1, fused, unfused, step_s=change)]
