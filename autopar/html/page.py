"""The page of a plan: one file that opens without network, with a strict content policy."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files

from autopar.plan import Plan
from autopar.units import bytes_text, seconds_text, signed_seconds

from .blocks import blocks_section, lines_section, read_lines
from .candidates import candidates_section
from .charts import stacked_bar
from .markup import Child, Markup, element, join, table, verbatim
from .memory_tree import memory_section
from .modules import main_file, parameter_groups
from .shapes import coloured, placed
from .timeline import timeline_of, timeline_section


def report_page(plan: Plan, sources: Mapping[str, Sequence[str]] | None = None) -> str:
    """The plan as an HTML document.

    `sources` maps file names, as in the plan's `model.py:31`, to the lines of those files, whose
    text is then shown. The page makes no request: styles and script are inside, and allowed by
    their hashes alone.
    """
    lines = read_lines(plan, sources or {})
    style = verbatim(_resource("style.css"), "</style")
    script = verbatim(_resource("script.js"), "</script")
    title = f"autopar: {plan.mesh} of {plan.cluster}"
    parts = _sections(plan, lines)
    body = [
        _header(plan),
        element(
            "nav",
            element("ul", [element("li", element("a", n, href=f"#{i}")) for i, n, _ in parts]),
            aria_label="Sections",
        ),
        element(
            "main",
            _notes(plan),
            [
                element("section", element("h2", name), content, id=id_, aria_label=name)
                for id_, name, content in parts
            ],
        ),
        element("script", script),
    ]
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", style),
    ]
    page = element("html", element("head", head), element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _sections(plan: Plan, lines: Mapping[str, str]) -> list[tuple[str, str, Child]]:
    """(id, heading, content) of every section."""
    found: list[tuple[str, str, Child]] = [
        ("model", "Model", blocks_section(plan, lines)),
        ("memory", "Memory", memory_section(plan)),
        ("timeline", "Timeline", timeline_section(timeline_of(plan))),
        *_stages(plan),
        ("candidates", "Candidates", candidates_section(plan)),
        ("parameters", "Parameters", _parameters(plan)),
        ("collectives", "Collectives", _traffic(plan)),
        ("lines", "Source lines", lines_section(plan, lines)),
    ]
    return found


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded or run but this very style sheet and this very script."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _header(plan: Plan) -> Markup:
    p = plan.predicted
    devices = f"{plan.world_size} device" + ("s" if plan.world_size > 1 else "")
    sizes = ", ".join(f"{name}={size}" for name, size in plan.hints.items())
    facts: list[tuple[str, Child]] = [
        ("cluster", f"{plan.cluster} ({devices})"),
        ("mesh", coloured(str(plan.mesh), plan.mesh.names)),
        ("strategy", plan.strategy + (f", for {sizes}" if sizes else "")),
        (
            "optimality gap",
            "0 (proven the best of the candidates)" if plan.gap < 1e-4 else f"{plan.gap:.1%}",
        ),
        *([("kernels", f"{signed_seconds(p.kernels_s)} of the step")] if p.kernels_s else []),
        ("model", _model(plan)),
        *_extras(plan),
    ]
    step = {"compute": p.compute_s, "communication": p.comm_s, "optimizer": p.optimizer_s}
    if plan.pipeline is not None and plan.timeline is not None:
        step["bubble"] = plan.timeline.bubble_s
    return element(
        "header",
        element("p", "autopar plan", class_="brand"),
        element("h1", f"{plan.mesh} on {plan.cluster}"),
        element("dl", [[element("dt", k), element("dd", v)] for k, v in facts], class_="facts"),
        element(
            "div",
            _figure("predicted step", seconds_text(p.time_s)),
            stacked_bar(step, seconds_text, "Parts of the step's time"),
            _figure("predicted memory per device", bytes_text(p.memory_bytes)),
            stacked_bar(p.memory_parts, bytes_text, "Parts of the memory"),
            class_="figures",
        ),
    )


def _extras(plan: Plan) -> list[tuple[str, Child]]:
    """Pipeline, micro-batches and recomputation, where the plan has any."""
    found: list[tuple[str, Child]] = []
    if plan.pipeline is not None:
        found.append(("pipeline", f"{plan.stages} stages, {plan.pipeline.schedule}"))
    if plan.micro_batches > 1:
        found.append(("micro-batches", str(plan.micro_batches)))
    for r in plan.recompute:
        parts = [(r.full, "in full"), (r.selective, "but matrix products and attention")]
        text = ", ".join(f"{n} {how}" for n, how in parts if n)
        block = element("code", r.block)
        if text:
            found.append(("recomputed", [f"of {r.copies} blocks from ", block, f": {text}"]))
    return found


def _stages(plan: Plan) -> list[tuple[str, str, Child]]:
    """The section of a pipeline's stages; none without a pipeline."""
    if plan.pipeline is None or plan.timeline is None or not plan.timeline.stages:
        return []
    rows = [
        (
            str(i),
            use.what,
            seconds_text(use.compute_s),
            seconds_text(use.exposed_s),
            seconds_text(use.bubble_s),
            bytes_text(use.peak_bytes),
        )
        for i, use in enumerate(plan.timeline.stages)
    ]
    columns = (">stage", "modules", ">compute", ">waits", ">bubble", ">memory")
    return [("stages", "Stages", table("What each stage holds and does", columns, rows))]


def _figure(name: str, value: str) -> Markup:
    return element("p", element("span", name), element("strong", value), class_="figure")


def _model(plan: Plan) -> Child:
    file = main_file(plan.activations)
    print_ = element("code", plan.fingerprint[:12], title="fingerprint of the captured graph")
    return [f"{file}, " if file else None, "fingerprint ", print_]


def _notes(plan: Plan) -> Child:
    if not plan.notes:
        return None
    return element(
        "section",
        element("h2", "Notes"),
        element("ul", [element("li", note) for note in plan.notes]),
        id="notes",
        class_="notes",
        aria_label="Notes",
    )


def _parameters(plan: Plan) -> Markup:
    groups = parameter_groups(plan)
    if not groups:
        return element("p", "The model has no parameters.", class_="absent")
    names = plan.mesh.names
    rows = [
        (
            element("code", g.name),
            str(len(g.names)),
            placed(g.stored.type, g.stored.sharding, names),
            "gathered twice" if g.stored.regather else "",
            bytes_text(g.local_bytes),
        )
        for g in groups
    ]
    note = (
        "size/axis: the dim is stored split over that axis. Gathered twice: the gathered copy is "
        "dropped after the forward, and gathered again in the backward (ZeRO-3)."
    )
    return join(
        [
            table(
                "Parameters, collapsed over layers",
                ("name", ">×", "stored as", "", ">bytes per device"),
                rows,
            ),
            element("p", note, class_="small"),
        ]
    )


def _traffic(plan: Plan) -> Markup:
    if not plan.traffic:
        return element("p", "Nothing is sent.", class_="absent")
    names = plan.mesh.names
    rows = [
        (
            element("code", t.collective),
            coloured(t.axis, names),
            t.purpose,
            str(t.count),
            bytes_text(t.sent_bytes),
        )
        for t in plan.traffic
    ]
    return table(
        "Collectives of a step, before bucketing",
        ("collective", "axis", "what for", ">×", ">sent per device"),
        rows,
    )
