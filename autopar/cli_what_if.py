"""`autopar what-if`: the same plan at another setting, next to the best plan there."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .api import parse_bytes
from .cli_explain import check_out, write_json
from .cost.cluster import Cluster, parse_cluster
from .cost.evaluate import with_bandwidth
from .cost.profile import shipped_profile, shipped_profiles
from .cost.timeline import summarise
from .errors import UserError
from .passes.case import Case, make_case, scaled_mesh
from .passes.describe import describe_traffic
from .passes.timeline_of import timeline_of
from .plan import Plan
from .questions import Question, ask
from .report import make_console, plain_table
from .units import bytes_text, seconds_text, signed_seconds
from .win_where import bandwidth_of, level_of


def what_if(
    plan_file: Path,
    target: str,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    devices: int | None = None,
    cluster: str | None = None,
    bandwidth: tuple[str, ...] = (),
    memory: str | None = None,
    inputs: tuple[str, ...] = (),
    planned_on: str | None = None,
    optimizer: str = "adamw",
    out: Path | None = None,
) -> None:
    """Price a plan at another setting and plan anew there; raises UserError for bad input."""
    for name, number in (("--batch", batch), ("--sequence", sequence), ("--devices", devices)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number} is not positive", fix=f"use {name} 1 or more")
    if devices is not None and cluster is not None:
        raise UserError("both --devices and --cluster are given", fix="leave one out")
    given = (batch, sequence, devices, cluster, memory)
    if all(g is None for g in given) and not bandwidth:
        raise UserError(
            "nothing to change is given",
            fix="add --batch, --sequence, --devices, --cluster, --bandwidth or --memory",
        )
    limit = parse_bytes(memory) if memory is not None else None
    there = parse_cluster(cluster) if cluster is not None else None
    check_out(out, plan_file)
    console = make_console()
    with make_console(stderr=True).status(f"loading {target}") as status:
        before = ask(
            plan_file,
            target,
            inputs=inputs,
            cluster=planned_on,
            optimizer=optimizer,
            progress=status.update,
        )
        if there is None:
            there = before.cluster if devices is None else resized(before.cluster, devices)
        after = replace(before, cluster=_faster(there, bandwidth), limit_bytes=limit)
        sizes = {"b": batch, "s": sequence}
        after = after.with_sizes(**{n: size for n, size in sizes.items() if size is not None})
        found = answer(before, after, status.update)
    if out is not None:
        write_json(out, found)
    if out is None or str(out) != "-":
        _print(found, console)
        if out is not None:
            console.print(Text(f"wrote {out}"))


def resized(cluster: Cluster, devices: int) -> Cluster:
    """The same hardware with another number of devices; raises UserError where hosts are not full.

    A cluster of one host takes up to a host's devices, and whole hosts beyond that if its profile
    has a network.
    """
    device = cluster.name.rpartition("x")[2].lower()
    if re.fullmatch(r"cpu:\d+", cluster.name):
        return parse_cluster(f"cpu:{devices}")
    if device in shipped_profiles():
        cluster = shipped_profile(device)
    host = cluster.host_size
    if devices <= host:
        return cluster.resized(devices, name=f"{devices}x{cluster.device.name}")
    if len(cluster.levels) < 2:
        raise UserError(
            f"{cluster.name} is one host of {host} devices, and says nothing of a network",
            fix=f"give a cluster of {devices} devices: --cluster",
        )
    if devices % host:
        raise UserError(
            f"{devices} devices are not whole hosts of {host}", fix=f"use a multiple of {host}"
        )
    return cluster.resized(host, devices // host)


def _faster(cluster: Cluster, texts: tuple[str, ...]) -> Cluster:
    """The cluster with `network=2` (a factor) or `network=100GB/s` applied."""
    factors: dict[str, float] = {}
    for text in texts:
        level, equals, amount = text.partition("=")
        fix = "write LEVEL=FACTOR or LEVEL=NUMBERGB/s, for example network=2 or host=200GB/s"
        if not equals:
            raise UserError(f"cannot read the bandwidth {text!r}", fix=fix)
        name = level_of(cluster, level.strip())
        digits = amount.strip().lower()
        absolute = digits.endswith("gb/s")
        try:
            number = float(digits.removesuffix("gb/s"))
        except ValueError:
            raise UserError(f"cannot read the bandwidth {text!r}", fix=fix) from None
        if not 0 < number < float("inf"):
            raise UserError(f"the bandwidth {text!r} is not positive", fix=fix)
        factors[name] = number * 1e9 / bandwidth_of(cluster, name) if absolute else number
    return with_bandwidth(cluster, factors)


def answer(before: Question, after: Question, progress: Any) -> dict[str, Any]:
    """The plan at both settings and the best plan at the second, as plain data."""
    same, why = _moved(after)
    progress("planning anew")
    start = time.perf_counter()
    new: Plan | None = None
    nothing = ""
    try:
        new = after.best()
    except UserError as error:
        nothing = error.what
    seconds = time.perf_counter() - start
    best = after.case(new) if new is not None else None
    figures = None if same is None else _figures(same)
    if figures is not None:
        figures["fits"] = figures["memory_bytes"] <= after.limit
        if not figures["fits"]:
            over = bytes_text(figures["memory_bytes"] - after.limit)
            why = f"does not fit: {over} too much per device"
    better = None if best is None else _figures(best)
    ratio = figures["time_s"] / better["time_s"] if figures and better else None
    return {
        "before": _figures(before.case()),
        "same_plan": figures,
        "same_plan_note": why,
        "new_plan": better,
        "new_plan_note": nothing,
        "ratio": ratio,
        "limit_bytes": after.limit,
        "setting": {
            "cluster": after.cluster.name,
            **{symbol.name: size for symbol, size in after.hints.items()},
        },
        "replanning_s": seconds,
    }


def _moved(question: Question) -> tuple[Case | None, str]:
    """The question's plan on its cluster, or None and why it cannot run there."""
    plan = question.plan
    mesh = scaled_mesh(plan.mesh, question.cluster.size)
    note = ""
    if mesh is None:
        return None, f"the mesh {plan.mesh} cannot be laid over {question.cluster.size} devices"
    if mesh != plan.mesh:
        note = f"on the mesh {mesh}"
        plan = replace(plan, mesh=mesh)
    try:
        case = make_case(question.graph, question.hints, plan, question.cluster, question.optimizer)
    except UserError as error:
        return None, error.what
    settings = case.settings()
    if not case.evaluate(settings)[2].all():
        return None, "some devices would have nothing: a dim that is split is too small"
    there = replace(plan, timeline=summarise(timeline_of(case)))
    if plan.pipeline is None:  # in a pipeline kernels gain nothing of what is sent
        names = {name: name for name in plan.mesh.names}
        sent = describe_traffic(
            case.concrete, case.rules, case.option, case.pricer, names, plan.micro_batches
        )
        there = replace(there, traffic=sent)
    return replace(case, plan=question.with_kernels(there)), note


