"""The sequence is split through attention: queries in runs of rows, keys and values gathered."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import expecttest
import pytest
import torch
import torch.fx

from autopar.capture import Capture
from autopar.cost.cluster import parse_cluster
from autopar.ir.graph import Graph, tensor_inputs, value_of
from autopar.ir.localise import Call
from autopar.ir.lowered import CAUSAL_ATTENTION
from autopar.ir.mesh import Mesh
from autopar.ir.oracle import Oracle
from autopar.ir.registry import rule_for
from autopar.ir.rule import Choice, Placed, choices, factor_sizes, place
from autopar.passes.localise_shapes import localise_shapes
from autopar.passes.rules_of import rules_of
from autopar.passes.search import search
from autopar.plan import Plan
from autopar.runtime.bindings import BINDINGS
from tests.followed_plans import following
from tests.simulate import check_zoo, concrete, lower_all, subject_of, zoo_subject
from tests.zoo.language import GPT, language_batch

from .helpers import graph_of, lowered, show

ATTENTION = """
mesh dp=2 x sp=2
%q: input f32[2, 4, 7, 8] grad "q"
%k: input f32[2, 2, 7, 8] grad "k"
%v: input f32[2, 2, 7, 8] grad "v"
%y: f32[2, 4, 7, 8] = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True, enable_gqa=True)
return %y
"""


class TestSequenceSplit(expecttest.TestCase):
    def test_rows_know_where_they_begin(self) -> None:
        mesh, graph = lowered(ATTENTION, {"y": {"dp": "e", "sp": "a"}})
        self.assertExpectedInline(
            show(localise_shapes(graph, mesh, 3)),
            """\
