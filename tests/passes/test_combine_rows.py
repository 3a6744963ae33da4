"""The weighted sum of routed rows, folded into the gather; and what is left alone."""

from __future__ import annotations

import expecttest
import pytest

from autopar.ir.lowered import ROUTED_GATHER
from autopar.passes.combine_rows import combine_rows

from .helpers import program, show

PROGRAM = """
mesh dp=2
%x: input f32[8, 4] "x"
%slot: input i64[6] "slot"
%w: input f32[6] "w"
%rows: f32[6, 4] = routed_gather(%x, [%slot], Route(0, (16,), ((0, 8), (8, 16))), <dp>)
%column: f32[6, 1] = aten.reshape(%w, [6, 1])
%scaled: f32[6, 4] = aten.mul.Tensor(%rows, %column)
%view: f32[3, 2, 4] = aten.reshape(%scaled, [3, 2, 4])
%sum: f32[3, 4] = aten.sum.dim_IntList(%view, [1])
%out: f32[3, 4] = aten.erfinv(%sum)
return %out
"""
RESIDUAL = PROGRAM.replace(
    "%out: f32[3, 4] = aten.erfinv(%sum)",
    """\
%h: f32[1, 3, 4] = aten.exp(%z)
%seen: f32[1, 3, 4] = aten.reshape(%sum, [1, 3, 4])
%out: f32[1, 3, 4] = aten.add.Tensor(%h, %seen)""",
).replace("%rows", '%z: input f32[1, 3, 4] "z"\n%rows', 1)


def combined(text: str) -> tuple[str, str]:
    """What is said of the gather, and the program after it."""
    _, graph = program(text)
    (node,) = (n for n in graph.calls() if n.target is ROUTED_GATHER)
    said = combine_rows(graph, node)
    return said, show(graph)


class TestProgram(expecttest.TestCase):
    def test_folded(self) -> None:
        said, text = combined(PROGRAM)
        assert said == "weighted sum of 2"
        self.assertExpectedInline(
            text,
            """\
%x: input f32[8, 4] "x"
%slot: input i64[6] "slot"
%w: input f32[6] "w"
%column: f32[6, 1] = aten.reshape(%w, [6, 1])
%rows: f32[3, 4] = routed_gather(%x, [%slot], Route(0, (16,), ((0, 8), (8, 16))), <dp>, weight=%column, ways=2, shape=(3, 4), dtype=f32)
%out: f32[3, 4] = aten.erfinv(%rows)
return %out""",
        )

    def test_with_a_residual_in_another_shape(self) -> None:
        said, text = combined(RESIDUAL)
        assert said == "weighted sum of 2 | add(a0, x)"
        self.assertExpectedInline(
            text,
            """\
%x: input f32[8, 4] "x"
%slot: input i64[6] "slot"
%w: input f32[6] "w"
%z: input f32[1, 3, 4] "z"
%column: f32[6, 1] = aten.reshape(%w, [6, 1])
%h: f32[1, 3, 4] = aten.exp(%z)
%rows: f32[1, 3, 4] = routed_gather(%x, [%slot], Route(0, (16,), ((0, 8), (8, 16))), <dp>, weight=%column, ways=2, shape=(1, 3, 4), dtype=f32, epilogue=pointwise("add(a0, x)"), extras=(%h,))
return %rows""",
        )

    def test_nothing_moves_past_a_message(self) -> None:
        message = "%all: f32[2, 3, 4] = exchange(gather_inv, [ShardSpec(0, (1, 1))], <dp>, %z)"
        said, text = combined(RESIDUAL.replace("%h: ", f"{message}\n%h: "))
        assert said == "weighted sum of 2"
        assert "%out: f32[1, 3, 4] = aten.add.Tensor(%h, %seen)" in text


REPLACED = {
    "another reader": ("return %out", "return %out, %rows"),
    "weights of another shape": (
        "%scaled: f32[6, 4] = aten.mul.Tensor(%rows, %column)",
        "%scaled: f32[6, 4] = aten.mul.Tensor(%rows, %rows)",
    ),
    "a sum over the columns": ("(%view, [1])", "(%view, [2])"),
    "a sum that keeps its dim": ("(%view, [1])", "(%view, [1], True)"),
    "a message between": (
        "%column:",
        "%all: f32[12] = exchange(gather_vary, [ShardSpec(0, (6, 6))], <dp>, %w)\n%column:",
    ),
    "a padding row": ("<dp>)", "<dp>, 3)"),
    "a number": ("(%rows, %column)", "(%rows, 2.0)"),
    "weights of more bits": ("%column: f32", "%column: f64"),
    "parts of rows": ("[3, 2, 4]", "[3, 4, 2]"),
}


@pytest.mark.parametrize("why", REPLACED)
def test_left_alone(why: str) -> None:
    old, new = REPLACED[why]
    assert old in PROGRAM
    text = PROGRAM.replace(old, new)
    said, after = combined(text)
    assert said == ""
    assert after == show(program(text)[1])
