"""Partition-invariant random masks: a hash of the seed, the call and the *global* element index.

Element `i` of a tensor is kept where `hash(seed, call, i) >= p * 2^32`, whoever computes it. With
`lo` and `hi` the two 32-bit halves of `i`, all arithmetic modulo 2^32 and `(k0, k1)` the keys of
(seed, call), the hash is ::

    x = lo * M0 + (k0 + hi * H0)
    x = (x ^ x >> 16) * M1
    x = x ^ (k1 ^ hi * H1)
    x = (x ^ x >> 15) * M2
    x = (x ^ x >> 16) * M3

a Weyl sequence and three rounds of the multiply-xorshift mixers of C. Wellons' hash-prospector
(`triple32`, `lowbias32`), the second key between two of them. Its last xor-shift is left out, since
a threshold looks at the high bits, which a multiplication mixes best. The same numbers come from
NumPy uint32 in blocks that fit in the cache (`keep_mask` on CPU: 1 to 2 ns per element on one
thread, against 5 to 10 for `F.dropout`), and from int64 tensor ops (`keep_mask_traced`: any device,
and what Inductor can fuse).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autopar.ir.lowered import Region

M0, M1, M2, M3 = 0x9E3779B1, 0xED5AD4BB, 0xAC4C1B51, 0x31848BAB
H0, H1 = 0x85EBCA77, 0xC2B2AE3D
MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF

# Elements that are hashed at a time: two uint32 blocks and the mask stay in the L2 cache, while the
# dozen calls per block cost little beside the work. Measured 4k to 64k: 16k and 32k are best.
BLOCK = 16384

Words = NDArray[np.uint32]
Bools = NDArray[np.bool_]


def _mix64(z: int) -> int:
    """The splitmix64 step (Steele, Lea, Flood 2014)."""
    z = (z + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def keys(seed: int, call: int) -> tuple[int, int]:
    """The two 32-bit keys of one random call."""
    key = _mix64(_mix64(seed & MASK64) ^ (call & MASK64))
    return key & MASK32, key >> 32


def threshold(p: float) -> int:
    """Hashes below it are dropped; 2^32 drops all."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return round(p * 2.0**32)


def draw_seed() -> int:
    """A seed for one forward, from torch's default generator: `torch.manual_seed` decides it."""
    return int(torch.randint(1 << 62, (), dtype=torch.int64))


def whole(shape: tuple[int, ...]) -> Region:
    """The region of a tensor that is not divided."""
    return Region(shape, tuple(((0, size),) for size in shape))


def local_shape(region: Region) -> tuple[int, ...]:
    """Shape of the local tensor that covers the region."""
    return tuple(sum(stop - start for start, stop in runs) for runs in region.runs)


def keep_mask(
    p: float, seed: int, call: int, region: Region, device: torch.device | None = None
) -> Tensor:
    """Bool tensor of the region's local shape: which elements are kept."""
    cpu = device is None or device.type == "cpu"
    if not cpu or torch.compiler.is_compiling():
        return keep_mask_traced(p, seed, call, region, device)
    out = np.empty(math.prod(local_shape(region)), dtype=np.bool_)
    limit = threshold(p)
    if limit > MASK32:
        out.fill(False)
    elif out.size:
        starts, length = segments(region)
        _fill(out, starts, length, limit, keys(seed, call))
    return torch.from_numpy(out).view(local_shape(region))


def segments(region: Region) -> tuple[NDArray[np.int64], int]:
    """Global flat indices where consecutive runs of the local elements start, and their length.

    All runs have one length: the longest that the region allows.
    """
    strides = strides_of(region.shape)
    inner, dim = 1, len(region.shape)
    while dim > 0 and region.runs[dim - 1] == ((0, region.shape[dim - 1]),):
        dim -= 1
        inner *= region.shape[dim]
    if dim == 0:
        return np.zeros(1, dtype=np.int64), inner
    dim -= 1  # the innermost dim of which not all is here
    runs = [(a, b) for a, b in region.runs[dim] if b > a]
    lengths = {b - a for a, b in runs}
    if len(lengths) == 1:
        starts = np.array([a for a, _ in runs], dtype=np.int64) * strides[dim]
        inner *= lengths.pop()
    else:
        starts = _indices(runs) * strides[dim]
    for outer in reversed(range(dim)):
        here = _indices(region.runs[outer]) * strides[outer]
        starts = (here[:, None] + starts[None, :]).reshape(-1)
    return starts, inner


def strides_of(shape: tuple[int, ...]) -> list[int]:
    """Of a contiguous tensor of the shape, in elements."""
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return strides


