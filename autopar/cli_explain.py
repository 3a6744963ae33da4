"""`autopar explain`: what a plan costs as formulas, why it does what it does, where others win."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import sympy
import torch.fx
from rich.console import Console
from rich.text import Text

from .cli_report import check_writable, write_whole
from .cost.evaluate import compiled
from .cost.families import op_name
from .cost.formula import axis_size, formula_text
from .errors import UserError
from .ir.graph import tensor_inputs, value_of
from .kernel_use import KernelUse
from .passes.alternatives import OptionCost, op_alternatives, storage_alternatives, why_chosen
from .passes.bucket_collectives import BUCKET_BYTES
from .passes.case import Case
from .passes.columns import producer_of
from .passes.describe import type_of
from .passes.step_formula import BATCH, MICRO_BATCHES
from .passes.timeline_of import timeline_of
from .plan import load_plan
from .questions import Question, ask, find_ops, find_params, place_of
from .report import MOST_ROWS, kernels_table, make_console, plain_table
from .units import bytes_text, seconds_text, signed_seconds
from .win_where import VARIABLES, crossover_report, print_crossover

Node = torch.fx.Node
MOST_POINTS = 8  # ops or parameters of one pattern that are explained at once


def explain_plan(
    plan_file: Path,
    target: str,
    *,
    op: str | None = None,
    param: str | None = None,
    formula: bool = False,
    crossover: str | None = None,
    against: Sequence[Path] = (),
    level: str | None = None,
    inputs: Sequence[str] = (),
    cluster: str | None = None,
    memory: str | None = None,
    optimizer: str = "adamw",
    out: Path | None = None,
) -> None:
    """Explain a plan (see `autopar explain --help`); raises UserError for bad input."""
    if op is not None and param is not None:
        raise UserError("both --op and --param are given", fix="ask about one at a time")
    if crossover is not None and crossover not in VARIABLES:
        raise UserError(f"unknown variable {crossover!r}", fix=f"use one of {', '.join(VARIABLES)}")
    if crossover is not None and (op is not None or param is not None):
        raise UserError("--crossover is about whole plans", fix="leave --op and --param out")
    if against and crossover is None:
        raise UserError("--against is given without --crossover", fix="add --crossover batch")
    check_out(out, plan_file, *against)
    console = make_console()
    with make_console(stderr=True).status(f"loading {target}") as status:
        question = ask(
            plan_file,
            target,
            inputs=inputs,
            cluster=cluster,
            memory=memory,
            optimizer=optimizer,
            progress=status.update,
        )
        found: dict[str, Any]
        if crossover is not None:
            others = {path.stem: load_plan(path) for path in against}
            found = crossover_report(question, crossover, others, level, status.update)
        else:
            case = question.case()
            if op is not None:
                found = {"ops": [_op(question, case, n) for n in _few(find_ops(case, op), op)]}
            elif param is not None:
                nodes = _few(find_params(case, param), param)
                found = {"params": [_param(question, case, node) for node in nodes]}
            else:
                found = {"step": _step(case)}
    if out is not None:
        write_json(out, found)
    if out is None or str(out) != "-":
        _print(found, formula, console)
        if out is not None:
            console.print(Text(f"wrote {out}"))


def check_out(out: Path | None, *inputs: Path) -> None:
    """Raise UserError where a JSON file cannot be written."""
    if out is not None and str(out) != "-":
        check_writable(out, *inputs)


def write_json(out: Path, found: Mapping[str, Any]) -> None:
    """Write an answer as JSON; `-` is standard output."""
    text = json.dumps(found, indent=1) + "\n"
    if str(out) == "-":
        sys.stdout.write(text)
    else:
        write_whole(out, text)


def _few(nodes: list[Node], wanted: str) -> list[Node]:
    if len(nodes) <= MOST_POINTS:
        return nodes
    names = ", ".join(n.name for n in nodes[:MOST_POINTS])
    raise UserError(
        f"{wanted!r} means {len(nodes)} of them: {names}, …",
        fix="name one of them, or a module and an op such as 'layers.0.attn.linear'",
    )


# ---------------------------------------------------------------------------------------------
# The step


def _step(case: Case) -> dict[str, Any]:
    """Every term of the step with its value, and the totals."""
    step = case.step
    formulas = [t.formula for t in step.terms] + [step.seconds, step.memory]
    values = compiled(formulas, case.cluster, BUCKET_BYTES)(case.settings())[:, 0]
    sizes = _sizes(case)
    terms = [
        {
            "category": term.category,
            "label": term.label,
            "value": float(value),
            "unit": "B" if term.category in ("state", "saved") else "s",
            "formula": formula_text(term.formula, sizes),
        }
        for term, value in zip(step.terms, values, strict=False)
        if value
    ]
    return {
        "time_s": float(values[-2]),
        "memory_bytes": float(values[-1]),
        "predicted_time_s": case.plan.predicted.time_s,
        "predicted_memory_bytes": case.plan.predicted.memory_bytes,
        "timeline_s": timeline_of(case).step_s,
        "kernels_s": case.plan.predicted.kernels_s,
        "overlap": step.overlap,
        "sizes": {str(symbol): size for symbol, size in sizes.items()},
        "kernels": [asdict(use) for use in case.plan.kernels],
        "terms": sorted(terms, key=lambda t: (t["unit"] != "s", -float(t["value"]))),
    }


def _sizes(case: Case) -> dict[sympy.Symbol, int]:
    found = dict(case.hints)
    found |= {axis_size(axis.name): axis.size for axis in case.pricer.mesh}
    if case.accounts.micro_batches != 1:
        found[MICRO_BATCHES] = case.accounts.micro_batches
    return found


def _print_step(step: Mapping[str, Any], console: Console) -> None:
    sizes = ", ".join(f"{name} = {size}" for name, size in step["sizes"].items())
    console.print(Text(f"one training step on one device, at {sizes}", style="bold"))
    said = step["predicted_time_s"], step["predicted_memory_bytes"]
    console.print(
        f"the plan says {seconds_text(said[0])} and {bytes_text(said[1])}; its timeline "
        f"{seconds_text(step['timeline_s'])}",
        style="dim",
    )
    if step["kernels_s"]:
        console.print(
            f"kernels: {signed_seconds(step['kernels_s'])}, which the plan counts; ", end=""
        )
        console.print("its timeline and the terms below are without")
    for unit, text, total, title in (
        ("s", seconds_text, step["time_s"], "time"),
        ("B", bytes_text, step["memory_bytes"], "memory per device"),
    ):
        console.print()
        table = plain_table(f"{title}: {text(total)}", "", "term", ">value", ">share")
        terms = [t for t in step["terms"] if t["unit"] == unit]
        for term in terms:
            share = f"{term['value'] / total:.1%}" if total else "-"
            table.add_row(term["category"], term["label"], text(term["value"]), share)
        console.print(table)
    if step["overlap"]:
        console.print(
            f"\nParameter communication hides behind {step['overlap']:.0%} of the compute: "
            f"time = compute + communication + optimizer + max(0, parameter communication - "
            f"{step['overlap']:g} (compute + communication inside ops))"
        )
    _print_kernels(step["kernels"], console)
    console.print(Text("\nformulas", style="bold"))
    for term in step["terms"]:
        console.print(Text(f"\n{term['category']} {term['label']}:", style="dim"))
        _print_formula(term["formula"], console)
    console.print(
        "\nrate_*, bandwidth_* and narrow are the device's curves, and all_gather(bytes, tp) the "
        "seconds of a\ncollective along a mesh axis: docs/formulas.md.",
        style="dim",
    )


def _print_kernels(uses: Sequence[Mapping[str, Any]], console: Console) -> None:
    found = [KernelUse(**use) for use in uses]
    table = kernels_table(found)
    if table is None:
        return
    console.print()
    console.print(table)
    for use in found:
        if use.note:
            console.print(Text(f"{use.kernel}: {use.note}"), style="dim")


def kernel_text(case: Case, node: Node) -> str:
    """What a plan has at an op of autopar's own kernels: `dropout, besides x | add(a0, x): ...`."""
    for use in case.plan.kernels:
        if node.name in use.where:
            besides = f", besides {use.fusion}" if use.fusion else ""
            times = f"{seconds_text(use.time_s)}, not {seconds_text(use.unfused_s)}"
            note = f" ({use.note})" if use.note else ""
            return f"{use.kernel}{besides}: {times}, for {use.count} per step{note}"
    return ""


