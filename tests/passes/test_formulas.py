"""Formulas against the planner's prices: every option of every op, and every edge."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import sympy
import torch
import torch.fx

from autopar.cost.cluster import make_mesh, parse_cluster
from autopar.cost.evaluate import Settings, compiled
from autopar.ir.graph import Graph, values_of
from autopar.passes.bucket_collectives import BUCKET_BYTES
from autopar.passes.columns import edges_of, passes_on
from autopar.passes.formulas import Formulas
from autopar.passes.narrow_gathers import travelling_value, wear_casts
from autopar.passes.options import Option, call_options, param_options
from autopar.passes.price import Pricer
from autopar.passes.rules_of import rules_of
from autopar.passes.specialise import specialise
from tests.autocast import Autocast
from tests.simulate import subject_of, zoo_subject
from tests.zoo import ZOO

from .helpers import graph_of

Node = torch.fx.Node
Rows = list[tuple[str, sympy.Expr, float]]  # what, formula, price
B = sympy.Symbol("b", integer=True, positive=True)


def priced(
    graph: Graph, hints: Mapping[sympy.Symbol, int], cluster: str, sizes: Mapping[str, int]
) -> tuple[Rows, Settings]:
    """Every option and edge of a graph with its formula and its price on one mesh."""
    concrete = wear_casts(specialise(graph, hints))
    rules = rules_of(concrete)
    where = parse_cluster(cluster)
    pricer = Pricer(where, make_mesh(where, sizes))
    made = Formulas(graph, concrete, rules, hints, pricer.mesh, pricer.device)
    rows: Rows = []
    options: dict[Node, list[Option]] = {}
    for node in concrete.calls():
        if passes_on(node):
            continue
        rule = rules[node.name]
        options[node] = call_options(node, rule, pricer.mesh, pricer, lambda *_: True)
        for o in options[node]:
            op = made.op(node, o.choices)
            what = f"{node} {[f'{axis}: {choice}' for axis, choice in o.choices]}"
            rows.append((f"{what} time", op.seconds, o.time_s))
            rows.append((f"{what} forward", op.forward_seconds, o.forward_s))
            rows.append((f"{what} saved", op.saved, o.memory_bytes))
    for node in concrete.placeholders("param"):
        readers = [e for e in edges_of(concrete) if e.producer is node and e.consumer in options]
        wanted = dict.fromkeys(o.wants[e.slot] for e in readers for o in options[e.consumer])
        options[node] = param_options(node, wanted, pricer.mesh, pricer)
        for o in options[node]:
            stored = made.stored(node, o.gives[0])
            update = pricer.update_time_s(node, o.gives[0])
            rows.append((f"{node} {o.gives[0]} stored", stored.stored, o.memory_bytes))
            rows.append((f"{node} {o.gives[0]} update", stored.seconds, update))
    rows += edges(concrete, options, pricer, made)
    return rows, Settings({s.name: n for s, n in hints.items()}, sizes)


def edges(
    graph: Graph, options: Mapping[Node, list[Option]], pricer: Pricer, made: Formulas
) -> Rows:
    rows: Rows = []
    seen = set()
    for e in edges_of(graph):
        gives = {(o.gives[e.port], o.regather) for o in options.get(e.producer, ())}
        wants = {o.wants[e.slot] for o in options.get(e.consumer, ())}
        value, role = values_of(e.producer)[e.port], e.producer.meta.get("role")
        moved = travelling_value(e.producer, e.port)
        for source, regather in gives:
            for want in wants:
                key = (value, moved, role, source, want, regather)
                price = pricer.edge_time_s(e.producer, e.port, source, want, regather)
                if key in seen or price == float("inf"):
                    continue
                seen.add(key)
                edge = made.edge(e.producer, e.port, source, want, regather)
                kept = pricer.saved_input_bytes(e.producer, e.port, source, want, regather)
                again = pricer.edge_forward_s(e.producer, e.port, source, want)
                what = f"{e.producer}.{e.port} {source} {regather} for {e.consumer} {want}"
                rows.append((f"{what} time", edge.seconds, price))
                rows.append((f"{what} kept", edge.kept, kept))
                rows.append((f"{what} forward", edge.forward_seconds, again))
    return rows


def assert_agrees(rows: Rows, settings: Settings, cluster: str) -> None:
    formulas = list(dict.fromkeys(formula for _, formula, _ in rows))
    where = parse_cluster(cluster)
    values = compiled(formulas, where, BUCKET_BYTES)(settings)[:, 0]
    at = dict(zip(formulas, values, strict=True))
    for what, formula, price in rows:
        assert np.isclose(at[formula], price, rtol=1e-9, atol=1e-18), (what, formula, price)


@pytest.mark.parametrize(
    ("name", "cluster", "sizes"),
    [
        ("mlp", "cpu:4", {"dp": 2, "tp": 2}),
        ("gpt", "2x2xH100", {"dp": 4}),
        ("resnet", "cpu:4", {"dp": 4}),
        ("moe_index", "cpu:4", {"tp": 4}),
    ],
)
def test_every_option_costs_what_its_formula_says(
    name: str, cluster: str, sizes: dict[str, int]
) -> None:
    subject = zoo_subject(name)
    rows, settings = priced(subject.graph, subject.capture.symbols, cluster, sizes)
    assert len(rows) > 100
    assert_agrees(rows, settings, cluster)


def test_what_is_cast_costs_what_its_formula_says() -> None:
    torch.manual_seed(0)
    args, kwargs = ZOO["mlp"].inputs(0, torch.float32)
    subject = subject_of(Autocast(ZOO["mlp"].build()), args, kwargs)
    rows, settings = priced(subject.graph, subject.capture.symbols, "2x2xH100", {"dp": 2, "tp": 2})
    assert_agrees(rows, settings, "2x2xH100")


UNEVEN = """
%w: param f32[30, 20] grad "w"
%x: input f32[b, 6, 20] "x"
%y: f32[b, 6, 30] = aten.linear(%x, %w)
%z: f32[6*b, 30] = aten.view(%y, [-1, 30])
%s: f32[6*b, 30] = aten.gelu(%z)
return %s
"""


@pytest.mark.parametrize("batch", [4, 6, 12])
def test_uneven_shards_are_rounded_up(batch: int) -> None:
    graph = graph_of(UNEVEN)
    rows, settings = priced(graph, {B: batch}, "cpu:4", {"dp": 4})
    assert_agrees(rows, settings, "cpu:4")


def test_formulas_hold_on_other_meshes_and_batches() -> None:
    graph = graph_of(UNEVEN)
    made, _ = priced(graph, {B: 8}, "cpu:8", {"dp": 2, "tp": 2})
    formulas = {what: formula for what, formula, _ in made}
    for batch, dp, tp in ((8, 4, 2), (24, 2, 4), (20, 4, 1)):
        rows, settings = priced(graph, {B: batch}, "cpu:8", {"dp": dp, "tp": tp})
        # Splits have a layout (`dp*6`) only where they are uneven: such values have other names.
        shared = [(what, formulas[what], price) for what, _, price in rows if what in formulas]
        assert len(shared) > len(made) / 3
        assert_agrees(shared, settings, "cpu:8")