%q: input f32[2, 4, 7, 8] @ [-, -, -, -] grad "q"
%k: input f32[2, 2, 7, 8] @ [-, -, -, -] grad "k"
%v: input f32[2, 2, 7, 8] @ [-, -, -, -] grad "v"
%collective: f32[1, 4, 7, 8] @ [dp, -, -, -] = exchange(slice_inv, [ShardSpec(0, (1, 1))], <dp>, %q)
%collective_1: f32[1, 4, 3, 8] @ [dp, -, sp, -] = exchange(slice_inv, [ShardSpec(2, (4, 3))], <sp>, %collective)
%collective_2: f32[1, 2, 7, 8] @ [dp, -, -, -] = exchange(slice_inv, [ShardSpec(0, (1, 1))], <dp>, %k)
%collective_3: f32[1, 2, 7, 8] @ [dp, -, -, -] ~sp = exchange(pvary, [None], <sp>, %collective_2)
%collective_4: f32[1, 2, 7, 8] @ [dp, -, -, -] = exchange(slice_inv, [ShardSpec(0, (1, 1))], <dp>, %v)
%collective_5: f32[1, 2, 7, 8] @ [dp, -, -, -] ~sp = exchange(pvary, [None], <sp>, %collective_4)
%y: f32[1, 4, 3, 8] @ [dp, -, sp, -] = causal_attention(%collective_1, %collective_3, %collective_5, 4, None, True)
%collective_6: f32[2, 4, 3, 8] @ [-, -, sp, -] = exchange(gather_inv, [ShardSpec(0, (1, 1))], <dp>, %y)
%collective_7: f32[2, 4, 7, 8] @ [-, -, -, -] = exchange(gather_inv, [ShardSpec(2, (4, 3))], <sp>, %collective_6)
return %collective_7""",
        )


def through_the_pass(graph: Graph, node: torch.fx.Node, placed: Placed, mesh: Mesh) -> Oracle:
    """An oracle of a call whose devices, asked in order, call what `localise_shapes` made."""
    generator = torch.Generator().manual_seed(0)
    sources = tensor_inputs(node)
    tensors = [
        torch.randn(value_of(s).int_shape(), generator=generator, dtype=value_of(s).dtype)
        for s in sources
    ]
    for source, sharding in zip((*sources, node), (*placed.inputs, *placed.outputs), strict=True):
        source.meta["value"] = value_of(source).with_sharding(sharding)
    by_name = {n.name: n for n in graph.fx.nodes}
    ranks = itertools.count()

    def localise(
        _: torch.fx.Node, ins: Sequence[Sequence[int]], outs: Sequence[Sequence[int]]
    ) -> Call:
        local = localise_shapes(graph, mesh, next(ranks))
        call = next(n for n in local.fx.nodes if n.name == node.name)
        args = torch.fx.map_arg(call.args, lambda n: by_name[n.name])
        return BINDINGS.get(call.target, call.target), args, dict(call.kwargs)

    return replace(Oracle.of(node, tensors), localise=localise)


@pytest.mark.parametrize("keys", [7, 5], ids=["square", "fewer keys"])
@pytest.mark.parametrize("arguments", ["None, 0.0, True, enable_gqa=True", "enable_gqa=True"])
def test_rule_against_the_oracle(arguments: str, keys: int) -> None:
    """Every choice on 3 and 8 devices (some of which have no row), and pairs of choices."""
    text = f"""
        %q: input f64[2, 4, 7, 6] grad "q"
        %k: input f64[2, 2, {keys}, 6] grad "k"
        %v: input f64[2, 2, {keys}, 6] grad "v"
        %y: f64[2, 4, 7, 6] = aten.scaled_dot_product_attention(%q, %k, %v, {arguments})
        return %y
    """
    graph = graph_of(text)
    node = next(iter(graph.calls()))
    rule = rule_for(node)
    assert rule is not None and "a" in rule.splittable()
    shapes = [value_of(n).int_shape() for n in (*tensor_inputs(node), node)]
    sizes = factor_sizes(rule, shapes)
    cases = [(Mesh.of(x=n), {"x": c}) for n in (3, 8) for c in choices(rule)]
    cases += [
        (Mesh.of(x=2, y=2), {"x": a, "y": b}) for a, b in itertools.combinations(choices(rule), 2)
    ]
    cases.append((Mesh.of(x=2, y=2), {"x": Choice("a"), "y": Choice("a")}))
    for mesh, chosen in cases:
        placed = place(rule, sizes, mesh, chosen, uneven=True)
        if placed is not None:
            problem = through_the_pass(graph, node, placed, mesh).disagreement(placed, mesh)
            assert problem is None, f"{problem}: {mesh} {chosen}"


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", Mesh.of(sp=3)),
        ("gpt_attention_dropout", Mesh.of(dp=2, sp=2)),
        ("hf_llama", Mesh.of(sp=2)),
    ],
    ids=str,
)
def test_zoo_with_a_split_sequence(name: str, mesh: Mesh) -> None:
    """Rotary tables, positions, masks, dropout and the loss follow the split of the tokens."""
    subject = zoo_subject(name)
    graph = concrete(subject)
    dims = {axis: {"dp": 0, "sp": 1}[axis] for axis in mesh.names}
    decisions = following(graph, rules_of(graph), mesh, dims)
    programs = lower_all(subject.graph, subject.capture.symbols, decisions)
    causal = [n for n in programs[-1].calls() if n.target is CAUSAL_ATTENTION]
    assert len(causal) == (2 if name == "llama" else 0)
    split = sum("sp" in chosen for chosen in decisions.choices.values())
    assert split > 0.6 * len(decisions.choices)
    check_zoo(name, decisions)


@pytest.mark.parametrize(("batch", "factor"), [(1, "a"), (8, "e")], ids=["sequence", "batch"])
def test_a_long_sequence_is_split_where_the_batch_cannot_be(batch: int, factor: str) -> None:
    length = 4096
    model = GPT(128, dim=64, heads=4, context=length)
    subject = subject_of(model, *language_batch(128, length, 0, batch))
    plan = planned(subject.capture, "1x8xH100")
    attentions = [n.name for n in subject.graph.calls() if "attention" in n.name]
    assert len(attentions) == 2
    for name in attentions:
        assert set(plan.choices[name].values()) == {factor}, plan.choices[name]
        assert set(plan.choices[name]) == set(plan.mesh.names)


def planned(made: Capture, cluster: str) -> Plan:
    return search(made.graph, made.fingerprint, made.symbols, parse_cluster(cluster))
