"""Sample calls of every op in the registry: an op name and a builder of random small arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autopar.ir.rules import convolution, factories, losses, pointwise

Args = tuple[Any, ...]


class Draw:
    """Random sizes and tensors from a seed; `d(3)` draws three sizes, one of them perhaps one."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def __call__(self, n: int, low: int = 1, high: int = 6) -> list[int]:
        return [self.random.randint(low, high) for _ in range(n)]

    def x(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.torch, dtype=dtype)

    def unit(self, *shape: int) -> Tensor:
        """Between 0 and 1, exclusive."""
        return torch.rand(shape, generator=self.torch, dtype=torch.float64) * 0.9 + 0.05

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.torch)

    def bools(self, *shape: int) -> Tensor:
        return self.ids(2, *shape).bool()

    def distinct(self, *shape: int) -> Tensor:
        """No ties."""
        n = torch.Size(shape).numel()
        return torch.randperm(n, generator=self.torch).reshape(shape).double()


def call(*args: Any, **kwargs: Any) -> tuple[Args, dict[str, Any]]:
    return args, kwargs


Builder = Callable[[Draw], tuple[Args, dict[str, Any]]]
SAMPLES: list[tuple[str, Builder]] = []


def sample(op: str) -> Callable[[Builder], Builder]:
    """Register the builder for each of the space-separated ops."""

    def register(builder: Builder) -> Builder:
        SAMPLES.extend((f"aten.{name}", builder) for name in op.split())
        return builder

    return register


# -- pointwise -----------------------------------------------------------------------------------

TWO_SIDED = [
    "atan2",
    "bitwise_and",
    "bitwise_left_shift",
    "bitwise_or",
    "bitwise_right_shift",
    "bitwise_xor",
    "copysign",
    "eq",
    "floor_divide",
    "fmax",
    "fmin",
    "fmod",
    "ge",
    "greater",
    "greater_equal",
    "gt",
    "heaviside",
    "hypot",
    "isclose",
    "le",
    "less",
    "less_equal",
    "logaddexp",
    "logaddexp2",
    "logical_and",
    "logical_or",
    "logical_xor",
    "lt",
    "maximum",
    "minimum",
    "ne",
    "not_equal",
    "polar",
    "pow",
    "remainder",
    "xlogy",
    "arctan2",
    "complex",
    "__and__",
    "__or__",
    "__xor__",
]
INTEGER = {"bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "bitwise_left_shift"}
INTEGER |= {"bitwise_right_shift", "__and__", "__or__", "__xor__"}
SPECIAL = {"clamp": (0.2, 0.7), "clamp_max": (0.5,), "clamp_min": (0.5,), "clip": (0.2, 0.7)}
SPECIAL |= {"threshold": (0.5, 0.1)}


def pointwise_call(name: str, draw: Draw) -> tuple[Args, dict[str, Any]]:
    a, b, c = draw(3)
    make: Callable[..., Tensor] = (
        (lambda *shape: draw.ids(4, *shape)) if name in INTEGER else draw.unit
    )
    if name in TWO_SIDED:
        if name in ("polar", "complex"):
            return call(make(a, b), make(a, b))
        return call(make(a, b, c), make(b, 1))
    return call(make(a, b, c), *SPECIAL.get(name, ()))


def overload(name: str) -> str:
    packet = getattr(torch.ops.aten, name)
    for kind in ("Tensor", "default", "self", "Tensor_Tensor"):
        if kind in packet.overloads() and not (kind == "Tensor" and name in SPECIAL):
            return f"{name}.{kind}"
    raise AssertionError(f"no usual overload: {name} {packet.overloads()}")


for _name in pointwise.NONLINEAR + pointwise.LINEAR:
    if _name not in ("rrelu_with_noise", "imag"):
        SAMPLES.append(
            (f"aten.{overload(_name)}", lambda draw, name=_name: pointwise_call(name, draw))
        )


@sample("rrelu_with_noise.default")
def _(d: Draw) -> Any:
    x = d.x(*d(2))
    return call(x, torch.rand_like(x), 0.2, 0.2)


@sample("add.Tensor sub.Tensor mul.Tensor div.Tensor rsub.Tensor subtract.Tensor multiply.Tensor")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, 1, c), d.x(b, c))


@sample("divide.Tensor true_divide.Tensor mul.Tensor")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.x())


@sample("add.Tensor sub.Tensor mul.Tensor div.Tensor rsub.Scalar pow.Tensor_Scalar")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), 2.0)


@sample("add.Tensor sub.Tensor")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.x(a, b), alpha=3)


@sample("mul.Tensor add.Tensor")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.bools(a, b))


@sample("add.Tensor mul.Tensor div.Tensor")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.ids(9, a, b), d.ids(9, a, 1) + 1)


@sample("div.Tensor_mode")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.x(a, b), rounding_mode="floor")


