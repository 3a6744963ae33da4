"""Element-wise functions as data: what a plan injects before and after a kernel's own work.

A `Pointwise` is a straight-line program over one element `x` and the elements `a0`, `a1`, ... of
further tensors of the same shape. It prints as text (`t0 = mul(x, 0.5); tanh(t0)`), parses back,
runs in torch (the reference), is written as Triton by `autopar.runtime.kernels`, and has
derivatives that are `Pointwise` themselves. All steps are computed in the kernel's compute dtype
(float32, or float64 for float64 tensors); only `cast` rounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Operand = str | float

# Op: number of operands, and the torch function of the reference.
OPS: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, torch.add),
    "sub": (2, torch.sub),
    "mul": (2, torch.mul),
    "div": (2, torch.div),
    "neg": (1, torch.neg),
    "exp": (1, torch.exp),
    "erf": (1, torch.erf),
    "tanh": (1, torch.tanh),
    "sigmoid": (1, torch.sigmoid),
    "relu": (1, torch.relu),
    "positive": (1, lambda x: (x > 0).to(x.dtype)),
}
CASTS: dict[str, torch.dtype] = {
    "cast_f32": torch.float32,
    "cast_bf16": torch.bfloat16,
    "cast_f16": torch.float16,
}
_STEP = re.compile(r"(?:(t\d+) = )?(\w+)\(([^()]*)\)")


@dataclass(frozen=True)
class Step:
    """One op; its operands are `x`, `a<i>`, the result `t<i>` of an earlier step, or numbers."""

    op: str
    operands: tuple[Operand, ...]

    def __str__(self) -> str:
        texts = (o if isinstance(o, str) else repr(float(o)) for o in self.operands)
        return f"{self.op}({', '.join(texts)})"


@dataclass(frozen=True)
class Pointwise:
    """A straight-line program; its value is that of the last step, or `x` if there is none.

    Raises ValueError for an unknown op, a wrong number of operands, or an operand that is not yet
    defined.
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        for i, step in enumerate(self.steps):
            wanted = 1 if step.op in CASTS else OPS.get(step.op, (-1,))[0]
            if wanted < 0:
                raise ValueError(f"pointwise: unknown op {step.op!r}")
            if len(step.operands) != wanted:
                raise ValueError(f"pointwise: {step.op} takes {wanted} operands, not {step}")
            for operand in step.operands:
                if isinstance(operand, str) and not _known(operand, i):
                    raise ValueError(f"pointwise: {operand!r} is not defined before {step}")
                if isinstance(operand, (int, float)) and not math.isfinite(operand):
                    raise ValueError(f"pointwise: {step} has a number that is not finite")

    def __str__(self) -> str:
        if not self.steps:
            return "x"
        *first, last = self.steps
        return "; ".join([*(f"t{i} = {step}" for i, step in enumerate(first)), str(last)])

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def result(self) -> str:
        """Name of the value: `x`, or the last step's."""
        return f"t{len(self.steps) - 1}" if self.steps else "x"

    @property
    def extras(self) -> int:
        """How many further tensors it reads: one more than the largest `a<i>`."""
        names = [o for step in self.steps for o in step.operands if isinstance(o, str)]
        return max((int(n[1:]) + 1 for n in names if n[0] == "a"), default=0)

    def __call__(self, x: Tensor, *extras: Tensor) -> Tensor:
        """The reference: the steps in torch, in float32 or better; the result in that dtype.

        `x` and the extras have one shape. Raises ValueError for too few extras.
        """
        if len(extras) < self.extras:
            raise ValueError(f"pointwise: {self} reads {self.extras} further tensors")
        compute = torch.promote_types(x.dtype, torch.float32)
        values: dict[str, Any] = {"x": x.to(compute)}
        values.update({f"a{i}": a.to(compute) for i, a in enumerate(extras)})
        for i, step in enumerate(self.steps):
            found = [values[o] if isinstance(o, str) else o for o in step.operands]
            if step.op in CASTS:
                values[f"t{i}"] = torch.as_tensor(found[0]).to(CASTS[step.op]).to(compute)
            else:
                if not any(isinstance(f, Tensor) for f in found):
                    found = [torch.as_tensor(f, dtype=compute, device=x.device) for f in found]
                values[f"t{i}"] = OPS[step.op][1](*found)
        return torch.as_tensor(values[self.result]).expand(x.shape)

    def then(self, after: Pointwise) -> Pointwise:
        """This program, and `after` on its result; the extras of `after` come after its own."""
        return Pointwise((*self.steps, *_renamed(after.steps, len(self.steps), self)))

    def derivative(self, name: str = "x") -> Pointwise:
        """The partial derivative with respect to `x` or to `a<i>`, a program of the same tensors.

        A cast has derivative 1.
        """
        return _Derivative(self).of(name)


IDENTITY = Pointwise()


@dataclass(frozen=True)
class Fusion:
    """What a kernel also does: a prologue on what it reads and an epilogue on what it writes.

    The further tensors of the prologue come first, then those of the epilogue.
    """

    prologue: Pointwise = IDENTITY
    epilogue: Pointwise = IDENTITY

    def __str__(self) -> str:
        return f"{self.prologue} | {self.epilogue}"

    @property
    def extras(self) -> int:
        return self.prologue.extras + self.epilogue.extras

    @property
    def saves_inputs(self) -> bool:
        """Whether a backward reads the tensors: not if every derivative is a constant."""
        slopes = [
            part.derivative(name)
            for part in (self.prologue, self.epilogue)
            for name in ("x", *(f"a{i}" for i in range(part.extras)))
        ]
        return any(
            isinstance(o, str) and o[0] in "xa" for s in slopes for t in s.steps for o in t.operands
        )


