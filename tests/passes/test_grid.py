"""Prices on many meshes at once are those of each mesh alone, priced exactly.

Options of a frame are made on a mesh whose axes have size two. Where a mesh divides every dim
evenly they are the options of that mesh, and prices agree to rounding. Elsewhere:

- a dim that is a product (batch times sequence, flattened) is split in whole units of its factor on
  a real mesh, but as if by elements where size two divides it evenly: shards are then at most one
  unit smaller than they really are;
- an op all of whose dims are such products counts as legal on an axis larger than the factor.

Both make a step look cheaper, never dearer: a bound stays a bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.fx

from autopar.cost.cluster import parse_cluster
from autopar.ir.graph import tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Placed
from autopar.passes.accounts import Accounts, overlap_of, regions_of
from autopar.passes.columns import Edge, Flow
from autopar.passes.frame import Frame, Priced, Variant, build_frame
from autopar.passes.options import Option, place_call
from autopar.passes.price import Pricer
from autopar.passes.problem import Problem, problem_of
from autopar.passes.propose import Request, Roles, meshes_of
from tests.autocast import Autocast
from tests.simulate import Subject, subject_of
from tests.zoo import ZOO

Node = torch.fx.Node
EXACT = 1e-9

ONE: Roles = (("dp", "any"),)
TWO: Roles = (("dp", "any"), ("tp", "any"))
SEQUENCE: Roles = (("dp", "batch"), ("cp", "sequence"), ("tp", "feature"))
EXPERT: Roles = (("dp", "batch"), ("ep", "expert"), ("tp", "feature"))
SHARDED: Roles = (("dp", "batch"), ("fsdp", "batch"), ("tp", "feature"))

CASES = [
    ("mlp", "cpu:8", TWO),
    ("mlp", "4x8xH100", SHARDED),
    ("gpt_outside", "cpu:8", ONE),
    ("gpt_outside", "8xH100", TWO),
    ("gpt_outside", "4x8xH100", SEQUENCE),
    ("gpt_attention_dropout", "4x8xH100", (("dp", "batch"), ("tp", "feature"))),
    ("resnet", "4x8xH100", ONE),
    ("resnet", "cpu:8", TWO),
    ("moe_scatter", "4x8xH100", ONE),
    ("moe_scatter", "cpu:8", EXPERT),
    ("moe_sort", "8xH100", ONE),
    ("rec", "8xH100", SHARDED),
]
WORN = [("mlp:autocast", "cpu:8", TWO), ("mlp:autocast", "4x8xH100", SHARDED)]
IDS = [f"{name}-{cluster}-{len(roles)}" for name, cluster, roles in CASES]


@cache
def captured(name: str) -> Subject:
    """A zoo model in single precision (`name:bf16` in that, or under autocast), any batch."""
    torch.manual_seed(0)
    name, _, narrow = name.partition(":")
    dtype = torch.bfloat16 if narrow == "bf16" else torch.float32
    args, kwargs = ZOO[name].inputs(0, dtype)
    module = ZOO[name].build().to(dtype)
    return subject_of(Autocast(module) if narrow == "autocast" else module, args, kwargs)


@cache
def problem(name: str, spec: str, micro_batches: int = 1) -> Problem:
    """A zoo model's problem at the sizes of one micro-batch."""
    made = captured(name)
    cluster = parse_cluster(spec)
    sizes = Request(cluster, made.capture.symbols, 0.0).at(micro_batches)
    return problem_of(made.graph, sizes, cluster, "adamw")


@cache
def frame(name: str, spec: str, roles: Roles) -> Frame:
    return build_frame(problem(name, spec), dict(roles))


def priced(case: tuple[str, str, Roles], micro_batches: int) -> Priced:
    name, spec, roles = case
    meshes = list(meshes_of(roles, parse_cluster(spec)))
    symbols = problem(name, spec, micro_batches).symbols
    return frame(*case).priced(meshes, parse_cluster(spec), symbols)


@dataclass(frozen=True)
class Alone:
    """One option of a frame on one mesh at the sizes of one micro-batch, by the scalar path."""

    node: Node
    row: int
    at: int
    mesh: Mesh
    twin: Node
    placed: Placed | None
    option: Option | None
    is_even: bool