@sample("to.dtype _to_copy.default")
def _(d: Draw) -> Any:
    x = d.x(*d(2))
    return call(x, dtype=torch.float32)


@sample("to.dtype")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)) * 9, torch.int64)


@sample("to.dtype_layout")
def _(d: Draw) -> Any:
    return call(d.ids(9, *d(2)), dtype=torch.float64)


@sample("to.dtype")
def _(d: Draw) -> Any:
    return call(d.bools(*d(2)), torch.float64)


@sample("to.other type_as.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, b, c), d.x(b, c, dtype=torch.float32))


@sample("where.self")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.bools(b, 1), d.x(a, b, c), d.x(c))


@sample("where.ScalarOther")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.bools(a, b), d.x(a, b), 0.0)


@sample("where.ScalarSelf")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.bools(a, b), 0, d.x(a, b))


@sample("where.ScalarSelf")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.bools(a, b), -1.5, d.x(a, b))


@sample("where.Scalar")
def _(d: Draw) -> Any:
    return call(d.bools(*d(2)), 1.0, 2.0)


@sample("where.default nonzero.default")
def _(d: Draw) -> Any:
    return call(d.bools(*d(2)))


@sample("masked_fill.Scalar")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.bools(b), d.random.choice([0.0, -1e9]))


@sample("masked_fill.Tensor")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.bools(a, 1), d.x())


@sample("lerp.Tensor addcmul.default addcdiv.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.x(a, b), d.x(b))


@sample("lerp.Scalar")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.x(a, b), 0.3)


@sample("prelu.default")
def _(d: Draw) -> Any:
    n, c, h = d(3)
    return call(d.x(n, c, h), d.x(d.random.choice([1, c])))


@sample("dropout.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), 0.5, False)


@sample("copy.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.x(b))


# -- contractions --------------------------------------------------------------------------------


@sample("matmul.default")
def _(d: Draw) -> Any:
    a, b, i, k, j = d(5)
    left, right = d.random.choice(
        [
            ((a, i, k), (k, j)),
            ((a, b, i, k), (b, k, j)),
            ((a, 1, i, k), (b, k, j)),
            ((i, k), (a, k, j)),
            ((k,), (a, k, j)),
            ((a, i, k), (k,)),
            ((k,), (k,)),
            ((k,), (k, j)),
        ]
    )
    return call(d.x(*left), d.x(*right))


SAMPLES += [SAMPLES[-1]] * 5


@sample("mm.default")
def _(d: Draw) -> Any:
    i, k, j = d(3)
    return call(d.x(i, k), d.x(k, j))


@sample("bmm.default")
def _(d: Draw) -> Any:
    b, i, k, j = d(4)
    return call(d.x(b, i, k), d.x(b, k, j))


@sample("mv.default")
def _(d: Draw) -> Any:
    i, k = d(2)
    return call(d.x(i, k), d.x(k))


@sample("dot.default")
def _(d: Draw) -> Any:
    (k,) = d(1)
    return call(d.x(k), d.x(k))


@sample("inner.default")
def _(d: Draw) -> Any:
    i, j, k = d(3)
    return call(d.x(i, k), d.x(j, k))


@sample("outer.default ger.default")
def _(d: Draw) -> Any:
    i, k = d(2)
    return call(d.x(i), d.x(k))


@sample("linear.default")
def _(d: Draw) -> Any:
    b, s, k, n = d(4)
    lead = d.random.choice([(), (b,), (b, s)])
    return call(d.x(*lead, k), d.x(n, k), d.random.choice([None, d.x(n)]))


@sample("linear.default")
def _(d: Draw) -> Any:
    b, s, k, n = d(4)
    return call(d.x(b, s, k), d.x(n, k), d.x(n))


@sample("addmm.default")
def _(d: Draw) -> Any:
    i, k, j = d(3)
    return call(d.random.choice([d.x(j), d.x(i, j), d.x(1, j)]), d.x(i, k), d.x(k, j))


@sample("addmv.default")
def _(d: Draw) -> Any:
    i, k = d(2)
    return call(d.x(i), d.x(i, k), d.x(k))


@sample("baddbmm.default")
def _(d: Draw) -> Any:
    b, i, k, j = d(4)
    return call(d.x(b, i, j), d.x(b, i, k), d.x(b, k, j), alpha=2.0)


@sample("einsum.default")
def _(d: Draw) -> Any:
    a, b, c, e, f = d(5)
    equation, shapes = d.random.choice(
        [
            ("td,edf->etf", [(a, b), (c, b, e)]),
            ("bhqd,bhkd->bhqk", [(a, b, c, e), (a, b, f, e)]),
            ("ij,jk,kl->il", [(a, b), (b, c), (c, e)]),
            ("...ij,jk->...ik", [(a, b, c, e), (e, f)]),
            ("...i,...i", [(a, b), (c, a, b)]),
            ("ii->i", [(a, a)]),
            ("ij->", [(a, b)]),
            ("ij,ik", [(a, b), (a, c)]),
            ("ab,cb->ac", [(a, 1), (c, b)]),
        ]
    )
    return call(equation, [d.x(*shape) for shape in shapes])


SAMPLES += [SAMPLES[-1]] * 6


@sample("bilinear.default")
def _(d: Draw) -> Any:
    b, i, j, o = d(4)
    return call(d.x(b, i), d.x(b, j), d.x(o, i, j), d.x(o))


# -- views ---------------------------------------------------------------------------------------


@sample("view.default reshape.default _unsafe_view.default")
def _(d: Draw) -> Any:
    b, s, h, e = d(4)
    before, after = d.random.choice(
        [
            ((b, s, h * e), (b, s, h, e)),
            ((b, s, h, e), (b, s, h * e)),
            ((b, s, e), (b * s, e)),
            ((b * s, e), (b, s, e)),
            ((b * s, h * e), (b, s, h, e)),
            ((b, s * h, e), (b * s, h * e)),
            ((6, 4, b), (8, 3, b)),
            ((b, 6, 4), (b * 8, 3)),
            ((b, 1, s), (1, b, s, 1)),
            ((b, s, 3 * h * e), (b, s, 3, h, e)),
            ((b,), (b,)),
        ]
    )
    return call(d.x(*before), after)


SAMPLES += SAMPLES[-3:] * 3


@sample("view.dtype")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), d.random.choice([torch.int64, torch.int32]))


