"""Named strategies: every axis has a fixed use (`families`), the rest is solved as always."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.fx

from autopar.cost.cluster import make_mesh
from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.plan import Alternative
from autopar.units import bytes_text

from .accounts import MODES
from .families import FAMILIES
from .frame import Variant
from .frames import Frames, Request
from .hints import hints_in
from .problem import Problem
from .programme import Assignment
from .settle import Settled, settle

Node = torch.fx.Node
Progress = Callable[[str], None]
PLAIN = Variant()  # one micro-batch, nothing recomputed


def force(
    problem: Problem,
    strategy: str,
    limit: float,
    progress: Progress = lambda _: None,
    variant: Variant = PLAIN,
) -> list[Settled | Alternative]:
    """Every mesh of a named strategy: settled, or an alternative that says why not.

    `problem` is that of one of the variant's micro-batches. Strategies without a mesh for so many
    devices give nothing.
    """
    tried: list[Settled | Alternative] = []
    for sizes in meshes_of_strategy(strategy, problem.cluster.size):
        start = time.perf_counter()
        tried.append(_try(problem, strategy, sizes, limit, variant))
        label = " x ".join(map(str, sizes.values()))
        progress(f"{strategy} on {label}: {time.perf_counter() - start:.1f} s")
    return tried


def force_within(
    frames: Frames, graph: Graph, request: Request, strategy: str, progress: Progress
) -> list[Settled | Alternative]:
    """A named strategy in the first of the requested variants in which it fits.

    They come in the order of what they cost: few micro-batches first, then little recomputation;
    only the leanest comes second.
    """
    modes = sorted(request.modes, key=MODES.index)
    variants = [Variant(n, mode) for n in sorted(request.micro_batches) for mode in modes]
    # Where the leanest does not fit, none does.
    variants[1:1] = variants[:0:-1][:1]
    tried: list[Settled | Alternative] = []
    for i, variant in enumerate(dict.fromkeys(variants)):
        problem = frames.problem_at(graph, request.at(variant.micro_batches), request.cluster)
        found = force(problem, strategy, request.memory_limit, progress, variant)
        tried += found
        fits = any(isinstance(one, Settled) for one in found)
        if (fits and i != 1) or (i == 1 and not fits):
            break
    return tried


def check_forced(
    tried: list[Settled | Alternative], strategy: str, limit: float, size: int
) -> None:
    """Raise UserError where a strategy that was asked for has no plan."""
    if any(isinstance(one, Settled) for one in tried):
        return
    if not tried:
        raise UserError(
            f"the strategy {strategy!r} needs a mesh of two axes, and {size} devices make none",
            fix="use a number of devices that is a product of two, or strategy='auto'",
        )
    short = [one for one in tried if isinstance(one, Alternative) and one.memory_bytes]
    if not short:
        first = tried[0]
        why = first.why if isinstance(first, Alternative) else ""
        raise UserError(
            f"the strategy {strategy!r} does not apply to this model: {why}",
            fix="use strategy='auto' or 'data'",
        )
    least = min(short, key=lambda one: one.memory_bytes or 0)
    needs = float(least.memory_bytes or 0)
    raise UserError(
        f"the model fits on no plan: the leanest ({least.mesh}) needs {bytes_text(needs)} per "
        f"device, the limit is {bytes_text(limit)}: {bytes_text(needs - limit)} short",
        fix="use more devices, a smaller batch, or a higher memory_limit",
    )


def meshes_of_strategy(strategy: str, devices: int) -> list[dict[str, int]]:
    """Axis sizes, outermost first."""
    found: list[dict[str, int]] = []
    for roles in FAMILIES[strategy]:
        if len(roles) == 1 or devices == 1:
            found.append({"tp" if roles == ("tensor",) else "dp": devices})
            continue
        for outer in range(2, devices // 2 + 1):
            if devices % outer == 0:
                found.append({"dp": outer, "tp": devices // outer})
    return found


def _try(
    problem: Problem, strategy: str, sizes: dict[str, int], limit: float, variant: Variant
) -> Settled | Alternative:
    mesh = make_mesh(problem.cluster, sizes)
    roles = next(r for r in FAMILIES[strategy] if len(r) == len(sizes))
    family = problem.family(strategy, dict(zip(sizes, roles, strict=True)))
    made = settle(strategy, problem, mesh, family, variant, limit, or_leanest=True)
    if made is None or made.timeline.peak_bytes > limit:
        lean = made
        given = problem.given_bytes(variant.micro_batches)
        if made is not None and made.assignment.memory_bytes + given <= limit:
            # What a step needs for a moment is not in the programme.
            lean = settle(strategy, problem, mesh, family, variant, limit, minimise_memory=True)
        if lean is None:
            hinted = "no assignment keeps the hints"
            why = hinted if hints_in(problem.graph) else "its ops have no such split on this mesh"
            return Alternative(strategy, str(mesh), None, None, why)
        needs = lean.timeline.peak_bytes
        why = f"needs {bytes_text(needs)} per device, {bytes_text(limit)} are there"
        return Alternative(strategy, str(mesh), None, int(needs), why)
    if strategy in ("tensor", "data+tensor") and not _splits_params(made.assignment):
        why = "no parameter can be split in place"
        return Alternative(strategy, str(mesh), None, None, why)
    return made


def _splits_params(assignment: Assignment) -> bool:
    return any(
        node.meta.get("role") == "param" and any(option.gives[0].splits)
        for node, option in assignment.option.items()
    )
