"""`autopar measure-rank`: one rank of a plan alone on this device, predicted next to measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .api import optimizer_name
from .cli_explain import check_out, write_json
from .cli_plan import load_call, rebatched
from .cost.cluster import Cluster, parse_cluster
from .errors import UserError
from .ir.graph import Graph
from .passes.case import Case, make_case
from .passes.compute_of import ComputeTimes, compute_of
from .passes.prepare import prepare
from .passes.rank_program import busiest_rank, rank_program
from .passes.step_formula import BATCH
from .passes.timeline_of import timeline_of
from .plan import Plan, load_plan
from .planning import capture_training
from .report import make_console, plain_table
from .runtime.family_times import FAMILY_NAMES, OPTIMIZER, group_of
from .runtime.measure_rank import Measured, RankAlone, check_device, check_fits
from .runtime.random_values import index_bounds
from .units import bytes_text, seconds_text


@dataclass(frozen=True)
class RankReport:
    """A rank's predicted and measured step, and whether the two are about the same device."""

    rank: int
    world_size: int
    mesh: str
    profile: str
    device: str
    mismatch: str
    notes: tuple[str, ...]
    predicted: Mapping[str, float]
    predicted_families: Mapping[str, float]
    measured: Measured

    @property
    def ratios(self) -> dict[str, float | None]:
        """Measured over predicted; None where one is zero or the devices are not the same."""
        found: dict[str, float | None] = {}
        for name, predicted in self.predicted.items():
            measured = getattr(self.measured, name)
            comparable = predicted and measured and not self.mismatch
            found[name] = measured / predicted if comparable else None
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "mesh": self.mesh,
            "profile": self.profile,
            "device": self.device,
            "comparable": not self.mismatch,
            "mismatch": self.mismatch,
            "notes": list(self.notes),
            "predicted": {**self.predicted, "families": dict(self.predicted_families)},
            "measured": asdict(self.measured),
            "ratio": self.ratios,
        }


def measure_rank(
    plan_file: Path,
    target: str,
    *,
    rank: int | None = None,
    steps: int = 10,
    warmup: int = 3,
    device: str | None = None,
    cluster: str | None = None,
    threads: int | None = None,
    inputs: tuple[str, ...] = (),
    optimizer: str = "adamw",
    out: Path | None = None,
) -> None:
    """Measure a rank and print it (see `autopar measure-rank --help`); UserError for bad input."""
    plan = load_plan(plan_file)
    if plan.pipeline is not None:
        raise UserError(
            f"the plan has a pipeline of {plan.stages} stages, and a stage has nothing to begin "
            "with when it runs alone",
            fix="measure a plan without one: --strategy data+tensor, for example",
        )
    kind = optimizer_name(optimizer)
    for name, number, least in (
        ("--steps", steps, 1),
        ("--warmup", warmup, 1),
        ("--threads", 1 if threads is None else threads, 1),
    ):
        if number < least:
            raise UserError(f"{name} {number} is too few", fix=f"use {name} {least} or more")
    if rank is not None and not 0 <= rank < plan.world_size:
        raise UserError(
            f"there is no rank {rank}: the plan has the ranks 0 to {plan.world_size - 1}",
            fix="choose one of them, or leave --rank out for the one with the largest shards",
        )
    if out is not None:
        check_out(out, plan_file)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs to stderr otherwise
    where = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prices, profile = _prices(plan, cluster)
    console = make_console()
    with make_console(stderr=True).status(f"loading {target}") as status:
        module, args, kwargs = load_call(target, inputs)
        status.update("capturing")
        model = _captured(plan, module, args, kwargs)
        case = make_case(model.graph, model.hints, plan, prices, kind)
        chosen = busiest_rank(case) if rank is None else rank
        timeline = timeline_of(case)
        memory_bytes = timeline.peak_bytes - case.given_bytes  # of the whole batch
        check_fits(memory_bytes, chosen, where)
        status.update(f"lowering rank {chosen} of {plan.world_size}")
        sizes = dict(model.hints)
        if BATCH in sizes:
            sizes[BATCH] //= plan.micro_batches
        lowered = rank_program(model.graph, sizes, plan, chosen)
        status.update("making parameters and inputs")
        before = torch.get_num_threads()
        used = threads or (1 if plan.world_size > 1 else before)
        torch.set_num_threads(used)
        try:
            alone = RankAlone(
                lowered,
                plan.mesh,
                chosen,
                where,
                given=_given(model, lowered),
                bounds=index_bounds(case.concrete),
                optimizer=kind,
                micro_batches=plan.micro_batches,
            )
            status.update(f"running {warmup} + {steps} steps")
            measured = alone.measure(steps, warmup)
        finally:
            torch.set_num_threads(before)
    name = device_name(where)
    told = _told(case, chosen, where, used)
    found = RankReport(
        chosen,
        plan.world_size,
        str(plan.mesh),
        profile,
        name,
        mismatch_of(plan, case.pricer.device.name, profile, name),
        told,
        *_predicted(compute_of(case), memory_bytes + alone.given_bytes),
        measured,
    )
    if out is not None:
        write_json(out, found.to_json())
    if out is None or str(out) != "-":
        print_rank(found, console)
        if out is not None:
            console.print(Text(f"wrote {out}"))


# -- what is priced ---------------------------------------------------------------------------