@sample("flatten.using_ints")
def _(d: Draw) -> Any:
    start, stop = d.random.choice([(0, -1), (1, 2), (0, 1)])
    return call(d.x(*d(4)), start, stop)


@sample("ravel.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)))


@sample("unflatten.int")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, b * c), -1, [b, c])


@sample("squeeze.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, 1, b, 1))


@sample("squeeze.dim")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, 1, b), d.random.choice([0, 1, -1]))


@sample("squeeze.dims")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, 1, b, 1), [1, 3])


@sample("unsqueeze.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), d.random.choice([0, 1, -1]))


@sample("reshape_as.default view_as.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, b, c), d.x(a * b, c))


@sample("permute.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(4)), [2, 0, -1, 1])


@sample("transpose.int swapaxes.default swapdims.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), 1, -1)


@sample("t.default mT.default numpy_T.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)))


@sample("movedim.intlist moveaxis.intlist")
def _(d: Draw) -> Any:
    return call(d.x(*d(4)), [0, -1], [2, 0])


@sample("movedim.int")
def _(d: Draw) -> Any:
    return call(d.x(*d(4)), 1, -1)


@sample("expand.default broadcast_to.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(b, 1), [a, b, c])


@sample("expand.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(1, b), [a, -1])


@sample("expand_as.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(b, 1), d.x(a, b, c))


@sample("repeat.default tile.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.random.choice([[1, 3], [2, 1, 2], [4, 1, 1]]))


@sample("repeat_interleave.self_int")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), 3, d.random.choice([0, 1, -1, None]))


@sample("repeat_interleave.self_Tensor")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.ids(3, a), 0)


@sample("repeat_interleave.Tensor")
def _(d: Draw) -> Any:
    return call(d.ids(3, *d(1)))


@sample("split.Tensor")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(b, 3 * a), a, -1)


@sample("split.Tensor tensor_split.sections")
def _(d: Draw) -> Any:
    return call(d.x(*d(2), 7), 3, -1)


@sample("split.sizes split_with_sizes.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(b, 2 * a + 4), d.random.choice([[a, a, 4], [a + 2, a + 2]]), 1)


@sample("chunk.default unsafe_chunk.default unsafe_split.Tensor")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(2 * a, b), 2)


@sample("glu.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, 2 * b, c), 1)


@sample("select.int")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), 1, 0)


@sample("unbind.int")
def _(d: Draw) -> Any:
    return call(d.x(*d(2), 3), -1)


@sample("slice.Tensor")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, b + 2, c), 1, *d.random.choice([(0, b + 1), (1, None), (0, b + 2), (-2,)]))


@sample("narrow.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b + 1), 1, 0, d.random.choice([b, b + 1]))


@sample("cat.default concat.default concatenate.default")
def _(d: Draw) -> Any:
    a, b, c, e = d(4)
    return call([d.x(a, b, c), d.x(a, e, c), d.x(a, 1, c)], 1)


@sample("stack.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call([d.x(a, b), d.x(a, b)], d.random.choice([0, 1, -1]))


@sample("slice_scatter.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b + 2), d.x(a, b), 1, 1, b + 1)


@sample("select_scatter.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.x(b), 0, 0)


def _complex_slice(d: Draw) -> Any:
    a, b = d(2)
    x, new = (torch.complex(d.x(a, n), d.x(a, n)).detach() for n in (b + 2, b))
    return call(x, new, 1, 1, b + 1)


def _complex_select(d: Draw) -> Any:
    a, b = d(2)
    x = torch.complex(d.x(a, b), d.x(a, b)).detach()
    return call(x, x[0].clone(), -2, 0)


SAMPLES += [("autopar.slice_scatter.default", _complex_slice)] * 2
SAMPLES += [("autopar.select_scatter.default", _complex_select)] * 2


@sample("tril.default triu.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(d.random.choice([2, 3]))), 1)


@sample("flip.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), [0, -1])


@sample("roll.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), *d.random.choice([([1], [1]), ([2],)]))


@sample("rot90.default diff.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2, low=2)))


@sample("diff.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b + 2), 1, -1, d.x(a, 1), d.x(a, 2))


@sample("constant_pad_nd.default pad.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), [0, 0, 1, 2])


@sample("pad.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2, low=3)), *d.random.choice([([1, 1], "reflect"), ([0, 1], "constant", 3)]))


@sample("reflection_pad1d.default replication_pad1d.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3, low=3)), [1, 2])


@sample("reflection_pad2d.default replication_pad2d.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(4, low=3)), [1, 2, 1, 0])


@sample("reflection_pad3d.default replication_pad3d.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(5, low=3, high=4)), [1, 1, 1, 0, 0, 1])


@sample("unfold.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, b + 2, c), 1, 2, 1)


@sample("diagonal.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), 0, 0, -1)


@sample("view_as_complex.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2), 2))


@sample("view_as_real.default real.default imag.default conj.default")
def _(d: Draw) -> Any:
    return call(torch.view_as_complex(d.x(*d(2), 2)))


@sample("pixel_shuffle.default")
def _(d: Draw) -> Any:
    n, c, h, w = d(4)
    return call(d.x(n, 4 * c, h, w), 2)


@sample("pixel_unshuffle.default")
def _(d: Draw) -> Any:
    n, c, h, w = d(4)
    return call(d.x(n, c, 2 * h, 2 * w), 2)


# -- reductions ----------------------------------------------------------------------------------


@sample("sum.dim_IntList mean.dim")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), *d.random.choice([([1],), ([0, -1], True), ([-1], True)]))


@sample("sum.default mean.default max.default min.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)))


@sample("sum.default")
def _(d: Draw) -> Any:
    return call(d.bools(*d(2)))


@sample("amax.default amin.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), *d.random.choice([([1],), ([0, -1], True), ([],)]))


@sample("amax.default max.default amin.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)).requires_grad_())


@sample("amax.default")
def _(d: Draw) -> Any:
    return call(d.ids(9, *d(2)), [0])


@sample("max.dim min.dim median.dim nanmedian.dim mode.default")
def _(d: Draw) -> Any:
    return call(d.distinct(*d(3)), 1, d.random.choice([True, False]))


@sample("max.other min.other")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.x(b))


@sample("kthvalue.default")
def _(d: Draw) -> Any:
    return call(d.distinct(*d(2)), 1, -1)


@sample("argmax.default argmin.default")
def _(d: Draw) -> Any:
    return call(d.distinct(*d(3)), *d.random.choice([(1, True), (-1,), ()]))


@sample("var.correction std.correction var_mean.correction std_mean.correction")
def _(d: Draw) -> Any:
    return call(d.x(*d(2), 4), [-1], correction=0, keepdim=d.random.choice([True, False]))


@sample("logsumexp.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), [1], True)


@sample("any.dim all.dim")
def _(d: Draw) -> Any:
    return call(d.bools(*d(3)), -1)


@sample("any.default all.default")
def _(d: Draw) -> Any:
    return call(d.bools(*d(2)))


@sample("prod.dim_int")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), 0)


@sample("norm.ScalarOpt_dim linalg_vector_norm.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), 2, [-1], True)


@sample("nansum.default nanmean.default count_nonzero.dim_IntList")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), [0])


@sample("aminmax.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), dim=0)


@sample(
    "softmax.int log_softmax.int _safe_softmax.default cumprod.default cumsum.default cummax.default"
)
def _(d: Draw) -> Any:
    return call(d.x(*d(3)), d.random.choice([1, -1]))


@sample("cummin.default logcumsumexp.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), 0)


@sample("_softmax.default _log_softmax.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), 1, False)


@sample("cumsum.default")
def _(d: Draw) -> Any:
    return call(d.ids(4, *d(2)), -1)


@sample("cosine_similarity.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, b, c), d.x(b, c), 1)


# -- attention -----------------------------------------------------------------------------------


@sample("scaled_dot_product_attention.default")
def _(d: Draw) -> Any:
    b, h, s, t, e, f = d(6)
    mask: Any = d.random.choice(
        [None, d.bools(s, t) | True, d.x(b, 1, s, t), d.x(1, h, 1, t), d.x(b, h, s, t)]
    )
    return call(d.x(b, h, s, e), d.x(b, h, t, e), d.x(b, h, t, f), attn_mask=mask)


@sample("scaled_dot_product_attention.default")
def _(d: Draw) -> Any:
    b, h, s, e = d(4)
    return call(d.x(b, h, s, e), d.x(b, h, s, e), d.x(b, h, s, e), None, 0.0, True, scale=0.5)


@sample("scaled_dot_product_attention.default")
def _(d: Draw) -> Any:
    b, h, g, s, e = d(5)
    q, k = d.x(b, h * g, s, e), d.x(b, h, s, e)
    return call(q, k, d.x(b, h, s, e), None, 0.0, d.random.choice([True, False]), enable_gqa=True)


@sample("scaled_dot_product_attention.default")
def _(d: Draw) -> Any:
    b, s, e = d(3)
    return call(d.x(b, s, e), d.x(b, s, e), d.x(b, s, e))


SAMPLES += SAMPLES[-4:] * 2

# -- recurrent layers ----------------------------------------------------------------------------


def _recurrent(d: Draw, gates: int, states: int) -> Any:
    b, t, i, h = d(4)
    first = bool(d.ids(2).item())
    params = [
        p
        for _ in range(2)  # directions
        for p in (d.x(gates * h, i), d.x(gates * h, h), d.x(gates * h), d.x(gates * h))
    ]
    hx = [d.x(2, b, h) for _ in range(states)]
    x = d.x(b, t, i) if first else d.x(t, b, i)
    return call(x, hx if states > 1 else hx[0], params, True, 1, 0.0, True, True, first)


SAMPLES += [
    (f"aten.{name}.input", lambda d, g=gates, s=states: _recurrent(d, g, s))
    for name, gates, states in (
        ("lstm", 4, 2),
        ("gru", 3, 1),
        ("rnn_tanh", 1, 1),
        ("rnn_relu", 1, 1),
    )
    for _ in range(2)
]

# -- losses --------------------------------------------------------------------------------------

for _name in losses.ELEMENTWISE:

    def _loss(d: Draw, name: str = _name) -> Any:
        a, b = d(2)
        target = d.unit(a, b)
        if name in ("soft_margin_loss", "hinge_embedding_loss", "margin_ranking_loss"):
            target = d.ids(2, a, b).double() * 2 - 1
        if name == "margin_ranking_loss":
            return call(d.x(a, b), d.x(a, b), target, 0.3, d.ids(3).item())
        if name == "poisson_nll_loss":
            return call(d.unit(a, b), target, True, False, 1e-8, d.ids(3).item())
        return call(d.unit(a, b), target, reduction=d.ids(3).item())  # a keyword

    SAMPLES += [(f"aten.{_name}.default", _loss)] * 3


@sample("cosine_embedding_loss.default")
def _(d: Draw) -> Any:
    n, k = d(2)
    labels = d.ids(2, d.random.choice([n, 1])).double() * 2 - 1  # one a row, or one for all
    return call(d.x(n, k), d.x(n, k), labels, 0.1, d.ids(3).item())


@sample("triplet_margin_loss.default")
def _(d: Draw) -> Any:
    n, k = d(2)
    return call(d.x(n, k), d.x(n, k), d.x(n, k), reduction=d.ids(3).item())


SAMPLES += SAMPLES[-2:]


@sample("cross_entropy_loss.default")
def _(d: Draw) -> Any:
    n, v, k = d(3)
    weight = d.random.choice([None, d.unit(v)])
    lead, inner = d.random.choice([((n,), ()), ((n,), (k,)), ((), ())])
    return call(d.x(*lead, v, *inner), d.ids(v, *lead, *inner), weight, d.ids(3).item())


@sample("cross_entropy_loss.default")
def _(d: Draw) -> Any:
    n, v, k = d(3)
    return call(d.x(n, v, k), d.unit(n, v, k), None, d.ids(3).item())


def _token_loss(d: Draw) -> Any:
    b, s, v = d(3)
    lead = d.random.choice([(b, s), (b,), (b, s, 2)])
    if d.ids(2).item():
        return call(d.x(*lead, v), d.unit(*lead, v), None, d.ids(3).item())
    weight = d.random.choice([None, d.unit(v)])
    return call(d.x(*lead, v), d.ids(v, *lead), weight, d.ids(3).item(), ignore_index=1)


def _token_addmm(d: Draw) -> Any:
    b, s, k, n = d(4)
    return call(d.x(n), d.x(b, s, k), d.x(k, n))


SAMPLES += [("autopar.cross_entropy.default", _token_loss)] * 6
SAMPLES += [("autopar.addmm.default", _token_addmm)] * 3


@sample("nll_loss_nd.default")
def _(d: Draw) -> Any:
    n, v, k = d(3)
    return call(d.x(n, v, k), d.ids(v, n, k), None, d.ids(3).item())


@sample("nll_loss.default")
def _(d: Draw) -> Any:
    n, v = d(2)
    return call(d.x(n, v), d.ids(v, n), d.unit(v), d.ids(3).item())


@sample("nll_loss2d.default")
def _(d: Draw) -> Any:
    n, v, h, w = d(4)
    return call(d.x(n, v, h, w), d.ids(v, n, h, w), None, d.ids(3).item())


SAMPLES += SAMPLES[-5:] * 3

# -- embeddings, normalisation -------------------------------------------------------------------


@sample("embedding.default")
def _(d: Draw) -> Any:
    v, e, b, s = d(4)
    return call(d.x(v, e), d.ids(v, b, s), *d.random.choice([(), (0,), (-1, True)]))


@sample("embedding_bag.default _embedding_bag.default")
def _(d: Draw) -> Any:
    v, e, n = d(3)
    return call(d.x(v, e), d.ids(v, n), torch.tensor([0]))


@sample("layer_norm.default")
def _(d: Draw) -> Any:
    b, s, e, f = d(4)
    shape = d.random.choice([(e,), (e, f)])
    return call(d.x(b, s, *shape), shape, d.x(*shape), d.random.choice([None, d.x(*shape)]))


@sample("native_layer_norm.default")
def _(d: Draw) -> Any:
    b, s, e = d(3)
    return call(d.x(b, s, e), [e], d.x(e), None, 1e-5)


@sample("rms_norm.default _fused_rms_norm.default")
def _(d: Draw) -> Any:
    b, s, e = d(3)
    return call(d.x(b, s, e), [e], d.x(e), 1e-5)


@sample("group_norm.default")
def _(d: Draw) -> Any:
    n, c, g, h = d(4, low=2)
    return call(d.x(n, c * g, h), g, d.x(c * g), d.random.choice([None, d.x(c * g)]))


@sample("instance_norm.default")
def _(d: Draw) -> Any:
    n, c, h = d(3, low=2)
    stats = d.random.choice([(None, None, True), (d.x(c), d.unit(c), False)])
    return call(d.x(n, c, h, h), d.x(c), None, *stats, 0.1, 1e-5, False)


@sample("batch_norm.default")
def _(d: Draw) -> Any:
    n, c, h = d(3, low=2)
    training = d.random.choice([True, False])
    args = (d.x(n, c, h, h), d.x(c), d.x(c), d.x(c), d.unit(c), training, 0.1, 1e-5, False)
    return call(*args)


def shared_batch_norm(d: Draw) -> Any:
    n, c, h = d(3, low=2)
    args = (d.x(n, c, h, h), d.x(c), d.x(c), d.x(c), d.unit(c), True, 0.1, 1e-5)
    return call(*args)


SAMPLES.append(("autopar.batch_norm.default", shared_batch_norm))

# -- convolution ---------------------------------------------------------------------------------


@sample("conv1d.default")
def _(d: Draw) -> Any:
    n, c, o = d(3)
    return call(d.x(n, c, 6), d.x(o, c, 3), d.random.choice([None, d.x(o)]), [1], [1])


@sample("conv2d.default")
def _(d: Draw) -> Any:
    n, c, o, g = d(4, high=3)
    bias = d.random.choice([None, d.x(g * o)])
    return call(d.x(n, g * c, 5, 4), d.x(g * o, c, 3, 2), bias, [2, 1], [1, 0], [1, 1], g)


@sample("conv2d.padding")
def _(d: Draw) -> Any:
    n, c, o = d(3)
    return call(d.x(n, c, 5, 4), d.x(o, c, 3, 3), d.x(o), [1, 1], "same")


@sample("conv2d.default")
def _(d: Draw) -> Any:
    c, o = d(2)
    return call(d.x(c, 5, 4), d.x(o, c, 3, 3), d.x(o))


@sample("conv3d.default")
def _(d: Draw) -> Any:
    n, c, o = d(3)
    return call(d.x(n, c, 3, 3, 3), d.x(o, c, 2, 2, 2), d.x(o))


@sample("convolution.default")
def _(d: Draw) -> Any:
    n, c, o, g = d(4, high=3)
    if d.random.random() < 0.5:
        args = (d.x(n, g * c, 4, 4), d.x(g * c, o, 2, 2), d.x(g * o))
        return call(*args, [1, 1], [0, 0], [1, 1], True, [0, 0], g)
    args = (d.x(n, g * c, 4, 4), d.x(g * o, c, 2, 2), d.x(g * o))
    return call(*args, [1, 1], [0, 0], [1, 1], False, [0, 0], g)


@sample("conv_transpose1d.default")
def _(d: Draw) -> Any:
    n, c, o = d(3)
    return call(d.x(n, c, 4), d.x(c, o, 2), d.x(o), [2])


@sample("conv_transpose2d.input")
def _(d: Draw) -> Any:
    n, c, o, g = d(4, high=3)
    return call(d.x(n, g * c, 4, 4), d.x(g * c, o, 2, 2), d.x(g * o), [2], [0], [0], g)


@sample("conv_transpose3d.input")
def _(d: Draw) -> Any:
    n, c, o = d(3)
    return call(d.x(n, c, 2, 2, 2), d.x(c, o, 2, 2, 2), d.x(o))


SAMPLES += SAMPLES[-9:] * 2

for _n in (1, 2, 3):

    def _pool(d: Draw, n: int = _n) -> Any:
        return call(d.x(*d(2), *[4] * n), [2] * n)

    _with_indices = f"max_pool{_n}d_with_indices"
    SAMPLES += [
        (f"aten.{op}.default", _pool)
        for op in (f"max_pool{_n}d", f"avg_pool{_n}d", f"adaptive_avg_pool{_n}d", _with_indices)
    ]
    SAMPLES += [(f"aten.adaptive_max_pool{_n}d.default", _pool)]
    if _n > 1:
        SAMPLES += [(f"aten._adaptive_avg_pool{_n}d.default", _pool)]

for _name in convolution.UPSAMPLES:

    def _upsample(d: Draw, name: str = _name) -> Any:
        n = int(name.rstrip("d_a").removesuffix("_")[-1])
        args: Args = (d.x(*d(2), *[3] * n), [5] * n)
        if "nearest" not in name:
            args += (False,)
        return call(*args, None)

    SAMPLES.append((f"aten.{_name}.vec", _upsample))


@sample("im2col.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2), 4, 4), [2, 2], [1, 1], [0, 0], [1, 1])


@sample("col2im.default")
def _(d: Draw) -> Any:
    n, c = d(2)
    return call(d.x(n, c * 4, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])


@sample("grid_sampler.default")
def _(d: Draw) -> Any:
    n, c = d(2)
    return call(d.x(n, c, 4, 4), d.unit(n, 3, 3, 2), 0, 0, False)


@sample("_grouped_mm.default")
def _(d: Draw) -> Any:
    """Widths whose halves, thirds and quarters are still of whole 16 bytes."""
    (experts,) = d(1)
    ends = d.ids(9, experts).sort().values.to(torch.int32)
    ends[-1] = 8
    x, weight = (d.x(*shape, dtype=torch.float32) for shape in ((8, 48), (experts, 48, 96)))
    return call(x, weight, ends)


def sorted_rows(d: Draw) -> Any:
    experts, wide, narrow = d(3)
    ends = d.ids(9, experts).sort().values.to(torch.int32)
    ends[-1] = 8
    return call(d.x(8, wide), d.x(experts, wide, narrow), ends)


SAMPLES.append(("transformers.grouped_mm_fallback.default", sorted_rows))


# -- indexing ------------------------------------------------------------------------------------


@sample("index_select.default")
def _(d: Draw) -> Any:
    a, b, c, n = d(4)
    return call(d.x(a, b, c), 1, d.ids(b, n))


@sample("gather.default")
def _(d: Draw) -> Any:
    a, b, n = d(3)
    return call(d.x(a, b), 1, d.ids(b, d.random.choice([a, max(a - 1, 1)]), n))


@sample("take_along_dim.default")
def _(d: Draw) -> Any:
    a, b, n = d(3)
    return call(d.x(a, b), d.ids(b, d.random.choice([a, 1]), n), d.random.choice([1, 1, None]))


@sample("scatter.value")
def _(d: Draw) -> Any:
    a, b, n = d(3)
    return call(d.x(a, b), 1, d.ids(b, d.random.choice([a, max(a - 1, 1)]), n), 2.0)


@sample("scatter.src")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    index = torch.stack([torch.randperm(b, generator=d.torch) for _ in range(a)])
    return call(d.x(a, b, c), 1, index[:, :, None].expand(a, b, c), d.x(a, b + 1, c))


@sample("scatter_reduce.two")
def _(d: Draw) -> Any:
    a, b, n = d(3)
    return call(d.x(a, b), 1, d.ids(b, a, n), d.x(a, n), "sum")


@sample("scatter_add.default")
def _(d: Draw) -> Any:
    a, b, n = d(3)
    return call(d.x(a, b), 1, d.ids(b, a, n), d.x(a, n))


@sample("index_add.default")
def _(d: Draw) -> Any:
    a, b, c, n = d(4)
    return call(d.x(a, b, c), 1, d.ids(b, n), d.x(a, n, c))


@sample("index_copy.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, b, c), 1, torch.randperm(b, generator=d.torch), d.x(a, b, c))


@sample("index_fill.int_Scalar")
def _(d: Draw) -> Any:
    a, b, n = d(3)
    return call(d.x(a, b), 1, d.ids(b, n), 3.0)


@sample("index_fill.int_Tensor")
def _(d: Draw) -> Any:
    a, b, n = d(3)
    return call(d.x(a, b), 1, d.ids(b, n), d.x())


@sample("index.Tensor _unsafe_index.Tensor")
def _(d: Draw) -> Any:
    a, b, c, n, m = d(5)
    one, two = d.ids(a, n, 1), d.ids(b, m)
    indices = d.random.choice(
        [[one], [None, d.ids(b, n, m)], [one, two], [one, None, d.ids(c, m)], [None, two]]
    )
    return call(d.x(a, b, c), indices)


@sample("index.Tensor")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), [d.bools(a)])


@sample("index_put.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    index = torch.randperm(b, generator=d.torch)
    return call(d.x(a, b, c), [None, index], d.random.choice([d.x(a, b, c), d.x(c), d.x()]))


@sample("index_put.default")
def _(d: Draw) -> Any:
    a, b, c, n, m = d(5)
    indices, shape = d.random.choice(
        [
            ([d.ids(a, n)], (n, b, c)),
            ([None, d.ids(b, n, m)], (a, n, m, c)),
            ([d.ids(a, n, 1), None, d.ids(c, m)], (n, m, b)),
            ([d.ids(a, n), d.ids(b, n)], (n, c)),
            ([d.ids(a, n)], (c,)),
            ([d.ids(a, n)], ()),
        ]
    )
    return call(d.x(a, b, c), indices, d.x(*shape), True)


SAMPLES += SAMPLES[-4:] * 3


@sample("one_hot.default")
def _(d: Draw) -> Any:
    return call(d.ids(5, *d(2)), d.random.choice([5, -1]))


@sample("topk.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.distinct(a, b + 1), d.random.choice([1, b, b + 1]))


@sample("sort.default argsort.default")
def _(d: Draw) -> Any:
    return call(d.distinct(*d(2)), 0)


@sample("msort.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)))


@sample("bucketize.Tensor")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))


@sample("masked_scatter.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.bools(a, b), d.x(a, b))


@sample("masked_select.default")
def _(d: Draw) -> Any:
    a, b = d(2)
    return call(d.x(a, b), d.bools(a, b))


# -- factories -----------------------------------------------------------------------------------


@sample("zeros.default ones.default empty.memory_format")
def _(d: Draw) -> Any:
    return call(d(2), dtype=torch.float64)


@sample("full.default")
def _(d: Draw) -> Any:
    return call(d(2), 2.5)


@sample("zeros_like.default ones_like.default empty_like.default")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)))


@sample("full_like.default fill.Scalar")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), 7)


@sample("fill.Tensor")
def _(d: Draw) -> Any:
    return call(d.x(*d(2)), d.x())


@sample("new_zeros.default new_ones.default new_empty.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, b), d.random.choice([[a, c], [b], [c, a, b]]))


@sample("new_full.default")
def _(d: Draw) -> Any:
    a, b, c = d(3)
    return call(d.x(a, b), [a, c], 1.5)


WHOLE_FACTORIES: dict[str, tuple[Any, ...]] = {
    "arange.default": (5,),
    "eye.default": (4,),
    "linspace.default": (0, 1, 5),
    "logspace.default": (0, 1, 5),
    "tril_indices.default": (3, 3),
    "triu_indices.default": (3, 3),
    "rand.default": ([3, 4],),
    "randn.default": ([3, 4],),
    "randint.default": (5, [3, 4]),
    "randperm.default": (5,),
    "rand_like.default": (torch.ones(2, 3),),
    "randn_like.default": (torch.ones(2, 3),),
    "randint_like.default": (torch.ones(2, 3), 5),
    "bernoulli.default": (torch.ones(2, 3) / 2,),
    "normal.Tensor_float": (torch.ones(2, 3),),
    "uniform.default": (torch.ones(2, 3),),
    "multinomial.default": (torch.ones(2, 3), 2),
    "exponential.default": (torch.ones(2, 3),),
    "native_dropout.default": (torch.ones(2, 3), 0.5, True),
    "feature_dropout.default": (torch.ones(2, 3), 0.5, True),
    "alpha_dropout.default": (torch.ones(2, 3), 0.5, True),
    "feature_alpha_dropout.default": (torch.ones(2, 3), 0.5, True),
    "scalar_tensor.default": (3.0,),
    "rrelu.default": (torch.ones(2, 3),),
}
assert {name.partition(".")[0] for name in WHOLE_FACTORIES} == set(factories.WHOLE)
SAMPLES += [
    (f"aten.{name}", lambda _draw, args=args: call(*args)) for name, args in WHOLE_FACTORIES.items()
]


def hinted(d: Draw) -> tuple[Args, dict[str, Any]]:
    return call(d.x(*d(3)), '{"split": 0}')


SAMPLES.append(("autopar.hint.default", hinted))
