"""Every hand-written rule, tested by running the op whole and on shards and recombining."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import sympy
import torch
import torch.fx
from torch import Tensor

from autopar.compat import TORCH_VERSION
from autopar.errors import PassError
from autopar.ir.graph import Value, tensor_inputs
from autopar.ir.mesh import Mesh
from autopar.ir.oracle import Oracle, flat
from autopar.ir.registry import RULES, describe, mean_like, reduction_scale, rule_for
from autopar.ir.rule import Choice, choices, factor_sizes, place
from tests.ir.rule_samples import SAMPLES, Draw

SEEDS = 3
# Factors that the op splits only with help of the runtime, whose tests cover them.
BY_RUNTIME = {
    "aten.embedding.default",
    "aten.cross_entropy_loss.default",
    "autopar.cross_entropy.default",
    "aten.scaled_dot_product_attention.default",
    "aten._grouped_mm.default",
    "transformers.grouped_mm_fallback.default",
}


# Ops that refuse to differentiate some of their inputs: only the first one's gradient is compared.
FIRST_ONLY = [
    "aten.batch_norm",
    "autopar.batch_norm",
    "aten.instance_norm",
    "aten.nll_loss",
    "aten.nll_loss_nd",
    "aten.cross_entropy_loss",
    "autopar.cross_entropy",
    "aten.nll_loss2d",
    "aten.soft_margin_loss",
    "aten.hinge_embedding_loss",
    "aten.rrelu_with_noise",
]
# Ops with no gradient here, and those whose rule says that the gradient needs more.
NO_GRADIENT = [
    "aten.floor_divide",
    "aten.heaviside",
    "aten.copy",
    "aten.randint_like",
    "aten.scatter",
    "aten.max",
    "aten.min",
    "aten.amax",
    "aten.amin",
    *(["aten.aminmax"] if TORCH_VERSION < (2, 12) else []),  # 2.11 cannot differentiate it
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def resolve(op: str) -> Any:
    if op.startswith("autopar.") and importlib.util.find_spec("autopar.ops"):
        importlib.import_module("autopar.ops")
        importlib.import_module("autopar.token_ops")
        importlib.import_module("autopar.complex_ops")
    if op.startswith("transformers."):
        pytest.importorskip("transformers.integrations.moe")
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


def leaves(op: str, tensors: Iterable[Tensor]) -> list[int] | None:
    """Inputs whose gradients are compared; None means all."""
    name = op.rpartition(".")[0]
    if name in NO_GRADIENT and not any(x.requires_grad for x in tensors):
        return []
    return [0] if name in FIRST_ONLY else None


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
        oracle = Oracle.of(node, list(tensors.values()), leaves=leaves(op, tensors.values()))
        possible = [c for c in choices(rule) if not rule.communicates_over(c.factor)]
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


def only(op: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
    target = resolve(op)
    return node_of(target, args, kwargs, target(*args, **kwargs))[0]


def described(op: str, *args: Any, **kwargs: Any) -> str:
    return describe(only(op, *args, **kwargs))


def test_rules_read_as_in_the_documentation() -> None:
    x = torch.randn
    assert described("aten.linear.default", x(2, 3, 4), x(5, 4), x(5)) == (
        "bca,da,d->bcd; linear(0) linear(1) once(2)"
    )
    assert described("aten.layer_norm.default", x(2, 3, 4), [4], x(4)) == "ab[c],[c]->ab[c]"
    assert described("aten.split.Tensor", x(2, 12), 4, -1) == "a([c]b)->ab,ab,ab; linear(0)"
    ids = torch.zeros(6, dtype=torch.long)
    assert described("aten.cross_entropy_loss.default", x(6, 9), ids) == "ba,b->.; comm(a)"
    tokens = ids.view(2, 3)
    assert described("autopar.cross_entropy.default", x(2, 3, 9), tokens) == "bca,bc->.; comm(a)"
    assert described("autopar.addmm.default", x(5), x(2, 3, 4), x(4, 5)) == (
        "d,bca,ad->bcd; linear(1) linear(2) once(0)"
    )
    assert described("aten.embedding.default", x(9, 4), ids) == "ab,c->cb; route(c>a)"
    q, k = x(2, 4, 5, 6), x(2, 2, 5, 6)
    attend = "aten.scaled_dot_product_attention.default"
    assert described(attend, q, k, k, None, 0.0, True, enable_gqa=True) == (
        "e(fg)a[c],ef[b][c],ef[b][d]->e(fg)a[d]"
    )


def test_views_of_symbolic_sizes_split_into_factors() -> None:
    s = sympy.Symbol("s0", positive=True, integer=True)

    def view(before: Any, after: Any) -> str:
        node = only("aten.view.default", torch.zeros(1), [1])
        node.args[0].meta["value"] = Value(before, torch.float32)
        node.meta["value"] = Value(after, torch.float32)
        return describe(node).partition(";")[0]

    assert view((128 * s, 768), (s, 128, 768)) == "(ab)c->abc"
    assert view((s, 128, 768), (128 * s, 768)) == "abc->(ab)c"
    assert view((s, 128, 768), (s, 128, 12, 64)) == "ab(cd)->abcd"
    assert view((s, 6, 4), (8 * s, 3)) == "a[b][c]->(a[d])[e]"
    assert view((s, s), (s**2,)) == "ab->(ab)"


def test_gradients_of_maxima_keep_dims_whole() -> None:
    x = torch.randn(3, 4)
    assert described("aten.amax.default", x, [1]) == "ab->a; max(b)"
    assert described("aten.amax.default", x.clone().requires_grad_(), [1]) == "a[b]->a"


def test_reduction_scale_names_means() -> None:
    x = torch.randn(3, 4)
    assert mean_like(only("aten.mean.dim", x, [1]))
    assert mean_like(only("aten.mse_loss.default", x, x))
    assert reduction_scale(only("aten.mse_loss.default", x, x, reduction=2)) == "sum"
    assert reduction_scale(only("aten.sum.default", x)) == "sum"
    assert reduction_scale(only("aten.relu.default", x)) is None


def test_ops_without_a_rule_say_so() -> None:
    node = only("aten.fft_fft.default", torch.randn(4))
    assert rule_for(node) is None
    assert describe(node) == "no rule for aten.fft_fft.default"
