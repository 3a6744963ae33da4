"""Cost formulas: the planner's own price functions, run on symbolic sizes.

`Traced` is a sympy expression that numpy code takes for an array, and `symbolic_device` a device
whose rates are named functions. `compute.forward_time(symbolic_device(d), op)` of an op with traced
shapes is therefore the formula of what it otherwise computes: there is no second cost model.

Names in a formula: the captured sizes (`b`, `s`), `n_dp` for the size of mesh axis dp,
`rate_matmul_bfloat16(w)` in flop/s and `bandwidth_softmax(x)` in byte/s as the device's curves give
them for `w` flops and `x` bytes, `narrow(k)`, `op_overhead_s`, `all_gather(x, tp)` for the seconds
of a collective on `x` bytes (as its group sees the tensor whole) among the devices along `tp`,
`ceil`, `max`, `min`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import sympy

from autopar.errors import PassError
from autopar.ir.sharding import Split

from .cluster import Device
from .curve import Curve

ceil = sympy.Function("ceil", integer=True, positive=True)
maximum = sympy.Function("max")
minimum = sympy.Function("min")

BUCKETED = "_bucketed"  # suffix of collectives whose small messages travel in full buckets


def axis_size(axis: str) -> sympy.Symbol:
    """The number of devices along a mesh axis: `n_dp`."""
    return sympy.Symbol(f"n_{axis}", integer=True, positive=True)


def axis_group(axis: str) -> sympy.Symbol:
    """The groups along a mesh axis, the second argument of a collective: `dp`."""
    return sympy.Symbol(axis, positive=True)


def parts(axes: tuple[str, ...]) -> sympy.Expr:
    """Into how many pieces some axes divide a dim."""
    return sympy.Mul(*(axis_size(axis) for axis in axes))


def split_size(units: Any, axes: tuple[str, ...]) -> Any:
    """Units of a dim on the device that has most of them."""
    return ceil(units / parts(axes)) if axes else units


def local_size(size: int, split: Split) -> Any:
    """Elements of a dim of known size on the device that has most of them."""
    unit = split.outer * split.block
    return unit * split_size(sympy.Integer(size // unit), split.axes) if split else size


def collective(kind: str, whole_bytes: Any, axis: str, bucketed: bool = False) -> sympy.Expr:
    """Seconds of a collective on a tensor of `whole_bytes` as its group sees it whole."""
    name = kind + BUCKETED if bucketed else kind
    return sympy.Function(name)(whole_bytes, axis_group(axis))


def sent_bytes(kind: str, whole_bytes: Any, axis: str) -> sympy.Expr:
    """Bytes that one device puts on the wire for a collective; see `comm.wire_factor`."""
    n = axis_size(axis)
    if kind == "broadcast":
        return sympy.sympify(whole_bytes)
    nbytes = whole_bytes / n if kind == "all_to_all" else whole_bytes
    return (2 if kind == "all_reduce" else 1) * (n - 1) / n * nbytes


class Traced(np.ndarray[Any, np.dtype[Any]]):
    """A sympy expression with its value at the sizes of capture, as an array of no dims.

    Arithmetic gives expressions. A comparison is decided by the values: it asks about structure
    (whether an operand is broadcast), which other sizes do not change. What cannot be traced
    raises PassError.
    """

    expr: sympy.Expr
    hint: float

    @staticmethod
    def of(expr: Any, hint: float) -> Traced:
        made = np.empty((), dtype=object).view(Traced)
        made.expr, made.hint = sympy.sympify(expr), hint
        return made

    def astype(self, *_: Any, **__: Any) -> Any:
        return self

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc in _COMPARISONS and method == "__call__":
            a, b = map(_hint_of, inputs)
            if not (math.isnan(a) or math.isnan(b)):
                return int(bool(ufunc(a, b)))
        if ufunc not in _OPERATIONS or method != "__call__" or kwargs:
            raise PassError("formulas", "traceable", f"no formula of numpy.{ufunc.__name__}")
        with np.errstate(all="ignore"):
            hint = float(ufunc(*(_hint_of(i) for i in inputs)))
        return Traced.of(_OPERATIONS[ufunc](*map(expression, inputs)), hint)

    def __array_function__(self, func: Any, *_: Any) -> Any:
        raise PassError("formulas", "traceable", f"no formula of numpy.{func.__name__}")


_OPERATIONS: Mapping[np.ufunc, Callable[..., Any]] = {
    np.add: lambda a, b: a + b,
    np.subtract: lambda a, b: a - b,
    np.multiply: lambda a, b: a * b,
    np.true_divide: lambda a, b: a / b,
    np.negative: lambda a: -a,
    np.maximum: lambda a, b: _extreme(maximum, max, a, b),
    np.minimum: lambda a, b: _extreme(minimum, min, a, b),
    np.ceil: ceil,
    np.sqrt: sympy.sqrt,
    np.log2: lambda a: sympy.log(a) / sympy.log(2),
    np.power: lambda a, b: a**b,
}


def _extreme(function: Any, pick: Callable[..., Any], a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """`min(min(a, 64), 32)` as `min(a, 32)`; a size is not compared with 1."""
    found = [f for e in (a, b) for f in (e.args if e.func == function else (e,))]
    numbers = [f for f in found if f.is_Number]
    others = list(dict.fromkeys(f for f in found if not f.is_Number))
    if not others:
        return pick(numbers)
    if numbers:
        bound, size = pick(numbers), any(f.is_integer and f.is_positive for f in others)
        if not (pick is max and size and bound <= 1):
            others.append(bound)
    return others[0] if len(others) == 1 else function(*others)


_COMPARISONS = (
    np.greater,
    np.greater_equal,
    np.less,
    np.less_equal,
    np.equal,
    np.not_equal,
)


def expression(value: Any) -> sympy.Expr:
    """A number or a traced one as a sympy expression, whole numbers as integers."""
    if isinstance(value, Traced):
        return value.expr
    if isinstance(value, np.ndarray):
        value = value.item()
    if isinstance(value, (bool, np.bool_)):
        return sympy.Integer(int(value))
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return sympy.Integer(int(value))
    return sympy.sympify(value)


def _hint_of(value: Any) -> float:
    return value.hint if isinstance(value, Traced) else float(value)


class _NamedCurve:
    """A curve of the device as a named function of traced numbers."""

    def __init__(self, name: str) -> None:
        self.function = sympy.Function(name)

    def __call__(self, x: Any) -> Traced:
        return Traced.of(self.function(expression(x)), math.nan)


class _SymbolicDevice:
    """Looks like a `Device`; every figure is a symbol and every curve a named function."""

    def __init__(self, like: Device) -> None:
        self._like = like

    def rate_curve(self, dtype: str, family: str = "matmul") -> _NamedCurve:
        return _NamedCurve(f"rate_{family}_{dtype}")

    def bandwidth_curve(self, family: str) -> _NamedCurve:
        return _NamedCurve(f"bandwidth_{family}")

    def __getattr__(self, name: str) -> Any:
        figure = getattr(self._like, name)
        if isinstance(figure, Curve):
            return _NamedCurve(name)
        if isinstance(figure, (int, float)):
            return Traced.of(sympy.Symbol(name, nonnegative=True), figure)
        return figure


def symbolic_device(like: Device) -> Device:
    """A device for `compute` whose times are formulas; `like` says which figures a device has."""
    return cast(Device, _SymbolicDevice(like))


def with_integers(expr: sympy.Expr) -> sympy.Expr:
    """The same formula with integers in place of floats that are whole."""
    floats = [f for f in expr.atoms(sympy.Float) if float(f).is_integer()]
    return expr.xreplace({f: sympy.Integer(int(f)) for f in floats})


def readable(expr: sympy.Expr, hints: Mapping[sympy.Symbol, int]) -> sympy.Expr:
    """The same formula with plain division wherever it leaves no remainder at these sizes."""

    def plain(units: sympy.Expr) -> sympy.Expr:
        value = units.subs(hints)
        return units if value.is_Integer else ceil(units)

    return with_integers(expr).replace(ceil, plain)


def formula_text(expr: sympy.Expr, hints: Mapping[sympy.Symbol, int]) -> str:
    """A formula as people read it: repeated parts first, each with a name of its own."""
    named, (body,) = sympy.cse(
        [readable(expr, hints)], symbols=sympy.numbered_symbols("x"), optimizations=()
    )
    lines = [f"{symbol} = {part}" for symbol, part in named]
    return "\n".join([*lines, str(body)])
