"""Outputs that autograd keeps for an op alone, and those that a reader keeps as well."""

from __future__ import annotations

from autopar.passes.kept import own_outputs

from .helpers import graph_of

TEXT = """
%w: param f32[8, 8] grad "w"
%x: input f32[4, 8] "x"
%y: f32[4, 8] = aten.linear(%x, %w)
%a: f32[4, 8] = aten.relu(%y)
%b: f32[4, 8] = aten.linear(%a, %w)
%c: f32[4, 8] = aten.relu(%b)
%d: f32[] = aten.sum(%c)
return %d
"""


def test_what_a_product_keeps_is_not_kept_twice() -> None:
    nodes = {node.name: node for node in graph_of(TEXT).calls()}
    assert own_outputs(nodes["a"]) == ()  # the second product keeps it
    assert own_outputs(nodes["c"]) == (0,)  # the sum does not
    assert own_outputs(nodes["y"]) == ()  # a product keeps no output
