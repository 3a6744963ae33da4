"""What else was looked at, and why it was not chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx

from autopar.cost.cluster import make_mesh
from autopar.ir.graph import tensor_inputs, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding
from autopar.plan import Alternative
from autopar.units import bytes_text

from .accounts import NONE, Accounts
from .frame import Variant
from .options import Option, place_call
from .price import Pricer
from .problem import Problem
from .programme import evaluate, passes_on
from .propose import Proposal
from .settle import Settled
from .staged_plan import schedule_text

SHOWN = 12  # other meshes that a plan lists

Node = torch.fx.Node


def not_chosen(
    problem: Problem,
    best: Settled,
    tried: Sequence[Settled | Alternative],
    proposals: Sequence[Proposal],
    limit: float,
) -> list[Alternative]:
    """The candidates but the best, and one device, each with the reason why it lost.

    `tried` were settled or have their reason, of `proposals` only bounds and relaxations are known.
    """
    best_s, given = best.timeline.step_s, problem.given_bytes(1)
    found: list[Alternative] = []
    shown = {(str(best.mesh), best.variant)}
    for one in tried:
        if one is best:
            continue
        if isinstance(one, Alternative):
            found.append(one)
            continue
        shown.add((str(one.mesh), one.variant))
        found.append(
            Alternative(
                one.name,
                _mesh_text(one.mesh, one.variant) + schedule_text(one),
                one.timeline.step_s,
                int(one.timeline.peak_bytes),
                _why(one, best),
            )
        )
    # Bounds are of the programme: compare them with what it says of the best, not its timeline.
    least = best.programme_s or best_s
    told = {one.mesh for one in found}
    for p in proposals:
        if len(found) >= SHOWN:
            break
        if (str(p.mesh), p.variant) in shown or (p.relaxed is None and p.bound_s <= 0):
            continue
        if _mesh_text(p.mesh, p.variant) in told:
            continue
        shown.add((str(p.mesh), p.variant))
        ratio = p.bound_s / least if least > 0 else 1.0
        if p.relaxed is not None:
            why = f"{ratio:.2f}x by its relaxation"
            found.append(
                Alternative(
                    "auto",
                    _mesh_text(p.mesh, p.variant),
                    best_s * ratio,
                    int(p.relaxed.memory_bytes + given),
                    why,
                )
            )
        else:
            why = f"at least {ratio:.2f}x: its bound"
            needs = p.least_bytes + given
            if limit < needs < float("inf"):
                why = f"needs at least {bytes_text(needs)} per device"
            found.append(Alternative("auto", _mesh_text(p.mesh, p.variant), None, None, why))
    if problem.cluster.size > 1:
        found.append(_one_process(problem, best_s))
    return found


def above_limit(settled: Sequence[Settled], limit: float) -> list[Alternative]:
    """Candidates whose steps take more than the limit for a moment."""
    if not settled:
        return []
    least: dict[str, float] = {}
    for one in settled:
        text, needs = _mesh_text(one.mesh, one.variant), one.timeline.peak_bytes
        least[text] = min(needs, least.get(text, needs))
    there = f"per device for a moment, {bytes_text(limit)} are there"
    return [
        Alternative("auto", text, None, int(needs), f"needs {bytes_text(needs)} {there}")
        for text, needs in least.items()
    ]


def _why(one: Settled, best: Settled) -> str:
    a, b = one.timeline, best.timeline
    gaps = {
        "communication": a.exposed_total_s - b.exposed_total_s,
        "compute": a.compute_s - b.compute_s,
        "optimizer": a.optimizer_s - b.optimizer_s,
        "bubble": a.bubble_s - b.bubble_s,
    }
    reason = max(gaps, key=gaps.__getitem__)
    if gaps[reason] <= 1e-3 * b.step_s or b.step_s <= 0:
        return "as good as the chosen plan"
    return f"{a.step_s / b.step_s:.2f}x: {reason} +{gaps[reason] * 1e3:.3g} ms"


def _mesh_text(mesh: Mesh, variant: Variant) -> str:
    parts = [str(mesh)]
    if variant.micro_batches > 1:
        parts.append(f"{variant.micro_batches} micro-batches")
    if variant.mode != NONE:
        parts.append(f"{variant.mode} recomputation")
    return ", ".join(parts)


def _one_process(problem: Problem, best_s: float) -> Alternative:
    """The same step on one device (on a CPU: one process with all the threads)."""
    mesh = make_mesh(problem.cluster, {"dp": 1})
    pricer = Pricer(problem.cluster, mesh, problem.optimizer)
    options: dict[Node, Option] = {}
    for node, first in problem.blocks.representative.items():
        if first is not node and first in options:
            options[node] = options[first]
        elif node.op == "output" or (node.op == "call_function" and not passes_on(node)):
            values = [v for s in tensor_inputs(node) for v in values_of(s)[:1]]
            wants = tuple(Sharding.replicated(v.rank) for v in values)
            gives = tuple(Sharding.replicated(v.rank) for v in values_of(node))
            time_s = memory = 0.0
            if node.op == "call_function":
                placed = place_call(node, problem.rules[node.name], mesh, {})
                assert placed is not None
                time_s = pricer.compute_time_s(node, placed)
                memory = pricer.saved_output_bytes(node, placed)
            options[node] = Option((), wants, gives, time_s, memory)
        elif node.op == "placeholder" and values_of(node):
            value = values_of(node)[0]
            whole = Sharding.replicated(value.rank)
            is_param = node.meta["role"] == "param"
            options[node] = Option(
                (),
                (),
                (whole,),
                pricer.update_time_s(node, whole) if is_param else 0.0,
                pricer.stored_bytes(value, whole) if is_param else 0.0,
            )
    accounts = Accounts(pricer, problem.regions)
    time_s, memory_bytes = evaluate(problem.graph, problem.blocks, options, accounts)
    memory_bytes += problem.given_bytes(1)
    name = "one process, all threads" if problem.cluster.single else "one device"
    faster = time_s < best_s
    ratio = time_s / best_s if best_s > 0 else 1.0
    why = f"{ratio:.2f}x: " + ("faster; start one process" if faster else "compute")
    return Alternative(name, "single", time_s, int(memory_bytes), why)