def _print_formula(text: str, console: Console) -> None:
    for line in text.splitlines():
        console.print(Text("  " + line), soft_wrap=True)


# ---------------------------------------------------------------------------------------------
# One op, one parameter


def _op(question: Question, case: Case, node: Node) -> dict[str, Any]:
    chosen = case.option[node]
    formula = case.formulas.op(node, chosen.choices)
    costs = op_alternatives(case, node)
    parts = {
        "flops": (formula.flops, ""),
        "bytes moved": (formula.moved, "B"),
        "forward": (formula.forward, "s"),
        "backward": (formula.backward, "s"),
        **{
            f"{c.kind} over {c.axis}" + (" (backward)" if c.backward else ""): (c.seconds, "s")
            for c in formula.own
        },
        "saved": (formula.saved, "B"),
    }
    for slot, source in enumerate(tensor_inputs(node)):
        producer, port = producer_of(source)
        given = case.option[producer]
        edge = case.formulas.edge(
            producer, port, given.gives[port], chosen.wants[slot], given.regather
        )
        for c in edge.collectives:
            late = " (backward)" if c.backward else ""
            parts[f"input {slot}: {c.kind} over {c.axis}{late}"] = (c.seconds, "s")
    return {
        "name": node.name,
        "op": op_name(node.target),
        "module": place_of(case, node),
        "source": node.meta.get("source", ""),
        "type": type_of(value_of(node)) if node.meta["value"] and _single(node) else "",
        "copies": _copies(case, node),
        "rule": str(case.rules[node.name]),
        "choice": choices_text(chosen.choices),
        "kernel": kernel_text(case, node),
        "gives": [str(s) for s in chosen.gives],
        "why": why_chosen(costs, question.limit - case.memory_bytes),
        "alternatives": [_cost(c, choices_text(c.option.choices)) for c in costs],
        "formulas": _valued(case, parts),
    }


