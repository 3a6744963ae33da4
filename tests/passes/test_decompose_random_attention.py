"""Attention with dropout is spelled out; attention without is not touched."""

from __future__ import annotations

import math

import expecttest
import pytest
import torch
import torch.nn.functional as F

from autopar.ir.interpret import run_graph
from autopar.passes.decompose_random_attention import decompose_random_attention

from .helpers import graph_of, show

INPUTS = """
%q: input f32[2, 4, 5, 8] grad "q"
%k: input f32[2, 2, 6, 8] grad "k"
%v: input f32[2, 2, 6, 8] grad "v"
"""


class TestDecomposeRandomAttention(expecttest.TestCase):
    def test_causal(self) -> None:
        graph = graph_of(
            """
            %q: input f32[2, 4, 6, 8] grad "q"
            %y: f32[2, 4, 6, 8] = aten.scaled_dot_product_attention(%q, %q, %q, None, 0.1, True)   # gpt.py:9
            return %y
            """
        )
        self.assertExpectedInline(
            show(decompose_random_attention(graph)),
            """\
%q: input f32[2, 4, 6, 8] grad "q"
%transpose_int: f32[2, 4, 8, 6] = aten.transpose.int(%q, -2, -1)   # gpt.py:9
%matmul_default: f32[2, 4, 6, 6] = aten.matmul(%q, %transpose_int)   # gpt.py:9
%mul_tensor: f32[2, 4, 6, 6] = aten.mul.Tensor(%matmul_default, 0.35355339059327373)   # gpt.py:9
%new_ones_default: bool[6, 6] = aten.new_ones(%q, [6, 6], dtype=bool)   # gpt.py:9
%triu_default: bool[6, 6] = aten.triu(%new_ones_default, 1)   # gpt.py:9
%masked_fill_scalar: f32[2, 4, 6, 6] = aten.masked_fill.Scalar(%mul_tensor, %triu_default, -inf)   # gpt.py:9
%softmax_int: f32[2, 4, 6, 6] = aten.softmax.int(%masked_fill_scalar, -1)   # gpt.py:9
%dropout_default: f32[2, 4, 6, 6] = aten.dropout(%softmax_int, 0.1, True)   # gpt.py:9
%matmul_default_1: f32[2, 4, 6, 8] = aten.matmul(%dropout_default, %q)   # gpt.py:9
return %matmul_default_1""",
        )

    def test_grouped_queries(self) -> None:
        graph = graph_of(
            INPUTS
            + "%y: f32[2, 4, 5, 8] = aten.scaled_dot_product_attention("
            + "%q, %k, %v, None, 0.5, False, scale=1.0, enable_gqa=True)\nreturn %y"
        )
        self.assertExpectedInline(
            show(decompose_random_attention(graph)),
            """\
%q: input f32[2, 4, 5, 8] grad "q"
%k: input f32[2, 2, 6, 8] grad "k"
%v: input f32[2, 2, 6, 8] grad "v"
%unsqueeze_default: f32[2, 2, 1, 6, 8] = aten.unsqueeze(%k, -3)
%expand_default: f32[2, 2, 2, 6, 8] = aten.expand(%unsqueeze_default, [2, 2, 2, 6, 8])
%reshape_default: f32[2, 4, 6, 8] = aten.reshape(%expand_default, [2, 4, 6, 8])
%unsqueeze_default_1: f32[2, 2, 1, 6, 8] = aten.unsqueeze(%v, -3)
%expand_default_1: f32[2, 2, 2, 6, 8] = aten.expand(%unsqueeze_default_1, [2, 2, 2, 6, 8])
%reshape_default_1: f32[2, 4, 6, 8] = aten.reshape(%expand_default_1, [2, 4, 6, 8])
%transpose_int: f32[2, 4, 8, 6] = aten.transpose.int(%reshape_default, -2, -1)
%matmul_default: f32[2, 4, 5, 6] = aten.matmul(%q, %transpose_int)
%mul_tensor: f32[2, 4, 5, 6] = aten.mul.Tensor(%matmul_default, 1.0)
%softmax_int: f32[2, 4, 5, 6] = aten.softmax.int(%mul_tensor, -1)
%dropout_default: f32[2, 4, 5, 6] = aten.dropout(%softmax_int, 0.5, True)
%matmul_default_1: f32[2, 4, 5, 8] = aten.matmul(%dropout_default, %reshape_default_1)
return %matmul_default_1""",
        )

    def test_nothing_to_do(self) -> None:
        text = (
            '%q: input f32[2, 4, 6, 8] grad "q"\n'
            "%y: f32[2, 4, 6, 8] = aten.scaled_dot_product_attention(%q, %q, %q, None, 0.0, True)\n"
            "return %y"
        )
        assert show(decompose_random_attention(graph_of(text))) == text


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("None, 1e-12, True", {"is_causal": True}),
        ("%m, 1e-12", {"attn_mask": "float"}),
        ("%m, 1e-12", {"attn_mask": "bool"}),
        ("None, 1e-12, False, scale=0.7, enable_gqa=True", {"scale": 0.7, "enable_gqa": True}),
    ],
)
def test_it_is_attention(arguments: str, options: dict[str, object]) -> None:
    """With a dropout that drops nothing the numbers are those of torch's attention."""
    torch.manual_seed(0)
    heads = 2 if "gqa" in arguments else 4
    kind = options.get("attn_mask")
    dtype = "bool" if kind == "bool" else "f64"
    graph = graph_of(
        f"""
        %q: input f64[2, 4, 5, 8] grad "q"
        %k: input f64[2, {heads}, 6, 8] grad "k"
        %v: input f64[2, {heads}, 6, 8] grad "v"
        %m: input {dtype}[5, 6] "m"
        %y: f64[2, 4, 5, 8] = aten.scaled_dot_product_attention(%q, %k, %v, {arguments})
        return %y
        """
    )
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, heads, 6, 8, dtype=torch.float64).unbind(0)
    m = torch.randn(5, 6, dtype=torch.float64)
    m[2] = -math.inf  # a query that sees nothing
    mask = m > -1.0 if kind == "bool" else m
    settings = options | ({"attn_mask": mask} if kind else {})
    expected = F.scaled_dot_product_attention(q, k, v, **settings)  # type: ignore[arg-type]
    (got,) = run_graph(decompose_random_attention(graph), [q, k, v, mask])
    torch.testing.assert_close(got, expected)
