"""Every hand-written rule, tested by running the op whole and on shards and recombining."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor

from autopar.errors import PassError
from autopar.ir.graph import Value, tensor_inputs, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.oracle import Oracle, flat
from autopar.ir.registry import RULES, describe, mean_like, reduction_scale, rule_for
from autopar.ir.rule import Choice, choices, factor_sizes, place
from tests.ir.rule_samples import SAMPLES, Draw

SEEDS = 3
# Factors that the op splits only with help of the runtime, whose tests cover them.
BY_RUNTIME = {"aten.embedding.default", "aten.cross_entropy_loss.default"}


# Ops that refuse to differentiate some of their inputs: only the first one's gradient is compared.
FIRST_ONLY = (
    "aten.batch_norm autopar.batch_norm aten.instance_norm aten.nll_loss aten.nll_loss_nd "
    "aten.cross_entropy_loss aten.nll_loss2d aten.soft_margin_loss aten.hinge_embedding_loss"
).split()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def resolve(op: str) -> Any:
    if op.startswith("autopar.") and importlib.util.find_spec("autopar.ops"):
        importlib.import_module("autopar.ops")
    space, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, space), name), overload)


def value(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Value(tuple(x.shape), x.dtype, requires_grad=x.requires_grad)
    if isinstance(x, (list, tuple)):
        return tuple(map(value, x))
    return None


def node_of(
    target: Any, args: Any, kwargs: Any, result: Any
) -> tuple[torch.fx.Node, dict[torch.fx.Node, Tensor]]:
    """A call of `target` in a graph of its own, and the tensors that its inputs stand for."""
    graph = torch.fx.Graph()
    tensors: dict[torch.fx.Node, Tensor] = {}

    def placeholder(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            node = graph.placeholder(f"x{len(tensors)}")
            node.meta["value"] = value(arg)
            tensors[node] = arg
            return node
        if isinstance(arg, (list, tuple)):
            return type(arg)(map(placeholder, arg))
        return arg

    new_args = placeholder(tuple(args))
    new_kwargs = {key: placeholder(arg) for key, arg in kwargs.items()}
    node = graph.call_function(target, new_args, new_kwargs)
    node.meta["value"] = value(result)
    return node, tensors


def numbered() -> list[Any]:
    counts: Counter[str] = Counter()
    found = []
    for op, builder in SAMPLES:
        counts[op] += 1
        found.append(pytest.param(op, builder, counts[op], id=f"{op}-{counts[op]}"))
    return found


def is_unfilled(op: str) -> bool:
    return "empty" in op


@pytest.mark.parametrize(("op", "builder", "number"), numbered())
def test_shards_recombine(op: str, builder: Any, number: int) -> None:
    target = resolve(op)
    for seed in range(SEEDS):
        args, kwargs = builder(Draw(1000 * number + seed))
        result = target(*args, **kwargs)
        node, tensors = node_of(target, args, kwargs, result)
        rule = rule_for(node)
        assert rule is not None
        expected = flat(result)
        ranks = [x.dim() for x in (*(tensors[s] for s in tensor_inputs(node)), *expected)]
        assert [len(dims) for dims in (*rule.inputs, *rule.outputs)] == ranks, str(rule)
        if not rule.factors:
            continue
        shapes = [tuple(tensors[s].shape) for s in tensor_inputs(node)]
        shapes += [tuple(x.shape) for x in expected]
        sizes = factor_sizes(rule, shapes)
        for dims, shape in zip((*rule.inputs, *rule.outputs), shapes, strict=True):
            for dim, size in zip(dims, shape, strict=True):
                if dim and not set(dim) <= rule.whole:
                    assert math.prod(sizes[f] for f in dim) == size, str(rule)
        if is_unfilled(op):
            continue
        oracle = Oracle.of(
            node,
            list(tensors.values()),
            leaves=[0] if op.rpartition(".")[0] in FIRST_ONLY else None,
        )
        possible = [c for c in choices(rule) if c.factor not in rule.comm]
        meshes: list[tuple[Mesh, list[dict[str, Choice]]]] = [
            (Mesh.of(x=2), [{"x": c} for c in possible]),
            (Mesh.of(x=3), [{"x": c} for c in possible]),
        ]
        pairs = [{"x": a, "y": b} for a, b in itertools.product(possible[1:], repeat=2)]
        random.Random(seed).shuffle(pairs)
        meshes.append((Mesh.of(x=2, y=2), pairs[:6]))
        for mesh, combinations in meshes:
            for chosen in combinations:
                placed = place(rule, sizes, mesh, chosen, uneven=True)
                if placed is None or (rule.whole == set(rule.factors) and not rule.linear):
                    continue
                text = f"{rule} on {mesh} {[str(c) for c in chosen.values()]} {shapes} {node.args}"
                try:
                    problem = oracle.disagreement(placed, mesh)
                except PassError:
                    assert op in BY_RUNTIME
                except Exception as error:
                    raise AssertionError(text) from error
                else:
                    assert problem is None, f"{problem}: {text}"


def test_every_rule_has_a_sample() -> None:
    names = {op for op, _ in SAMPLES} | {op.rpartition(".")[0] for op, _ in SAMPLES}
    assert sorted(set(RULES) - names) == []
