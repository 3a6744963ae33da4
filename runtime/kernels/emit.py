"""Kernel source for one use: a template with the plan's element-wise steps put in.

A template is the text of a Triton function. A line that is only `$name` becomes the lines of that
part, at its indentation; `$name` inside a line becomes that part's text.
"""

from __future__ import annotations

import hashlib
import linecache
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from autopar.ir.pointwise import CASTS, OPS, Operand, Pointwise

HEADER = "import triton\nimport triton.language as tl\n\n\n"
_LINE = re.compile(r"\s*\$(\w+)\s*")

# The interpreter has no libdevice, so that tanh is written with a sigmoid, which has no digits left
# near 0. There it is three terms of its Taylor series, as far as the fourth is below rounding.
_TANH = (
    "tl.where(tl.abs({0}) < $near, {0} - {0} * {0} * {0} *"
    " (0.3333333333333333 - {0} * {0} * 0.13333333333333333), 2.0 * tl.sigmoid(2.0 * {0}) - 1.0)"
)
_NEAR = {"tl.float32": "0.1", "tl.float64": "0.001"}

# Triton's spelling of the ops of `autopar.ir.pointwise`.
_SPELLING = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "exp": "tl.exp({})",
    "erf": "tl.erf({})",
    "tanh": _TANH,
    "sigmoid": "tl.sigmoid({})",
    "relu": "tl.where({0} < 0.0, 0.0, {0})",
    "positive": "tl.where({} > 0.0, 1.0, 0.0)",
    "cast_f32": "{}.to(tl.float32)",
    "cast_bf16": "{}.to(tl.bfloat16)",
    "cast_f16": "{}.to(tl.float16)",
}


@dataclass(frozen=True)
class Kernel:
    """One emitted Triton function: its name, and the text of a module that defines it."""

    name: str
    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()[:12]


def fill(template: str, **parts: str | Sequence[str]) -> str:
    """The template with its parts.

    Raises KeyError for a part that is not given and ValueError for lines inside of a line.
    """
    lines: list[str] = []
    for line in template.strip("\n").splitlines():
        whole = _LINE.fullmatch(line)
        if whole is not None and not isinstance(parts[whole[1]], str):
            indent = line[: line.index("$")]
            lines += [f"{indent}{part}" if part else "" for part in parts[whole[1]]]
            continue
        lines.append(re.sub(r"\$(\w+)", lambda found: _inline(parts, found[1]), line))
    return HEADER + "\n".join(lines) + "\n"


def _inline(parts: Mapping[str, str | Sequence[str]], name: str) -> str:
    part = parts[name]
    if not isinstance(part, str):
        raise ValueError(f"template: ${name} has lines and needs a line of its own")
    return part


def triton_lines(
    program: Pointwise,
    value: str,
    extras: Sequence[str],
    out: str,
    compute: str = "tl.float32",
    prefix: str = "t",
) -> list[str]:
    """Statements that set `out` to the program's value for the variable `value`.

    `extras` are the variables of the further elements; all of them and `value` are of dtype
    `compute`. `prefix` keeps the temporaries of several programs apart.
    """
    names: dict[str, str] = {"x": value, **{f"a{i}": name for i, name in enumerate(extras)}}
    numbers: dict[str, float] = {}
    double = compute == "tl.float64"

    def text(operand: Operand) -> str:
        if isinstance(operand, str) and operand in names:
            return names[operand]
        return _literal(numbers[operand] if isinstance(operand, str) else operand)

    lines = []
    for i, step in enumerate(program.steps):
        known = [numbers.get(o) if isinstance(o, str) else float(o) for o in step.operands]
        if None not in known:  # Triton's functions and casts are of tensors, not of numbers
            numbers[f"t{i}"] = _number(step.op, known, compute)
            continue
        spelled = _SPELLING[step.op].format(*map(text, step.operands))
        spelled = spelled.replace("$near", _NEAR[compute])
        if step.op.startswith("cast_"):
            spelled += f".to({compute})"
        names[f"t{i}"] = f"{prefix}{i}"
        lines.append(f"{prefix}{i} = {spelled}")
    if program.result in numbers:
        number = _literal(numbers[program.result])
        # A variable that is given a number is of float32 in the interpreter.
        return [f"{out} = " + (f"tl.full([], {number}, {compute})" if double else number)]
    if program.steps:
        lines[-1] = f"{out} = {lines[-1].split(' = ', 1)[1]}"
    elif out != value:
        lines.append(f"{out} = {value}")
    return lines


def _number(op: str, operands: Sequence[Any], compute: str) -> float:
    """What a step of numbers alone gives in the kernel's dtype."""
    dtype = getattr(torch, compute.removeprefix("tl."))
    found = [torch.tensor(operand, dtype=dtype) for operand in operands]
    if op in CASTS:
        return float(found[0].to(CASTS[op]))
    return float(OPS[op][1](*found))


def _literal(number: float) -> str:
    return f"({float(number)!r})" if math.isfinite(number) else f'float("{number}")'


def compute_type(dtype: torch.dtype) -> str:
    """Triton's name of what a kernel computes in for tensors of a dtype: float32, or float64."""
    return "tl.float64" if dtype is torch.float64 else "tl.float32"


@cache
def load(kernel: Kernel) -> Any:
    """The kernel's Triton function; triton is imported here for the first time.

    The source is known to `inspect`, which is where Triton reads it, and to tracebacks.
    """
    filename = f"<autopar kernel {kernel.name} {kernel.digest}>"
    lines = kernel.source.splitlines(keepends=True)
    linecache.cache[filename] = (len(kernel.source), None, lines, filename)
    namespace: dict[str, Any] = {"__name__": f"autopar_kernel_{kernel.name}"}
    exec(compile(kernel.source, filename, "exec"), namespace)
    return namespace[kernel.name]