PLAIN = Fusion()


def parse_pointwise(text: str) -> Pointwise:
    """The inverse of `str`; raises ValueError naming what is not understood."""
    if text.strip() == "x":
        return IDENTITY
    steps = []
    for i, part in enumerate(text.split(";")):
        found = _STEP.fullmatch(part.strip())
        if found is None or found[1] not in (None, f"t{i}"):
            raise ValueError(f"pointwise: cannot read {part.strip()!r}")
        operands = [o.strip() for o in found[3].split(",") if o.strip()]
        steps.append(Step(found[2], tuple(map(_operand, operands))))
    return Pointwise(tuple(steps))


def _operand(text: str) -> Operand:
    if re.fullmatch(r"x|[at]\d+", text):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"pointwise: cannot read {text!r}") from None


def _known(operand: str, position: int) -> bool:
    if re.fullmatch(r"x|a\d+", operand):
        return True
    return bool(re.fullmatch(r"t\d+", operand)) and int(operand[1:]) < position


def _renamed(steps: Sequence[Step], shift: int, before: Pointwise) -> list[Step]:
    def name(operand: Operand) -> Operand:
        if operand == "x":
            return before.result
        if isinstance(operand, str) and operand[0] == "t":
            return f"t{int(operand[1:]) + shift}"
        if isinstance(operand, str):
            return f"a{int(operand[1:]) + before.extras}"
        return operand

    return [Step(step.op, tuple(map(name, step.operands))) for step in steps]


class _Derivative:
    """Forward-mode differentiation of a straight-line program, zeros and ones left out."""

    def __init__(self, program: Pointwise) -> None:
        self.program = program
        self.steps = list(program.steps)

    def of(self, name: str) -> Pointwise:
        tangents: dict[Operand, Operand] = {name: 1.0}
        for i, step in enumerate(self.program.steps):
            tangent: Operand = 0.0
            for position, operand in enumerate(step.operands):
                through = tangents.get(operand, 0.0)
                if through != 0.0:
                    part = self._mul(self._partial(step, position, f"t{i}"), through)
                    tangent = self._add(tangent, part)
            tangents[f"t{i}"] = tangent
        result = tangents.get(self.program.result, 0.0)
        if result != f"t{len(self.steps) - 1}":
            # A program's value is its last step.
            self._emit("mul", result, 1.0)
        return Pointwise(_needed(self.steps))

    def _emit(self, op: str, *operands: Operand) -> Operand:
        self.steps.append(Step(op, operands))
        return f"t{len(self.steps) - 1}"

    def _mul(self, a: Operand, b: Operand) -> Operand:
        if a == 1.0 or b == 1.0:
            return b if a == 1.0 else a
        if isinstance(a, float) and isinstance(b, float):
            return a * b
        return 0.0 if 0.0 in (a, b) else self._emit("mul", a, b)

    def _add(self, a: Operand, b: Operand) -> Operand:
        if isinstance(a, float) and isinstance(b, float):
            return a + b
        if a == 0.0 or b == 0.0:
            return b if a == 0.0 else a
        return self._emit("add", a, b)

    def _partial(self, step: Step, position: int, result: Operand) -> Operand:
        """d result / d operand at `position`."""
        a = step.operands[0]
        if step.op in ("add",) or step.op in CASTS:
            return 1.0
        if step.op == "sub":
            return 1.0 if position == 0 else -1.0
        if step.op == "mul":
            return step.operands[1 - position]
        if step.op == "div":
            if position == 0:
                by = step.operands[1]
                # A step of numbers alone would be rounded to float32 in a kernel of float64.
                return 1.0 / by if isinstance(by, float) and by else self._emit("div", 1.0, by)
            return self._emit("neg", self._emit("div", result, step.operands[1]))
        if step.op == "neg":
            return -1.0
        if step.op == "exp":
            return result
        if step.op == "erf":
            bell = self._emit("exp", self._emit("neg", self._emit("mul", a, a)))
            return self._emit("mul", bell, 2.0 / math.sqrt(math.pi))
        if step.op == "tanh":
            return self._emit("sub", 1.0, self._emit("mul", result, result))
        if step.op == "sigmoid":
            return self._emit("mul", result, self._emit("sub", 1.0, result))
        if step.op == "relu":
            return self._emit("positive", a)
        assert step.op == "positive", step
        return 0.0


def _needed(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps that the last one depends on, renumbered."""
    wanted = {len(steps) - 1}
    for i in reversed(range(len(steps))):
        if i in wanted:
            wanted |= {int(o[1:]) for o in steps[i].operands if isinstance(o, str) and o[0] == "t"}
    place = {f"t{old}": f"t{new}" for new, old in enumerate(sorted(wanted))}

    def name(operand: Operand) -> Operand:
        return place.get(operand, operand) if isinstance(operand, str) else operand

    return tuple(Step(steps[i].op, tuple(map(name, steps[i].operands))) for i in sorted(wanted))
