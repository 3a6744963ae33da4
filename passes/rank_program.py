"""One rank's program of a plan, without the run it is part of; and the rank that does most."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from autopar.cost.families import op_family, op_name
from autopar.ir.graph import Graph, tensor_inputs, value_of
from autopar.ir.parse import parse_sharding
from autopar.ir.rule import Choice
from autopar.ir.rules.common import arguments
from autopar.ir.sharding import Sharding
from autopar.kernel_use import NOWHERE, Places
from autopar.plan import Plan

from .case import Case
from .pipeline import last_of, lowering, run_passes
from .rules_of import rules_of


def storage_of(graph: Graph, plan: Plan) -> tuple[dict[str, Sharding], frozenset[str]]:
    """How a plan stores the parameters of a capture, by node, and which are gathered again."""
    storage: dict[str, Sharding] = {}
    regather: set[str] = set()
    for node in graph.placeholders("param"):
        stored = next((plan.params[f] for f in node.meta["fqns"] if f in plan.params), None)
        if stored is not None:
            storage[node.name] = parse_sharding(stored.sharding)
            if stored.regather:
                regather.add(node.name)
    return storage, frozenset(regather)


def rank_program(
    graph: Graph,
    sizes: Mapping[sympy.Symbol, int],
    plan: Plan,
    rank: int,
    kernels: Places = NOWHERE,
    check: bool = True,
) -> Graph:
    """The lowered graph of `rank`: local shapes, exchanges on groups.

    `graph` is the prepared captured graph that the plan belongs to, `sizes` are those of one
    micro-batch. `check` verifies the invariants after every pass: a program that is only counted
    does without (`pipeline.last_of`).
    """
    storage, regather = storage_of(graph, plan)
    choices = {
        node: {axis: Choice.parse(text) for axis, text in chosen.items()}
        for node, chosen in plan.choices.items()
    }
    passes = lowering(
        plan.mesh,
        rank,
        sizes,
        rules_of,
        choices,
        storage,
        regather,
        plan.recompute,
        kernels=kernels,
    )
    if not check:
        return last_of(graph, passes)
    return run_passes(graph, passes, plan.mesh)[-1].graph


def busiest_rank(case: Case) -> int:
    """The rank with the largest shards, and of split causal attention the most keys.

    The first device of an axis has the largest piece of a dim (`ir.sharding`). Of rows of causal
    attention that divide evenly, the last device sees most keys.
    """
    mesh = case.plan.mesh
    here = dict.fromkeys(mesh.names, 0)
    for node, option in case.option.items():
        if node.op != "call_function" or op_family(op_name(node.target)) != "attention":
            continue
        if arguments(node).get("is_causal") is not True:
            continue
        size = value_of(tensor_inputs(node)[0]).int_shape()[-2]
        rows = option.wants[0].splits[-2]
        if rows.is_even(size, mesh):
            here.update({axis: mesh[axis].size - 1 for axis in rows.axes})
    return mesh.rank(here)
