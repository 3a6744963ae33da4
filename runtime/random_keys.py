"""The masks of `autopar.runtime.random` as tensor ops that a compiler fuses with what is around.

The seed is not part of what is compiled: a program reads the keys of its random calls from a small
tensor that is made anew for every run. All arithmetic is on int32, which wraps modulo 2^32.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from autopar.ir.lowered import Region

from .random import H0, H1, M0, M1, M2, M3, MASK32, keys, local_shape, strides_of, threshold, whole

_SIGN = 1 << 31
_DIGITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}  # binary, with the hidden one


def key_table(seed: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """The keys of `count` random calls from number `first` on: int32 [count, 2]."""
    words = np.array([keys(seed, first + i) for i in range(count)], dtype=np.uint32)
    table = torch.from_numpy(words.reshape(count, 2).view(np.int32))
    return table if device is None else table.to(device)


def traced_mask(p: float, key: Tensor, region: Region) -> Tensor:
    """`keep_mask` on the device of `key`, which is a row of a `key_table`."""
    limit, device = threshold(p), key.device
    if limit > MASK32:
        return torch.zeros(local_shape(region), dtype=torch.bool, device=device)
    numel = math.prod(region.shape)
    index = _index(region, torch.int32 if numel <= _SIGN else torch.int64, device)
    first, second = key[0], key[1]
    if numel > 1 << 32:
        high = (index >> 32).to(torch.int32)
        first, second = first + high * _signed(H0), second ^ (high * _signed(H1))
    x = index.to(torch.int32) * _signed(M0) + first
    x = (x ^ _shifted(x, 16)) * _signed(M1)
    x = x ^ second
    x = (x ^ _shifted(x, 15)) * _signed(M2)
    x = (x ^ _shifted(x, 16)) * _signed(M3)
    return (x ^ -_SIGN) >= limit - _SIGN  # as unsigned words


def masked(x: Tensor, p: float, table: Tensor, call: int, region: Region | None = None) -> Tensor:
    """Dropout of `x`, which covers the region (default: all of a tensor), bit for bit as op by op.

    Nothing of the size of `x` is needed for its gradient but the mask, which follows from `table`.
    """
    if p == 0.0:
        return x
    key = table[call].to(x.device)  # of a model on several devices, only some of it is there
    mask = traced_mask(p, key, whole(tuple(x.shape)) if region is None else region)
    return x.contiguous() * (mask.to(x.dtype) * _rounded_scale(p, x.dtype))


def _index(region: Region, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Global flat indices of the local elements."""
    shape = local_shape(region)
    if shape == tuple(region.shape):
        return torch.arange(math.prod(shape), dtype=dtype, device=device).view(shape)
    index = torch.zeros(shape, dtype=dtype, device=device)
    for dim, (runs, stride) in enumerate(zip(region.runs, strides_of(region.shape), strict=True)):
        pieces = [torch.arange(a, b, dtype=dtype, device=device) for a, b in runs]
        along = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)) * stride
        index = index + along.view([-1 if d == dim else 1 for d in range(len(shape))])
    return index


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Of int32 as unsigned words, shifted to the right."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _rounded_scale(p: float, dtype: torch.dtype) -> float:
    """1 / (1 - p) as a number of the dtype: compilers keep more digits than single ops."""
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    digits = _DIGITS.get(dtype)
    if digits is None:
        return scale
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(float(round(mantissa * (1 << digits))), exponent - digits)
