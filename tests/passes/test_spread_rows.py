"""Copies and weights of routed rows, folded into the scatter; and what is left alone."""

from __future__ import annotations

import expecttest
import pytest

from autopar.ir.lowered import ROUTED_SCATTER
from autopar.passes.spread_rows import spread_rows

from .helpers import program, show

PROGRAM = """
mesh dp=2
%x: input f32[8, 4] "x"
%tokens: input f32[3, 4] "tokens"
%slot: input i64[6] "slot"
%w: input f32[6] "w"
%column: f32[6, 1] = aten.reshape(%w, [6, 1])
%lone: f32[3, 1, 4] = aten.reshape(%tokens, [3, 1, 4])
%wide: f32[3, 2, 4] = aten.expand(%lone, [3, 2, 4])
%copies: f32[6, 4] = aten.reshape(%wide, [6, 4])
%scaled: f32[6, 4] = aten.mul.Tensor(%copies, %column)
%out: f32[8, 4] = routed_scatter(%x, [%slot], %scaled, Route(0, (16,), ((0, 8), (8, 16))), <dp>, True)
return %out
"""


def spread(text: str) -> tuple[str, str]:
    """What is said of the scatter, and the program after it."""
    _, graph = program(text)
    (node,) = (n for n in graph.calls() if n.target is ROUTED_SCATTER)
    said = spread_rows(graph, node)
    return said, show(graph)


class TestProgram(expecttest.TestCase):
    def test_weighted_copies(self) -> None:
        said, text = spread(PROGRAM)
        assert said == "weighted copies in 2"
        self.assertExpectedInline(
            text,
            """\
%x: input f32[8, 4] "x"
%tokens: input f32[3, 4] "tokens"
%slot: input i64[6] "slot"
%w: input f32[6] "w"
%column: f32[6, 1] = aten.reshape(%w, [6, 1])
%lone: f32[3, 1, 4] = aten.reshape(%tokens, [3, 1, 4])
%out: f32[8, 4] = routed_scatter(%x, [%slot], %lone, Route(0, (16,), ((0, 8), (8, 16))), <dp>, True, weight=%column, ways=2)
return %out""",
        )

    def test_copies_alone(self) -> None:
        product = "%scaled: f32[6, 4] = aten.mul.Tensor(%copies, %column)\n"
        said, text = spread(PROGRAM.replace(product, "").replace("%scaled", "%copies"))
        assert said == "copies in 2"
        assert "routed_scatter(%x, [%slot], %lone, " in text

    def test_weights_alone_where_the_copies_have_another_reader(self) -> None:
        said, text = spread(PROGRAM.replace("return %out", "return %out, %copies"))
        assert said == "weighted copies in 1"
        assert "routed_scatter(%x, [%slot], %copies, " in text


REPLACED = {
    "another reader": ("return %out", "return %out, %scaled"),
    "a product of rows": ("(%copies, %column)", "(%copies, %copies)"),
    "weights of more bits": ("%column: f32", "%column: f64"),
    "scaled besides": ("<dp>, True)", "<dp>, True, scale=2.0)"),
}


@pytest.mark.parametrize("why", REPLACED)
def test_left_alone(why: str) -> None:
    old, new = REPLACED[why]
    assert old in PROGRAM
    text = PROGRAM.replace(old, new)
    said, after = spread(text)
    assert said == ""
    assert after == show(program(text)[1])
