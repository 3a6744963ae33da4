"""bfloat16 in Triton's interpreter as a GPU has it.

The interpreter keeps bfloat16 as the raw bits in uint16: arithmetic on it works on the bits, and
conversions from wider types cut off. Inside of `rounding()` arithmetic is done in float32, and
every conversion to bfloat16 rounds to the nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from autopar.compat import triton_interpreter


@contextmanager
def rounding() -> Iterator[None]:
    """Mend the interpreter's bfloat16 while kernels run."""
    module = triton_interpreter()
    builder = module.InterpreterBuilder
    mended = _mended(module)
    before = {name: getattr(builder, name) for name in mended}
    for name, method in mended.items():
        setattr(builder, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(builder, name, method)


def _mended(module: Any) -> dict[str, Callable[..., Any]]:
    import triton.language as tl

    builder, handle = module.InterpreterBuilder, module.TensorHandle
    bf16 = tl.bfloat16

    def widened(value: Any) -> Any:
        if value.dtype.scalar != bf16:
            return value
        return handle(_from_bits(value.data), tl.float32)

    def narrowed(value: Any) -> Any:
        return handle(_to_bits(value.data), bf16)

    def converting(original: Callable[..., Any]) -> Callable[..., Any]:
        def convert(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
            target = dst_type.scalar
            if src.dtype.scalar == bf16 and target != bf16:
                return original(self, widened(src), dst_type, *rest)
            if target == bf16 and src.dtype.scalar != bf16:
                return narrowed(src)
            return original(self, src, dst_type, *rest)

        return convert

    def computing(original: Callable[..., Any], values: int) -> Callable[..., Any]:
        def compute(self: Any, *arguments: Any) -> Any:
            if all(a.dtype.scalar != bf16 for a in arguments[:values]):
                return original(self, *arguments)
            out = original(self, *map(widened, arguments[:values]), *arguments[values:])
            return narrowed(out) if out.dtype.scalar == tl.float32 and _is_value(out) else out

        return compute

    return {
        "cast_impl": converting(builder.cast_impl),
        "create_fp_to_fp": converting(builder.create_fp_to_fp),
        "binary_op": computing(builder.binary_op, 2),
        "unary_op": computing(builder.unary_op, 1),
    }


def _is_value(out: Any) -> bool:
    """Comparisons have float's type and bools for data."""
    return bool(out.data.dtype != np.bool_)


def _from_bits(data: Any) -> Any:
    return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)


def _to_bits(data: Any) -> Any:
    rounded = torch.from_numpy(np.atleast_1d(data)).to(torch.float32).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(data))
