"""The types of lowered graphs, checked by somebody else: PyPI's `spmd_types`.

Its R (replicated, gradient partial) is our V, its I (invariant) our R, its V (varying) our S, and P
is P. Every op's output type is inferred from its inputs' by its rules and its table of linear ops;
what a split contraction leaves is V to it until it is said to be partial, as ours is.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch

from autopar.ir.graph import Graph, Value, tensor_inputs, values_of
from autopar.ir.lowered import LoweredOp
from autopar.ir.mesh import Mesh
from autopar.passes.insert_reshards import insert_reshards
from autopar.passes.lower_collectives import lower_collectives
from autopar.passes.programme import is_getitem
from autopar.passes.propagate import propagate
from autopar.passes.rules_of import rules_of
from tests.random_plans import MESHES, random_decisions
from tests.simulate import Decisions, concrete, decisions_of, plan_of, zoo_subject

from .helpers import program

pytest.importorskip("spmd_types")
from spmd_types._checker import _OP_REGISTRY, OpLinearity, infer_local_type_for_axis
from spmd_types._mesh_axis import MeshAxis
from spmd_types.types import I, P, R, SpmdTypeError, V

THEIRS = {"R": I, "V": R, "S": V, "P": P}
AXIS = MeshAxis.of(2, 1)


def typed_graph(name: str, decisions: Decisions) -> Graph:
    graph = concrete(zoo_subject(name))
    made = propagate(graph, decisions.mesh, rules_of(graph), decisions.choices, decisions.storage)
    return lower_collectives(insert_reshards(made), decisions.mesh)


def complaints(graph: Graph, mesh: Mesh) -> tuple[list[str], Counter[str]]:
    """What `spmd_types` does not accept, and how often each type was inferred."""
    found: list[str] = []
    seen: Counter[str] = Counter()
    for node in graph.calls():
        if isinstance(node.target, LoweredOp) or is_getitem(node):
            continue
        rule = node.meta.get("rule")
        for axis in mesh.names:
            if rule is not None and _communicates(node, rule, axis):
                continue
            sentence = _complaint(node, axis, seen)
            if sentence is not None:
                found.append(f"%{node.name} on {axis}: {sentence}")
    return found, seen


def _communicates(node: torch.fx.Node, rule: Any, axis: str) -> bool:
    chosen = node.meta.get("chosen", {}).get(axis)
    return chosen is not None and rule.communicates_over(chosen.factor)


def _makes_pieces(node: torch.fx.Node, axis: str) -> bool:
    """Whether what an op splits is a dim of its outputs only."""
    chosen, rule = node.meta.get("chosen", {}).get(axis), node.meta.get("rule")
    if chosen is None or not chosen.factor:
        return False
    return not any(chosen.factor in dim for dims in rule.inputs for dim in dims)


def _complaint(node: torch.fx.Node, axis: str, seen: Counter[str]) -> str | None:
    inputs = [value for source in tensor_inputs(node) for value in values_of(source)]
    outputs = values_of(node)
    if not inputs or any(_extreme(value, axis) for value in (*inputs, *outputs)):
        return None
    types = [THEIRS[_kind(value, axis)] for value in inputs]
    grads = any(value.requires_grad for value in outputs)
    no_grad = [not (value.requires_grad and grads) for value in inputs]
    linearity = _linearity(node)
    if P in types and linearity is None:
        return None  # an op that their table lacks
    ours = _kind(outputs[0], axis)
    partial = ours == "P"
    try:
        if "linear" in str(node.target) and len(inputs) == 3:
            product = _infer(types[:2], no_grad[:2], OpLinearity.MULTILINEAR, partial)
            got = _infer([product, types[2]], [False, no_grad[2]], OpLinearity.LINEAR, False)
        else:
            got = _infer(types, no_grad, linearity or OpLinearity.NONLINEAR, partial)
    except SpmdTypeError as error:
        return str(error).splitlines()[0]
    seen[str(got)] += 1
    wanted = {THEIRS[ours]} if grads or ours in "SP" else {I, R}
    if _makes_pieces(node, axis):
        wanted.add(R)  # `expand`, say: every rank makes its piece of what all could make whole
    return None if got in wanted else f"{got}, but ours is {ours}"


def _infer(types: list[Any], no_grad: list[bool], linearity: Any, partial: bool) -> Any:
    return infer_local_type_for_axis(
        AXIS, types, out_partial=partial and V in types, linearity=linearity, no_grad=no_grad
    )


def _linearity(node: torch.fx.Node) -> Any:
    """How their table says that an op treats partial values; None if it does not say."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    if name == "linear":
        return OpLinearity.MULTILINEAR
    for owner in (torch, torch.Tensor, torch.nn.functional):
        spec = _OP_REGISTRY.get(getattr(owner, name, None))  # type: ignore[arg-type]
        if spec is not None:
            return spec.linearity
    return None


def _kind(value: Value, axis: str) -> str:
    assert value.sharding is not None
    kind = value.sharding.kind(axis)
    return "R" if kind == "V" and not value.requires_grad else kind


def _extreme(value: Value, axis: str) -> bool:
    """A partial maximum is no type of theirs."""
    assert value.sharding is not None
    return dict(value.sharding.partial).get(axis, "sum") != "sum"


@pytest.mark.parametrize("strategy", ["zero", "data+tensor"])
@pytest.mark.parametrize("name", ["mlp", "gpt_outside", "llama", "resnet", "vit"])
def test_plans(name: str, strategy: str) -> None:
    decisions = decisions_of(zoo_subject(name), plan_of(zoo_subject(name), 4, strategy))
    found, seen = complaints(typed_graph(name, decisions), decisions.mesh)
    assert found == []
    assert sum(seen.values()) >= 5


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt_outside", "moe"])
def test_random_plans(name: str) -> None:
    graph = concrete(zoo_subject(name))
    rules = rules_of(graph)
    for seed in range(4):
        random = Random(seed)
        decisions = random_decisions(graph, rules, random.choice(MESHES), random)
        found, _ = complaints(typed_graph(name, decisions), decisions.mesh)
        assert found == [], seed


def test_it_sees_an_invariant_weight() -> None:
    """The checker is not asleep: a weight that is R beside a split batch is refused."""
    mesh, graph = program(
        """
        mesh dp=2
        %w: param f32[8, 4] @ [-, -] grad "w"
        %x: input f32[2, 4] @ [dp, -] "x"
        %y: f32[2, 8] @ [dp, -] = aten.linear(%x, %w)
        return
        """
    )
    (sentence,) = complaints(graph, mesh)[0]
    assert "Invariant type" in sentence
    assert "cannot mix" in sentence


def test_it_sees_a_partial_value_that_is_used() -> None:
    mesh, graph = program(
        """
        mesh tp=2
        %x: input f32[2, 4] @ [-, -] +tp grad "x"
        %b: input f32[4] @ [-] ~tp grad "b"
        %y: f32[2, 4] @ [-, -] +tp = aten.add.Tensor(%x, %b)
        return
        """
    )
    (sentence,) = complaints(graph, mesh)[0]
    assert "Partial" in sentence