def _prices(plan: Plan, cluster: str | None) -> tuple[Cluster, str]:
    """The plan's cluster with the device of a profile, and the name of what prices the device.

    Only the device counts here, so a profile of any number of devices will do.
    """
    given = parse_cluster(cluster) if cluster is not None else None
    try:
        base = parse_cluster(plan.cluster)
    except UserError:
        if given is None:
            raise UserError(
                f"the plan was made for the cluster {plan.cluster!r}, which is not a shipped one",
                fix="give its profile: --profile FILE.json",
            ) from None
        base = given
    if base.size < plan.world_size:
        base = base.resized(plan.world_size, name=base.name)
    if given is None:
        return base, plan.cluster
    return replace(base, device=given.device, single=given.single), given.name


def device_name(device: torch.device) -> str:
    """`cpu`, or what the driver calls the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def mismatch_of(plan: Plan, priced: str, profile: str, device: str) -> str:
    """What to say where the priced device is not the one at hand; "" where it is."""
    model = priced.partition(",")[0].lower()
    words = device.lower().replace("-", " ").split()
    if model.split("-")[0].partition("@")[0] in words or model == device.lower():
        return ""
    whose = "plan's cluster" if profile == plan.cluster else "profile"
    return f"the {whose} is {priced} ({profile}); measuring on {device}: ratios are not meaningful"


def _told(case: Case, rank: int, device: torch.device, threads: int) -> tuple[str, ...]:
    """What limits the comparison."""
    notes = [
        "collectives are skipped; packing and unpacking what they would carry is part of the "
        "measured times"
    ]
    if device.type == "cpu":
        notes.append(
            f"on {threads} of {len(os.sched_getaffinity(0))} cores, the others idle: a profile "
            "of the CPU has the times with every rank at work"
        )
    if rank != (busiest := busiest_rank(case)):
        notes.append(f"the prediction is for the busiest rank, {busiest}")
    return tuple(notes)


def _predicted(
    compute: ComputeTimes, memory_bytes: float
) -> tuple[dict[str, float], dict[str, float]]:
    families = dict.fromkeys(FAMILY_NAMES, 0.0)
    for family, seconds in compute.families.items():
        families[group_of(family)] += seconds
    families[OPTIMIZER] = compute.optimizer_s
    return {
        "step_s": compute.step_s,
        "forward_s": compute.forward_s,
        "backward_s": compute.backward_s,
        "optimizer_s": compute.optimizer_s,
        "memory_bytes": memory_bytes,
    }, families


# -- the model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A captured model at the sizes of its plan, and the tensors that it was given."""

    module: nn.Module
    graph: Graph
    hints: Mapping[Any, int]
    inputs: tuple[Tensor, ...]


def _captured(plan: Plan, module: nn.Module, args: Any, kwargs: Any) -> _Model:
    batch = plan.hints.get(BATCH.name)
    tensors = [t for t in tree_flatten((args, dict(kwargs)))[0] if isinstance(t, Tensor)]
    first = next((t for t in tensors if t.dim()), None)
    if batch is not None and first is not None and first.shape[0] != batch:
        args, kwargs = rebatched(args, kwargs, batch)
    captured = capture_training(module, args, kwargs)
    plan.check(captured.fingerprint)
    hints = {s: plan.hints.get(s.name, size) for s, size in captured.symbols.items()}
    given = tuple(captured.flatten(args, kwargs))
    return _Model(module, prepare(captured.graph), hints, given)


def _given(model: _Model, lowered: Graph) -> dict[str, Tensor]:
    """The inputs and buffers of the model by placeholder; many are on `meta`."""
    buffers = dict(model.module.named_buffers(remove_duplicate=False))
    queue = iter(model.inputs)
    found: dict[str, Tensor] = {}
    for node in lowered.placeholders():
        if node.meta["role"] == "buffer":
            found[node.name] = buffers[node.meta["fqns"][0]]
        elif node.meta["role"] == "input":
            found[node.name] = next(queue)
    return found


# -- the tables -------------------------------------------------------------------------------


def print_rank(found: RankReport, console: Console) -> None:
    """Print a rank's predicted and measured step."""
    console.print()
    console.print(
        Text.assemble(
            f"rank {found.rank} of {found.world_size} (",
            (found.mesh, "bold green"),
            f") alone on {found.device}, medians of {found.measured.steps} steps",
        )
    )
    if found.mismatch:
        console.print(Text(found.mismatch, style="yellow"))
    console.print()
    table = plain_table("compute of a step", "", ">predicted", ">measured", ">ratio")
    ratios = found.ratios
    for name, predicted in found.predicted.items():
        text = bytes_text if name.endswith("bytes") else seconds_text
        label = {"step_s": "step", "memory_bytes": "peak memory"}.get(name, name[:-2])
        ratio = ratios[name]
        shown = "-" if ratio is None else f"{ratio:.2f}"
        table.add_row(label, text(predicted), text(getattr(found.measured, name)), shown)
    console.print(table)
    console.print()
    kernels = plain_table("by family", "", ">predicted", ">kernels (one step, profiled)")
    for name in FAMILY_NAMES:
        kernels.add_row(
            name,
            seconds_text(found.predicted_families[name]),
            seconds_text(found.measured.families[name]),
        )
    console.print(kernels)
    console.print()
    stand_ins = seconds_text(found.measured.stand_ins_s)
    console.print(Text(f"not counted: {stand_ins} of stand-ins for collectives", style="dim"))
    memory = "torch's CUDA allocator" if found.device != "cpu" else "live tensors, op by op"
    console.print(Text(f"measured peak memory: {memory}", style="dim"))
    for note in found.notes:
        console.print(Text(note, style="dim"))
