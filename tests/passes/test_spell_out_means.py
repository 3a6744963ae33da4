"""A mean over targets is a sum and a count, with the same value and the same gradients."""

from __future__ import annotations

import itertools
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ir.graph import Graph
from autopar.ir.interpret import run_graph
from autopar.ir.verify import verify
from autopar.passes.spell_out_means import spell_out_means

from .helpers import graph_of, show

PLAIN = """
%x: input f64[6, 5] grad "x"
%t: input i64[6] "t"
%y: f64[] = aten.cross_entropy_loss(%x, %t, None, 1, 2)
%z: f64[] = aten.mul.Tensor(%y, 2.0)
return %y, %z
"""


class TestSpellOutMeans(expecttest.TestCase):
    def test_ignored_targets(self) -> None:
        """Every reader of the mean reads the quotient."""
        self.assertExpectedInline(
            show(spell_out_means(graph_of(PLAIN))),
            """\
%x: input f64[6, 5] grad "x"
%t: input i64[6] "t"
%y: f64[] = aten.cross_entropy_loss(%x, %t, None, 2, 2, 0.0)
%ne_scalar: bool[6] = aten.ne.Scalar(%t, 2)
%sum_default: f64[] = aten.sum(%ne_scalar, dtype=f64)
%div_tensor: f64[] = aten.div.Tensor(%y, %sum_default)
%z: f64[] = aten.mul.Tensor(%div_tensor, 2.0)
return %div_tensor, %z""",
        )

    def test_nothing_to_do(self) -> None:
        for text in (
            PLAIN.replace("None, 1, 2", "None, 2, 2"),
            PLAIN.replace("%t, None", "%t, %w"),
        ):
            if "%w" in text:  # weights that are trained
                text = '%w: param f64[5] grad "w"\n' + text
            graph = graph_of(text)
            assert show(spell_out_means(graph)) == show(graph)


def module(kind: str, weighted: bool, smoothing: float, dtype: torch.dtype) -> Graph:
    name = {torch.float64: "f64", torch.bfloat16: "bf16"}[dtype]
    logits = {"tokens": "[2, 3, 5]", "maps": "[2, 5, 3]", "flat": "[6, 5]"}.get(kind, "[6, 5]")
    targets = f"{name}[6, 5]" if kind == "soft" else "i64[6]" if kind == "flat" else "i64[2, 3]"
    if kind == "likelihood":
        targets = "i64[6]"
    op = "autopar.cross_entropy" if kind == "tokens" else "aten.cross_entropy_loss"
    rest = f"{'%w' if weighted else 'None'}, 1, 2"
    if kind == "likelihood":
        op = "aten.nll_loss_nd"
    elif kind != "soft":
        rest += f", {smoothing}"
    else:
        rest = f"{'%w' if weighted else 'None'}, 1, -100, {smoothing}"
    return graph_of(
        f'%w: buffer {name}[5] "w"\n%x: input {name}{logits} grad "x"\n%t: input {targets} "t"\n'
        f"%y: {name}[] = {op}(%x, %t, {rest})\nreturn %y"
    )


CASES = [
    (kind, weighted, smoothing, torch.float64)
    for kind, weighted, smoothing in itertools.product(
        ("flat", "tokens", "maps", "soft", "likelihood"), (False, True), (0.0, 0.1)
    )
    if kind != "likelihood" or not smoothing
] + [("flat", False, 0.0, torch.bfloat16)]


@pytest.mark.parametrize(("kind", "weighted", "smoothing", "dtype"), CASES)
def test_same_value_and_gradient(
    kind: str, weighted: bool, smoothing: float, dtype: torch.dtype
) -> None:
    graph = module(kind, weighted, smoothing, dtype)
    made = spell_out_means(graph)
    verify(made, None, ("typed", "topological", "functional"))
    assert "div" in show(made)
    generator = torch.Generator().manual_seed(0)
    shape = {"tokens": (2, 3, 5), "maps": (2, 5, 3)}.get(kind, (6, 5))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = (F.log_softmax(x, 1) if kind == "likelihood" else x).requires_grad_()
    ids = torch.tensor([0, 2, 1, 2, 4, 3])
    target: Any = ids.view(2, 3) if kind in ("tokens", "maps") else ids
    if kind == "soft":
        target = torch.rand(6, 5, generator=generator, dtype=dtype)
    weights = torch.linspace(0.5, 2.0, 5, dtype=dtype)
    pairs = [_run(g, x, target, weights) for g in (graph, made)]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    for a, b in zip(*pairs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def _run(graph: Graph, x: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    (loss,) = run_graph(graph, [weights, x, target])
    (gradient,) = torch.autograd.grad(loss, x)
    return loss, gradient