def _single(node: Node) -> bool:
    return not isinstance(node.meta["value"], tuple)


def _param(question: Question, case: Case, node: Node) -> dict[str, Any]:
    chosen = case.option[node]
    stored = case.formulas.stored(node, chosen.gives[0])
    costs = storage_alternatives(case, node)
    return {
        "name": node.meta["fqns"][0],
        "module": place_of(case, node),
        "type": type_of(value_of(node)),
        "copies": _copies(case, node),
        "choice": _storage_text(costs, chosen),
        "why": why_chosen(costs, question.limit - case.memory_bytes),
        "alternatives": [_cost(c, storage_text(c)) for c in costs],
        "formulas": _valued(
            case, {"optimizer": (stored.seconds, "s"), "stored": (stored.stored, "B")}
        ),
    }


def _storage_text(costs: Sequence[OptionCost], chosen: object) -> str:
    return next((storage_text(c) for c in costs if c.chosen), str(chosen))


def storage_text(cost: OptionCost) -> str:
    """`[dp, -] gathered twice`."""
    again = ", gathered again in the backward" if cost.option.regather else ""
    return str(cost.option.gives[0]) + again


def choices_text(choices: Sequence[tuple[str, object]]) -> str:
    """`dp splits b, tp splits n`, or `replicated`."""
    return ", ".join(f"{axis}: {choice}" for axis, choice in choices) or "replicated"


def _copies(case: Case, node: Node) -> int:
    stands_for = case.blocks.representative
    return sum(stands_for[n] is stands_for[node] for n in case.option)


def _cost(cost: OptionCost, does: str) -> dict[str, Any]:
    return {
        "does": does,
        "gives": [str(s) for s in cost.option.gives],
        "chosen": cost.chosen,
        "own_s": cost.own_s,
        "own_delta_s": cost.own_delta_s,
        "reshard_delta_s": cost.reshard_delta_s,
        "delta_s": cost.delta_s,
        "delta_bytes": cost.delta_bytes,
    }


def _valued(case: Case, parts: Mapping[str, tuple[sympy.Expr, str]]) -> list[dict[str, Any]]:
    """Formulas of one call with their values at the sizes of one micro-batch."""
    kept = {name: part for name, part in parts.items() if part[0] != 0}
    settings = case.settings()
    if BATCH in case.hints:
        settings = case.settings({"b": case.hints[BATCH] // case.accounts.micro_batches})
    evaluate = compiled([formula for formula, _ in kept.values()], case.cluster, BUCKET_BYTES)
    values = evaluate(settings)[:, 0] if kept else np.zeros(0)
    return [
        {
            "name": name,
            "value": float(value),
            "unit": unit,
            "formula": formula_text(formula, case.formulas.sizes),
        }
        for (name, (formula, unit)), value in zip(kept.items(), values, strict=True)
    ]


def _print_point(point: Mapping[str, Any], formula: bool, console: Console) -> None:
    console.print()
    times = f" × {point['copies']}" if point["copies"] > 1 else ""
    console.print(Text(f"{point.get('op', 'parameter')} {point['name']}{times}", style="bold"))
    for key in ("module", "source", "type", "rule", "choice", "kernel", "why"):
        if point.get(key):
            console.print(Text.assemble((f"{key:8}", "dim"), str(point[key])))
    table = plain_table(
        "alternatives, everything else as planned",
        "",
        "*does",
        "gives" if "op" in point else "",
        ">own time",
        ">resharding",
        ">step",
        ">memory",
    )
    for cost in point["alternatives"][:MOST_ROWS]:
        table.add_row(
            "*" if cost["chosen"] else "",
            Text(cost["does"]),  # as it is: brackets are markup otherwise
            Text(" ".join(cost["gives"]) if "op" in point else ""),
            seconds_text(cost["own_s"]),
            _signed(cost["reshard_delta_s"], seconds_text),
            _signed(cost["delta_s"], seconds_text),
            _signed(cost["delta_bytes"], bytes_text),
        )
    console.print(table)
    console.print("per step and device; resharding, step and memory against the plan", style="dim")
    if formula:
        for part in point["formulas"]:
            text = {"s": seconds_text, "B": bytes_text}.get(part["unit"], "{:.4g}".format)
            console.print(Text(f"\n{part['name']}: {text(part['value'])} =", style="dim"))
            _print_formula(part["formula"], console)


def _signed(value: float, text: Callable[[float], str]) -> str:
    if abs(value) < 1e-12:
        return "0"
    return ("+" if value > 0 else "-") + text(abs(value))


def _print(found: Mapping[str, Any], formula: bool, console: Console) -> None:
    if "step" in found:
        _print_step(found["step"], console)
    for point in (*found.get("ops", ()), *found.get("params", ())):
        _print_point(point, formula, console)
    if "crossover" in found:
        print_crossover(found, console)
