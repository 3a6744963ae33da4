"""Where nothing seems to fit: the leanest candidate, and what is faster in little more memory."""

from __future__ import annotations

from dataclasses import replace

from autopar.errors import UserError
from autopar.ir.graph import Graph
from autopar.units import bytes_text

from .impossible import no_candidate
from .propose import Frames, Request
from .settle import Settled, settle
from .settle_best import Found

LEAN = 4  # candidates that are made as lean as they can be


def leanest(found: Found, request: Request, frames: Frames, graph: Graph) -> Settled:
    """The candidate that needs least memory; raises UserError if that is too much."""
    limit = request.memory_limit
    lean: list[Settled] = []
    for p in sorted(found.proposals, key=lambda p: p.least_bytes)[:LEAN]:
        sizes = request.at(p.variant.micro_batches)
        problem = frames.problem_at(graph, sizes, request.cluster)
        family = problem.family("auto", p.frame.roles)
        made = settle("auto", problem, p.mesh, family, p.variant, limit, minimise_memory=True)
        if made is not None:
            lean.append(made)
    lean += found.above
    if not lean:
        raise no_candidate(frames.problem_at(graph, request.symbols, request.cluster))
    least = min(lean, key=lambda s: s.timeline.peak_bytes)
    needs, mesh = least.timeline.peak_bytes, least.mesh
    if needs <= limit:
        return _faster(least, limit)
    raise UserError(
        f"the model fits on no plan: the leanest found ({mesh}) needs {bytes_text(needs)} per "
        f"device, the limit is {bytes_text(limit)}: {bytes_text(needs - limit)} short",
        fix="use more devices, a smaller batch, or a higher memory_limit",
    )


def _faster(least: Settled, limit: float) -> Settled:
    """What is fastest in little more memory than the leanest assignment, if that fits.

    The gap of either is unknown: it is given as one.
    """
    names = dict(least.roles)
    family = least.problem.family("auto", names)
    best, given = least, least.problem.given_bytes(least.variant.micro_batches)
    for more in (1.02, 1.1, 1.3):
        room = least.assignment.memory_bytes * more + given
        made = settle("auto", least.problem, least.mesh, family, least.variant, room)
        fits = made is not None and made.timeline.peak_bytes <= limit
        if made is not None and fits and made.timeline.step_s < best.timeline.step_s:
            best = made
    return replace(best, assignment=replace(best.assignment, gap=1.0))
