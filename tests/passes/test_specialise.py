"""Symbolic sizes become the sizes of one batch."""

from __future__ import annotations

import expecttest
import sympy

from autopar.ir.parse import parse_argument
from autopar.passes.specialise import specialise

from .helpers import graph_of, show

SYMBOLIC = """
%x: input f32[b, s, 8] "x"
%y: f32[b*s, 8] = aten.reshape(%x, [b*s, 8])
%z: f32[b, 8] = aten.select.int(%x, 1, s - 1)
%c: f32[3, s, 8] = aten.slice.Tensor(%x, 0, 0, b//2)
%p: (f32[b, 8], i64[b, 8]) = aten.max.dim(%x, 1)
return %y, %z, %c, %p
"""


class TestSpecialise(expecttest.TestCase):
    def test_sizes_and_arguments(self) -> None:
        b, s = (parse_argument(name, {}) for name in "bs")
        made = specialise(graph_of(SYMBOLIC), {b: 7, s: 5})
        self.assertExpectedInline(
            show(made),
            """\
%x: input f32[7, 5, 8] "x"
%y: f32[35, 8] = aten.reshape(%x, [35, 8])
%z: f32[7, 8] = aten.select.int(%x, 1, 4)
%c: f32[3, 5, 8] = aten.slice.Tensor(%x, 0, 0, 3)
%p: (f32[7, 8], i64[7, 8]) = aten.max.dim(%x, 1)
return %y, %z, %c, %p""",
        )

    def test_types_of_numbers(self) -> None:
        """An integral size is an int, another number a float: torch tells them apart."""
        b = sympy.Symbol("b", integer=True, positive=True)
        graph = graph_of('%x: input f32[b] "x"\n%y: f32[b] = aten.mul.Scalar(%x, b/2)\nreturn %y')
        even = next(specialise(graph, {b: 4}).calls()).args[1]
        odd = next(specialise(graph, {b: 5}).calls()).args[1]
        assert (type(even), even) == (int, 2)
        assert (type(odd), odd) == (float, 2.5)

    def test_nothing_to_do(self) -> None:
        text = '%x: input f32[4] "x"\n%y: f32[4] = aten.neg(%x)\nreturn %y'
        graph = graph_of(text)
        assert show(specialise(graph, {})) == text

    def test_the_input_is_left_alone(self) -> None:
        graph = graph_of(SYMBOLIC)
        before = show(graph)
        b, s = (parse_argument(name, {}) for name in "bs")
        specialise(graph, {b: 7, s: 5})
        assert show(graph) == before
