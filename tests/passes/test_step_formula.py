"""The formula of a step against the planner's accounts, under everything that a plan may ask for."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import sympy

from autopar.cost.cluster import make_mesh, parse_cluster
from autopar.cost.evaluate import Settings, compiled
from autopar.ir.mesh import Mesh
from autopar.passes.accounts import FULL, SELECTIVE, regions_of
from autopar.passes.bucket_collectives import BUCKET_BYTES
from autopar.passes.case import Case, make_case, scaled_mesh
from autopar.passes.rules_of import rules_of
from autopar.passes.specialise import specialise
from autopar.passes.step_formula import BATCH, Terms, step_formula
from autopar.plan import Plan, Prediction, Recompute, Storage
from tests.random_plans import random_decisions
from tests.simulate import Subject, zoo_subject

CPU = parse_cluster("cpu:4")
PODS = parse_cluster("2x2xH100")


@pytest.fixture(scope="module")
def gpt() -> Subject:
    return zoo_subject("gpt")


def random_plan(subject: Subject, mesh: Mesh, seed: int) -> Plan:
    """A legal plan that nobody would choose."""
    graph = specialise(subject.graph, subject.capture.symbols)
    made = random_decisions(graph, rules_of(graph), mesh, Random(seed))
    names = {n.name: n.meta["fqns"][0] for n in graph.placeholders("param")}
    return Plan(
        subject.capture.fingerprint,
        mesh,
        "cpu:4",
        "auto",
        {node: {a: str(c) for a, c in chosen.items()} for node, chosen in made.choices.items()},
        {
            names[node]: Storage(str(sharding), node in made.regather)
            for node, sharding in made.storage.items()
        },
        Prediction(1.0, 1.0, 0.0, 0.0, 1),
        hints={s.name: n for s, n in subject.capture.symbols.items()},
    )


def assert_same(case: Case) -> None:
    seconds, memory, _ = case.evaluate(case.settings())
    assert seconds[0] == pytest.approx(case.time_s, rel=1e-9)
    assert memory[0] == pytest.approx(case.memory_bytes, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_costs_what_the_planner_says(gpt: Subject, seed: int) -> None:
    cluster = (CPU, PODS)[seed % 2]
    plan = random_plan(gpt, make_mesh(cluster, {"dp": 2, "tp": 2}), seed)
    assert_same(make_case(gpt.graph, gpt.capture.symbols, plan, cluster))


@pytest.mark.parametrize(("full", "selective"), [(2, 0), (0, 2), (1, 1), (1, 0)])
def test_recomputation_is_in_the_formula(gpt: Subject, full: int, selective: int) -> None:
    plan = random_plan(gpt, make_mesh(PODS, {"dp": 2, "tp": 2}), 7)
    plain = make_case(gpt.graph, gpt.capture.symbols, plan, PODS)
    ((first, _, copies),) = plain.blocks.regions
    assert copies == 2
    again = (Recompute(first.name, copies, full, selective),)
    case = make_case(gpt.graph, gpt.capture.symbols, replace(plan, recompute=again), PODS)
    assert set(case.accounts.modes.values()) == {FULL: full, SELECTIVE: selective}.keys() - {
        mode for mode, n in ((FULL, full), (SELECTIVE, selective)) if not n
    }
    assert case.time_s > plain.time_s
    assert_same(case)


def test_micro_batches_are_a_symbol(gpt: Subject) -> None:
    plan = random_plan(gpt, make_mesh(CPU, {"dp": 2, "tp": 2}), 3)
    small = {symbol: n // 2 for symbol, n in gpt.capture.symbols.items()}
    one = make_case(gpt.graph, small, plan, CPU)
    terms = Terms(2, overlap=0.5, regions=one.accounts.regions)
    step = step_formula(one.formulas, one.blocks, one.option, terms)
    accounts = replace(one.accounts, micro_batches=2, overlap=0.5)
    want = replace(one, accounts=accounts, hints=dict(gpt.capture.symbols))
    found = compiled([step.seconds, step.memory], CPU, BUCKET_BYTES)(
        Settings({"b": gpt.capture.symbols[BATCH], "k": 2}, {"dp": 2, "tp": 2})
    )[:, 0]
    assert {s.name for s in step.seconds.free_symbols} >= {"b", "k", "n_dp"}
    np.testing.assert_allclose(found, [want.time_s, want.memory_bytes], rtol=1e-9)


def test_one_formula_serves_other_batches_and_meshes(gpt: Subject) -> None:
    plan = random_plan(gpt, make_mesh(PODS, {"dp": 2, "tp": 2}), 0)
    made = make_case(gpt.graph, gpt.capture.symbols, plan, PODS)
    for batch, devices in ((8, 4), (32, 4), (16, 2), (6, 4)):
        mesh = scaled_mesh(plan.mesh, devices)
        assert mesh is not None
        there = make_case(gpt.graph, {BATCH: batch}, replace(plan, mesh=mesh), PODS)
        at = Settings({"b": batch}, {axis.name: axis.size for axis in mesh})
        seconds, memory, _ = made.evaluate(at)
        assert seconds[0] == pytest.approx(there.time_s, rel=1e-9)
        assert memory[0] == pytest.approx(there.memory_bytes, rel=1e-9)


def test_a_block_and_the_rest_make_the_step(gpt: Subject) -> None:
    plan = random_plan(gpt, make_mesh(CPU, {"dp": 2, "tp": 2}), 1)
    case = make_case(gpt.graph, gpt.capture.symbols, plan, CPU)
    regions = regions_of(case.concrete, case.blocks)
    halves = [
        step_formula(
            case.formulas,
            case.blocks,
            case.option,
            None,
            lambda n, b=block: (regions.block(n) >= 0) == b,
        )
        for block in (True, False)
    ]
    totals = [sympy.Add(*(h.memory for h in halves)), case.step.memory]
    a, b = compiled(totals, CPU, BUCKET_BYTES)(case.settings())[:, 0]
    assert a >= b  # a reshard that readers in both share belongs to both


def test_a_mesh_takes_more_devices_on_its_data_axis() -> None:
    mesh = Mesh.of(dp=2, tp=4)
    assert str(scaled_mesh(mesh, 16)) == "dp=4 x tp=4"
    assert str(scaled_mesh(Mesh.of(tp=4), 8)) == "tp=8"
    assert scaled_mesh(mesh, 6) is None


def test_room_tells_illegal_sizes(gpt: Subject) -> None:
    plan = random_plan(gpt, make_mesh(CPU, {"dp": 4}), 2)
    case = make_case(gpt.graph, gpt.capture.symbols, plan, CPU)
    legal = case.evaluate(case.settings({"b": np.array([2.0, 4.0, 400.0])}))[2]
    assert legal.tolist() == [False, True, True]
