"""bfloat16 in Triton's interpreter as a GPU has it.

The interpreter keeps bfloat16 as the raw bits in uint16: arithmetic on it works on the bits, and
conversions from wider types cut off. Inside of `rounding()` arithmetic is done in float32, and
every conversion to bfloat16 rounds to the nearest, ties to even.

Triton 3.6 also takes the bounds of loops from arrays of one dim by `int`, which NumPy 2.4 refuses;
they are taken by `item` here.
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
    """Mend the interpreter's bfloat16 and its loops while kernels run."""
    module = triton_interpreter()
    mended = [(module.InterpreterBuilder, *method) for method in _mended(module).items()]
    mended.append((module, "_patch_lang_tensor", _indexing(module._patch_lang_tensor)))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in mended]
    for owner, name, method in mended:
        setattr(owner, name, method)
    try:
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def _indexing(original: Callable[..., Any]) -> Callable[..., Any]:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)  # what it sets on the class, the scope takes back
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patch


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
