"""Why no plan keeps the user's hints."""

from __future__ import annotations

from autopar.cost.cluster import make_mesh
from autopar.errors import PassError, UserError

from .hints import check_possible, hints_at, hints_in, without_hints
from .price import Pricer
from .problem import Problem, options_of, problem_of


def no_candidate(problem: Problem) -> Exception:
    """What to raise where a search has not a single candidate; UserError if hints are to blame."""
    hints = hints_in(problem.graph)
    if not hints:
        return PassError("search", "a_candidate_exists", "no mesh has an assignment")
    devices = problem.cluster.size
    try:
        _check_each(problem, devices)
    except UserError as error:
        return error
    listed = "; ".join(map(str, hints))
    together = " together" if len(hints) > 1 else ""
    return UserError(
        f"no plan for {devices} devices keeps the hints{together}: {listed}",
        fix="leave one out, name no axis, or use another number of devices",
    )


def _check_each(problem: Problem, devices: int) -> None:
    """Raise UserError for a hint that no option of its own node allows."""
    assert problem.symbolic is not None
    graph = without_hints(problem.symbolic)
    bare = problem_of(graph, problem.symbols, problem.cluster, problem.optimizer)
    outer = next((n for n in range(2, devices) if devices % n == 0), devices)
    sizes = {"dp": outer} | ({"tp": devices // outer} if outer < devices else {})
    mesh = make_mesh(problem.cluster, sizes)
    pricer = Pricer(problem.cluster, mesh, problem.optimizer)
    family = bare.family("auto", dict.fromkeys(sizes, "any"))
    options = options_of(bare, mesh, pricer, family)
    stands_for = {node.name: bare.blocks.representative[node] for node in bare.graph.fx.nodes}
    for node in problem.graph.fx.nodes:
        known = options.get(stands_for[node.name])
        if hints_at(node) and known:
            check_possible(node, known, devices)
