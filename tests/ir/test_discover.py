"""Discovered rules: never more than is true, and at least the batch of what we know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.compat import TORCH_VERSION
from autopar.ir.discover import discover
from autopar.ir.mesh import Mesh
from autopar.ir.oracle import Oracle
from autopar.ir.registry import rule_for
from autopar.ir.rule import Choice, ShardingRule, factor_sizes, place
from tests.ir.test_rules import node_of, resolve

b, s, h, d, v = 6, 7, 4, 8, 12
R = torch.randn
# What is true but not written: splitting a head's features would only slow attention down.
CONSERVATIVE = {"aten.scaled_dot_product_attention.default"}
CALLS: list[tuple[str, Any]] = [
    ("aten.relu.default", (R(b, s),)),
    ("aten.add.Tensor", (R(b, s, d), R(d))),
    ("aten.matmul.default", (R(b, s, d), R(b, d, v))),
    ("aten.linear.default", (R(b, s, d), R(v, d), R(v))),
    ("aten.linear.default", (R(b, d), R(d, d))),
    ("aten.layer_norm.default", (R(b, s, d), [d], R(d), R(d))),
    ("aten.softmax.int", (R(b, s, d), -1)),
    ("aten.sum.dim_IntList", (R(b, s, d), [1])),
    ("aten.scaled_dot_product_attention.default", (R(b, h, s, d), R(b, h, s, d), R(b, h, s, d))),
    ("aten.embedding.default", (R(v, d), torch.randint(v, (b, s)))),
    ("aten.permute.default", (R(b, s, d), [2, 0, 1])),
    ("aten.cumsum.default", (R(b, s), 1)),
    ("aten.outer.default", (R(b), R(s))),
    ("aten.conv2d.default", (R(b, 3, 8, 8), R(5, 3, 3, 3), R(5))),
    ("aten.max.dim", (R(b, s), 1)),
    ("aten.group_norm.default", (R(b, 4, 5), 2)),
    ("aten.flatten.using_ints", (R(b, s, d),)),
    ("aten.mse_loss.default", (R(b, d), R(b, d))),
    ("aten.mean.dim", (R(b, s), [0])),
    ("aten.tril.default", (R(b, d, d),)),
]


def factor_at(rule: ShardingRule, tensor: int, dim: int) -> str | None:
    """The factor that can split a dim, if any."""
    found = (*rule.inputs, *rule.outputs)[tensor][dim]
    return found[0] if found and found[0] not in rule.whole else None


@pytest.mark.parametrize(
    ("op", "args"), CALLS, ids=[f"{op}-{i}" for i, (op, _) in enumerate(CALLS)]
)
def test_discovery_agrees_with_the_registry(op: str, args: Any) -> None:
    if op in CONSERVATIVE and TORCH_VERSION < (2, 12):
        pytest.skip("the fused attention of torch 2.11 for CPUs divides by no heads: SIGFPE")
    target = resolve(op)
    node, tensors = node_of(target, args, {}, target(*args))
    written, found = rule_for(node), discover(node)
    assert written is not None
    # No more than the truth: wherever discovery splits, so may the written rule.
    means = op in ("aten.mean.dim", "aten.mse_loss.default")
    for i, dims in enumerate(found.inputs):
        for dim in range(len(dims)):
            if factor_at(found, i, dim) and op not in CONSERVATIVE:
                assert factor_at(written, i, dim), f"{found} against {written}"
    # The leading dim of the first input is found where the written rule splits it into outputs.
    batch = factor_at(written, 0, 0)
    if batch and not means and op != "aten.embedding.default":
        assert factor_at(found, 0, 0), f"{found} against {written}"
    # And it holds in float64 on other inputs.
    doubles = [x.double() if x.is_floating_point() else x for x in tensors.values()]
    again = [doubles.pop(0) if isinstance(x, Tensor) else x for x in args]
    double, tensors = node_of(target, again, {}, target(*again))
    oracle = Oracle.of(double, list(tensors.values()))
    sizes = factor_sizes(found, [tuple(x.shape) for x in (*oracle.tensors, *oracle.outputs)])
    for factor in found.splittable():
        for n in (2, 3):
            placed = place(found, sizes, Mesh.of(x=n), {"x": Choice(factor)})
            assert placed is None or oracle.disagreement(placed, Mesh.of(x=n)) is None


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * torch.sigmoid(x) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        dx = grad * scale * (sigmoid + x * sigmoid * (1 - sigmoid))
        return dx, (grad * x * sigmoid).flatten(0, -2).sum(0)


class WrongUnderData(torch.autograd.Function):
    """Its forward is pointwise, its backward is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(0)


def discovered(target: Any, *args: Any, **kwargs: Any) -> str:
    return str(discover(node_of(target, args, kwargs, target(*args, **kwargs))[0]))


def test_user_functions_are_discovered_with_their_backward() -> None:
    assert discovered(Swish.apply, R(b, s, d), R(d)) == "abc,c->abc"
    assert discovered(WrongUnderData.apply, R(b, s)) == "[b]a->[d]a"


def test_what_mixes_everything_stays_whole() -> None:
    assert discovered(lambda x: x - x.mean(), R(b, s)) == "[a][b]->[c][d]"


def test_random_ops_stay_whole() -> None:
    assert discovered(torch.nn.functional.dropout, R(b, s), 0.5) == "[a][b]->[c][d]"


def test_failing_ops_stay_whole() -> None:
    node = node_of(torch.relu, (R(b, s),), {}, R(b, s))[0]

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("only on a GPU")

    assert str(discover(node, fails)) == "[a][b]->[c][d]"


def test_sums_maxima_and_repeats_are_recognised() -> None:
    assert discovered(lambda x: (x.sum(0), x * 2), R(b, s)) == "ab->b,ab"
    assert discovered(lambda x: x.sum(0), R(b, s)) == "ab->b"
    ids = torch.randint(9, (b, s))
    assert discovered(lambda x: x.amax(0), ids) == "ab->b; max(a)"
    assert discovered(lambda x: x.repeat_interleave(3, 0), R(b, s)) == "ab->(a[e])b"


def test_equal_sizes_need_not_be_one_factor() -> None:
    assert discovered(lambda x, w: x @ w, R(8, 8), R(8, 8)) == "ba,ac->bc"


def test_large_calls_are_tried_at_small_sizes() -> None:
    assert discovered(torch.square, R(1 << 10, 1 << 10)) == "ab->ab"


def test_calls_are_looked_up() -> None:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 3

    first = discovered(counted, R(5, 9))
    before = len(calls)
    assert discovered(counted, R(5, 9)) == first
    assert len(calls) == before + 1  # to make the second node


def test_an_op_that_answers_all_that_is_drawn_alike_is_whole() -> None:
    # Labels are 1 or -1; any others give a loss of zero, whose parts add up to zero.
    op = torch.ops.aten.cosine_embedding_loss.default
    args = (R(b, d), R(b, d), R(b))
    node, _ = node_of(op, args, {}, op(*args))
    assert str(discover(node)) == "[a][b],[c][d],[e]->."
