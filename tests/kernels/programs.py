"""Random element-wise programs, for tests of what is made of them."""

from __future__ import annotations

from hypothesis import strategies as st

from autopar.ir.pointwise import CASTS, OPS, Operand, Pointwise, Step

NUMBERS = (-2.0, -0.5, 0.0, 0.25, 1.0, 3.0)
# Ops whose values stay of moderate size, for comparisons of numbers.
TAME = ("add", "sub", "mul", "neg", "erf", "tanh", "sigmoid", "relu", "positive")


@st.composite
def programs(
    draw: st.DrawFn, ops: tuple[str, ...] = (*OPS, *CASTS), most: int = 6, extras: int = 2
) -> Pointwise:
    """Programs of up to `most` steps that read `x` and up to `extras` further tensors."""
    steps: list[Step] = []
    for i in range(draw(st.integers(0, most))):
        op = draw(st.sampled_from(ops))
        names = ["x", *(f"a{k}" for k in range(extras)), *(f"t{k}" for k in range(i))]
        # No step is of numbers alone, which is no use of a kernel.
        operands: list[Operand] = [draw(st.sampled_from(names))]
        if op not in CASTS and OPS[op][0] == 2:
            operands.append(draw(st.sampled_from((*names, *names, *NUMBERS))))
            operands = draw(st.permutations(operands))
        steps.append(Step(op, tuple(operands)))
    return Pointwise(tuple(steps))