def alone(case: tuple[str, str, Roles], micro_batches: int, most: int = 1000) -> Iterator[Alone]:
    """Options of every call on every mesh; at most `most` or so of each, of all kinds."""
    name, spec, roles = case
    exact = problem(name, spec, micro_batches)
    twins = {node.name: node for node in exact.graph.fx.nodes}
    for at, mesh in enumerate(meshes_of(roles, exact.cluster)):
        pricer = Pricer(exact.cluster, mesh)
        for node, options in frame(*case).options.items():
            if node.op != "call_function":
                continue
            twin, rule = twins[node.name], exact.rules[node.name]
            for row in range(0, len(options), -(-len(options) // most)):
                o = options[row]
                placed = place_call(twin, rule, mesh, dict(o.choices))
                option = None
                if placed is not None:
                    times = pricer.op_times_s(twin, rule, placed, dict(o.choices))
                    kept = pricer.saved_output_bytes(twin, placed)
                    option = Option(
                        o.choices, placed.inputs, placed.outputs, sum(times), kept, False, times[0]
                    )
                even = placed is not None and _is_even(twin, placed, mesh)
                yield Alone(node, row, at, mesh, twin, placed, option, even)


def _is_even(node: Node, placed: Placed, mesh: Mesh) -> bool:
    values = [*(value_of(n) for n in tensor_inputs(node)), *values_of(node)]
    return all(
        split.is_even(size, mesh)
        for value, sharding in zip(values, (*placed.inputs, *placed.outputs), strict=True)
        for split, size in zip(sharding.splits, value.int_shape(), strict=True)
    )


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_options_are_those_of_their_mesh(case: tuple[str, str, Roles], micro_batches: int) -> None:
    """Seconds and bytes of every option, and whether it is one: as on its mesh alone."""
    found, checked, refused = priced(case, micro_batches), 0, 0
    pricers = {mesh: Pricer(found.pricer.grid.cluster, mesh) for mesh in found.pricer.grid.meshes}
    for one in alone(case, micro_batches, most=7):
        grid, told = found.options[one.node], f"{one.node} option {one.row} on {one.mesh}"
        legal = bool(grid.legal[one.row, one.at])
        if one.option is None or one.placed is None:
            rule = frame(*case).problem.rules[one.node.name]
            dims = [dim for tensor in (*rule.inputs, *rule.outputs) for dim in tensor]
            assert not legal or any(len(dim) > 1 for dim in dims), told
            refused += not legal
            continue
        assert legal, told
        made = sum(
            pricers[one.mesh].local_bytes(value, sharding)
            for value, sharding in zip(values_of(one.twin), one.placed.outputs, strict=True)
        )
        pairs = [
            (one.option.forward_s, grid.forward_s),
            (one.option.time_s - one.option.forward_s, grid.backward_s),
            (one.option.memory_bytes, grid.kept_bytes),
            (made, grid.made_bytes),
        ]
        for scalar, array in pairs:
            got = float(array[one.row, one.at])
            if one.is_even:
                assert got == pytest.approx(scalar, rel=EXACT, abs=1e-18), told
            else:
                assert 0.45 * scalar <= got <= scalar * (1 + EXACT) + 1e-18, told
        checked += one.is_even
    assert checked > 15


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[9], WORN[1]], ids=str)
def test_parameters_cost_what_they_cost_on_their_mesh(case: tuple[str, str, Roles]) -> None:
    """The optimizer's seconds and the stored bytes of every way to store a parameter."""
    found, checked = priced(case, 1), 0
    for at, mesh in enumerate(found.pricer.grid.meshes):
        pricer = Pricer(found.pricer.grid.cluster, mesh)
        for node, options in frame(*case).options.items():
            if node.op != "placeholder" or node.meta["role"] != "param":
                continue
            value, grid = value_of(node), found.options[node]
            for row, option in enumerate(options):
                (split,) = option.gives
                sizes = zip(split.splits, value.int_shape(), strict=True)
                room = all(s.parts(mesh) <= n // (s.outer * s.block) for s, n in sizes)
                assert bool(grid.legal[row, at]) == room, (node, split, mesh)
                if not room:
                    continue
                seconds = pricer.update_time_s(node, split) + 1e-9 * option.regather
                assert grid.backward_s[row, at] == pytest.approx(seconds, rel=EXACT)
                stored = pricer.stored_bytes(value, split)
                assert grid.kept_bytes[row, at] == pytest.approx(stored, rel=EXACT)
                checked += 1
    assert checked > 20


# Steps --------------------------------------------------------------------------------------------

NARROW = [("mlp:bf16", "cpu:8", TWO), ("mlp:bf16", "4x8xH100", SHARDED), *WORN]
VARIANTS = [Variant(1, "none"), Variant(2, "selective"), Variant(4, "full")]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.micro_batches}-{v.mode}")
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5], *NARROW], ids=str)
def test_columns_cost_what_accounts_say(case: tuple[str, str, Roles], variant: Variant) -> None:
    """Options and reshards of a whole step, under micro-batches, recomputation and overlap."""
    name, spec, _ = case
    made, exact = frame(*case), problem(name, spec, variant.micro_batches)
    table = made.table(priced(case, variant.micro_batches), variant)
    built = made.programme(table, 1.5 * float(table.least_s.min()))
    assert built is not None
    columns, prices = built
    options = {(one.at, one.node, one.row): one for one in alone(case, variant.micro_batches)}
    at = len(table.meshes) - 1
    pricer = Pricer(exact.cluster, table.meshes[at], micro_batches=variant.micro_batches)
    regions = regions_of(exact.graph, exact.blocks)
    modes = dict.fromkeys(range(len(regions.copies)), variant.mode)
    overlap = overlap_of(exact.cluster, table.meshes[at])
    accounts = Accounts(pricer, regions, variant.micro_batches, modes, overlap)
    cost, late, hides, memory = (np.zeros(columns.size) for _ in range(4))
    even = np.ones(columns.size, dtype=bool)
    for node, listed in columns.options.items():
        if node.op != "call_function":
            first = columns.first[node]
            for array, price in ((cost, prices.cost), (memory, prices.memory)):
                array[first : first + len(listed)] = price[first : first + len(listed), at]
            continue
        for i, option in enumerate(listed):
            column = columns.first[node] + i
            one = options[at, node, made.options[node].index(option)]
            even[column] = one.is_even
            if one.option is None:
                continue
            count = columns.count[node]
            cost[column] = count * accounts.option_time_s(one.twin, one.option)
            memory[column] = accounts.option_memory(one.twin, one.option, count)
            hides[column] = overlap * cost[column]
    twins = {node.name: node for node in exact.graph.fx.nodes}
    for column, item, times in columns.time.triples():
        flow = _twin(columns.flows[item], twins)
        seconds = times * accounts.flow_time_s(flow)
        (late if overlap and accounts.overlaps(flow) else cost)[column] += seconds
        cost[column] += times * accounts.sums_s(flow)
        summed = flow.source if flow.regather else flow.want
        shape = values_of(flow.producer)[flow.port].int_shape()
        dims = zip(summed.splits, shape, strict=True)  # of uneven ones, the mean is taken there
        even[column] &= all(split.is_even(n, table.meshes[at]) for split, n in dims)
    for column, item, times in columns.memory.triples():
        flow = _twin(columns.flows[item], twins)
        memory[column] += accounts.flow_memory(flow, times)
        # A whole gradient is counted by its largest shard there, by the mean one here.
        shape = values_of(flow.producer)[flow.port].int_shape()
        summed = flow.source if flow.regather else flow.want
        dims = zip(summed.splits, shape, strict=True)
        even[column] &= all(split.is_even(n, table.meshes[at]) for split, n in dims)
    assert even.sum() > 100
    for scalar, array in (
        (cost, prices.cost),
        (late, prices.late),
        (hides, prices.hides),
        (memory, prices.memory),
    ):
        np.testing.assert_allclose(array[even, at], scalar[even], rtol=EXACT, atol=1e-18)