def _indices(runs: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in runs])


def _fill(
    out: Bools, starts: NDArray[np.int64], length: int, limit: int, key: tuple[int, int]
) -> None:
    """Write the mask of runs of `length` elements at `starts` (ascending) to `out`."""
    weyl = np.arange(min(length, BLOCK), dtype=np.uint32) * np.uint32(M0)
    x = np.empty(BLOCK, dtype=np.uint32)
    scratch = np.empty(BLOCK, dtype=np.uint32)
    if length * 2 > BLOCK:
        for row, start in enumerate(starts.tolist()):
            for begin in range(0, length, BLOCK):
                size = min(BLOCK, length - begin)
                place = out[row * length + begin : row * length + begin + size]
                _fill_run(place, start + begin, weyl[:size], x, scratch, limit, key)
        return
    rows = BLOCK // length
    for first in range(0, len(starts), rows):
        block = starts[first : first + rows]
        place = out[first * length : first * length + len(block) * length]
        hi = int(block[0]) >> 32
        if int(block[-1] + length - 1) >> 32 != hi:  # rare: crosses a multiple of 2^32
            for row, start in enumerate(block.tolist()):
                part = place[row * length : (row + 1) * length]
                _fill_run(part, start, weyl, x, scratch, limit, key)
            continue
        k0, k1 = (key[0] + hi * H0) & MASK32, key[1] ^ (hi * H1 & MASK32)
        base = block.astype(np.uint32) * np.uint32(M0) + np.uint32(k0)
        words = x[: place.size]
        np.add(base[:, None], weyl[None, :], out=words.reshape(len(block), length))
        _finish(place, words, scratch[: place.size], limit, k1)


def _fill_run(
    out: Bools, start: int, weyl: Words, x: Words, scratch: Words, limit: int, key: tuple[int, int]
) -> None:
    """Write the mask of consecutive elements from `start` on, at most a block."""
    done = 0
    while done < out.size:
        hi, lo = divmod(start + done, 1 << 32)
        size = min(out.size - done, (1 << 32) - lo)
        k0, k1 = (key[0] + hi * H0) & MASK32, key[1] ^ (hi * H1 & MASK32)
        np.add(weyl[:size], np.uint32((lo * M0 + k0) & MASK32), out=x[:size])
        _finish(out[done : done + size], x[:size], scratch[:size], limit, k1)
        done += size


def _finish(out: Bools, x: Words, scratch: Words, limit: int, k1: int) -> None:
    """The rounds after the Weyl step, in place, and the comparison."""
    np.right_shift(x, np.uint32(16), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    np.multiply(x, np.uint32(M1), out=x)
    np.bitwise_xor(x, np.uint32(k1), out=x)
    np.right_shift(x, np.uint32(15), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    np.multiply(x, np.uint32(M2), out=x)
    np.right_shift(x, np.uint32(16), out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    np.multiply(x, np.uint32(M3), out=x)
    np.greater_equal(x, np.uint32(limit), out=out)


def keep_mask_traced(
    p: float, seed: int, call: int, region: Region, device: torch.device | None = None
) -> Tensor:
    """The mask of `keep_mask` by tensor ops only."""
    shape = local_shape(region)
    index = torch.zeros(shape, dtype=torch.int64, device=device)
    for dim, (runs, stride) in enumerate(zip(region.runs, strides_of(region.shape), strict=True)):
        pieces = [torch.arange(a, b, dtype=torch.int64, device=device) for a, b in runs]
        along = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)) * stride
        index = index + along.view([-1 if d == dim else 1 for d in range(len(shape))])
    return hash32(index, seed, call, math.prod(region.shape)) >= threshold(p)


def hash32(index: Tensor, seed: int, call: int, numel: int | None = None) -> Tensor:
    """The 32-bit hash of int64 global indices, as int64; `numel` bounds the indices if known.

    Products wrap modulo 2^64, which leaves their low 32 bits right.
    """
    k0, k1 = keys(seed, call)
    x = (index & MASK32) * M0 + k0
    if numel is not None and numel <= 1 << 32:
        second: Tensor | int = k1
    else:
        hi = (index >> 32) & MASK32
        x = x + hi * H0
        second = (hi * H1 & MASK32) ^ k1
    x = x & MASK32
    x = ((x ^ (x >> 16)) * M1) & MASK32
    x = x ^ second
    x = ((x ^ (x >> 15)) * M2) & MASK32
    return ((x ^ (x >> 16)) * M3) & MASK32