def _figures(case: Case) -> dict[str, Any]:
    """Time and peak memory of the timeline, and what the formulas of the step say."""
    timeline, change = timeline_of(case), case.plan.predicted.kernels_s
    return {
        "mesh": str(case.plan.mesh),
        "strategy": case.plan.strategy,
        "micro_batches": case.accounts.micro_batches,
        "time_s": timeline.step_s + change,
        "kernels_s": change,
        "formula_s": case.time_s,
        "compute_s": case.paid.compute_s,
        "memory_bytes": timeline.peak_bytes,
        "formula_bytes": case.memory_bytes,
    }


def _print(found: Mapping[str, Any], console: Console) -> None:
    setting = dict(found["setting"])
    cluster = setting.pop("cluster")
    sizes = ", ".join(f"{name}={size}" for name, size in setting.items())
    where = f"on {cluster}" + (f", {sizes}" if sizes else "")
    table = plain_table(f"what if {where}", "", "mesh", ">time", ">of it kernels", ">memory")
    rows = (
        ("the plan, as made", "before", ""),
        ("the same plan there", "same_plan", found["same_plan_note"]),
        ("the best plan there", "new_plan", found["new_plan_note"]),
    )
    for name, key, _ in rows:
        figures = found[key]
        if figures is None:
            table.add_row(name, "-", "-", "-", "-")
            continue
        table.add_row(
            name,
            figures["mesh"],
            seconds_text(figures["time_s"]),
            signed_seconds(figures["kernels_s"]) if figures["kernels_s"] else "-",
            bytes_text(figures["memory_bytes"]),
        )
    console.print(table)
    for name, _, note in rows:
        if note:
            console.print(Text(f"{name}: {note}"))
    if found["ratio"] is not None:
        text = f"the same plan takes {found['ratio']:.3g} times as long as the best one there"
        console.print(Text(text))
    console.print(
        f"limit {bytes_text(found['limit_bytes'])} per device; planned anew in "
        f"{seconds_text(found['replanning_s'])} from the same capture",
        style="dim",
    )
