"""Sizes as text: sympy expressions read back without evaluating Python.

A printed graph says a symbolic size as sympy prints it: `2*b + 1`, `FloorDiv(s, 8)`. Text may come
from a file, so that only what is listed here is read: numbers, symbols, arithmetic, and the
functions that torch puts into sizes.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import sympy


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Functions that a printed size may call: torch's integer functions, then sympy's."""
    from torch.utils._sympy import functions

    table = {name: getattr(sympy, name) for name in ("floor", "ceiling", "Abs", "Max", "Min")}
    names = (*functions.__all__, "Max", "Min")
    return table | {name: getattr(functions, name) for name in names if hasattr(functions, name)}


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.FloorDiv: lambda a, b: _functions()["FloorDiv"](a, b),
}


def parse_expression(text: str) -> sympy.Expr:
    """Sympy expression of its text, without evaluating Python; raises ValueError.

    Symbols are positive integers, but those named `u0`, `u1`... only integers, as torch makes them.
    """

    def build(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
                return sympy.sympify(node.value)
            case ast.Name(id="oo"):
                return sympy.oo
            case ast.Name(id=str(name)) if re.fullmatch(r"u\d+", name):
                return sympy.Symbol(name, integer=True)
            case ast.Name(id=str(name)):
                return sympy.Symbol(name, integer=True, positive=True)
            case ast.UnaryOp(op=ast.USub()):
                return -build(node.operand)
            case ast.BinOp() if type(node.op) in _BINARY:
                return _BINARY[type(node.op)](build(node.left), build(node.right))
            case ast.Call(func=ast.Name(id=str(name)), keywords=[]) if name in _functions():
                return _functions()[name](*map(build, node.args))
        raise ValueError(f"cannot read {ast.unparse(node)!r} in the expression {text!r}")

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"cannot read {text!r}") from error
    expression: sympy.Expr = build(tree.body)
    return expression