def _twin(flow: Flow, twins: dict[str, Node]) -> Flow:
    """The same flow in the graph of one micro-batch."""
    readers = tuple(
        Edge(twins[e.producer.name], e.port, twins[e.consumer.name], e.slot) for e in flow.readers
    )
    return replace(flow, producer=twins[flow.producer.name], readers=readers)


def test_sizes_other_than_those_of_the_frame() -> None:
    """A frame made at a batch of two prices a batch of 64 as a frame made there does."""
    made = captured("moe_scatter")
    cluster = parse_cluster("8xH100")
    (symbol,) = made.capture.symbols
    meshes = list(meshes_of(TWO, cluster))
    frames = [
        build_frame(problem_of(made.graph, {symbol: batch}, cluster, "adamw"), dict(TWO))
        for batch in (2, 64)
    ]
    small, large = (f.priced(meshes, cluster, {symbol: 64}) for f in frames)
    twins = {node.name: node for node in frames[0].options}
    compared = 0
    for node, options in frames[1].options.items():
        twin = twins.get(node.name)
        if node.op != "call_function" or twin is None:
            continue
        rows = {o.choices: i for i, o in enumerate(frames[0].options[twin])}
        for row, option in enumerate(options):
            if option.choices not in rows:
                continue
            there = rows[option.choices]
            a, b = small.options[twin], large.options[node]
            assert (a.legal[there] == b.legal[row]).all(), (node, option.choices)
            ok = b.legal[row]
            np.testing.assert_allclose(a.made_bytes[there][ok], b.made_bytes[row][ok], rtol=EXACT)
            # Routed rows are counted on the frame's batch, here smaller than the mesh, and scaled.
            near = 1e-2 if frames[1].problem.rules[node.name].routes else EXACT
            np.testing.assert_allclose(a.forward_s[there][ok], b.forward_s[row][ok], rtol=near)
            compared += 1
    assert compared > 300
