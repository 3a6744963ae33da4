"""The masks: their statistics, their invariance, and that every way of computing them agrees."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from autopar.ir.lowered import Region
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Split
from autopar.runtime.eager_random import PartitionInvariantDropout, sdpa_with_dropout
from autopar.runtime.random import (
    BLOCK,
    hash32,
    keep_mask,
    keep_mask_traced,
    segments,
    whole,
)
from autopar.runtime.sharded_ops import dropout

N = 1 << 20


def centred(p: float, seed: int, call: int) -> np.ndarray:
    """The mask, scaled to mean 0 and variance 1 if it is as random as it should be."""
    mask = keep_mask(p, seed, call, whole((N,))).numpy()
    return ((mask - (1 - p)) / math.sqrt(p * (1 - p))).astype(np.float32)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_statistics(p: float) -> None:
    """Every number below is a standard normal if the masks are random: none beyond 4.5 of ~200."""
    masks = [centred(p, seed, call) for seed, call in itertools.product((0, 1, 12345), (0, 1, 7))]
    z = {f"mean {i}": m.sum(dtype=np.float64) / math.sqrt(N) for i, m in enumerate(masks)}
    for i, j in itertools.combinations(range(len(masks)), 2):
        z[f"between calls and seeds {i} {j}"] = float(masks[i] @ masks[j]) / math.sqrt(N)
    for lag in (1, 2, 3, 4, 5, 7, 8, 16, 64, 256, 768, 1024, 4096, BLOCK, 65536, N // 2):
        for i in (0, 4, 8):
            z[f"lag {lag} of {i}"] = float(masks[i][:-lag] @ masks[i][lag:]) / math.sqrt(N - lag)
    for width in (64, 1024):
        for axis in (0, 1):
            sums = masks[2].reshape(-1, width).sum(axis, dtype=np.float64) ** 2
            count = N // width if axis == 0 else width
            chi2 = (sums / count).sum()
            free = len(sums)
            # The fourth moment of a sum of `count` two-valued terms is 3 + (kurtosis - 3) / count.
            spread = 2 + (1 / (p * (1 - p)) - 6) / count
            z[f"blocks of {width} by {axis}"] = (chi2 - free) / math.sqrt(spread * free)
    worst = max(z, key=lambda name: abs(z[name]))
    assert abs(z[worst]) < 4.5, (worst, z[worst])
    assert 0.8 < np.std(list(z.values())) < 1.2


def test_bits_avalanche() -> None:
    """Flipping any bit of the index flips each of the high hash bits half of the time."""
    index = torch.randint(0, 1 << 40, (4096,), generator=torch.Generator().manual_seed(0))
    before = hash32(index, 3, 5)
    for bit in range(40):
        flipped = before ^ hash32(index ^ (1 << bit), 3, 5)
        for high in range(20, 32):
            share = ((flipped >> high) & 1).double().mean().item()
            assert abs(share - 0.5) < 0.06, (bit, high, share)


def test_numpy_and_tensor_ops_agree() -> None:
    huge = (3, 1 << 31, 5)
    regions = [
        whole((1000, 37)),
        whole(()),
        whole((0, 3)),
        whole((3 * BLOCK + 5,)),
        Region((8, 6, 10), (((0, 8),), ((1, 3), (4, 6)), ((0, 10),))),
        Region((8, 6, 10), (((0, 8),), ((1, 3), (4, 5)), ((2, 7),))),  # runs of two lengths
        Region((8, 6, 10), (((0, 8),), ((1, 1), (4, 6)), ((9, 10),))),  # an empty run
        Region((8, 6), (((3, 3),), ((0, 6),))),
        Region((5, 40000), (((0, 5),), ((100, 30000),))),
        Region(huge, (((1, 3),), ((0, 100), ((1 << 31) - 50, 1 << 31)), ((0, 5),))),
        Region(huge, (((0, 3),), (((1 << 32) // 5 - 3, (1 << 32) // 5 + 9),), ((0, 5),))),
        Region((1 << 34,), (((0, 9), ((1 << 32) - 20, (1 << 32) - 11), (1 << 33, (1 << 33) + 9)),)),
        Region((1 << 34,), ((((1 << 32) - 9, (1 << 32) + BLOCK),),)),
    ]
    for region in regions:
        for p in (0.0, 0.3, 1.0):
            fast = keep_mask(p, 7, 2, region)
            assert torch.equal(fast, keep_mask_traced(p, 7, 2, region)), region
            if p in (0.0, 1.0):
                assert bool((fast == (p == 0.0)).all())


def test_golden() -> None:
    """The masks of a seed never change: checkpoints and papers depend on them."""
    index = torch.tensor([0, 1, 2, 1 << 32, (1 << 40) + 17])
    assert hash32(index, 0, 0).tolist() == GOLDEN
    bits = keep_mask(0.5, 1234, 3, whole((16,))).int().tolist()
    assert bits == GOLDEN_BITS


GOLDEN = [1386475089, 3259071153, 2765560383, 3369688804, 3801150709]
GOLDEN_BITS = [1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1]


def test_segments_are_long() -> None:
    region = Region((4, 6, 10), (((1, 3),), ((0, 6),), ((0, 10),)))
    starts, length = segments(region)
    assert (starts.tolist(), length) == ([60], 120)
    region = Region((4, 6, 10), (((1, 3),), ((0, 2), (3, 5)), ((0, 10),)))
    starts, length = segments(region)
    assert (starts.tolist(), length) == ([60, 90, 120, 150], 20)


@pytest.mark.parametrize("split", [Split(("a",)), Split(("a", "b")), Split(("b",), 2, 3)])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_partition_invariance(split: Split, dim: int) -> None:
    """Shards of dropout are dropout of shards, gradient included, contiguous or not."""
    mesh = Mesh.of(a=2, b=3)
    shape = [5, 4, 7]
    shape[dim] = 24
    x = torch.randn(shape, dtype=torch.float64)
    expected = dropout(x, 0.4, 11, 2, whole(tuple(shape)))
    kept = expected != 0
    assert torch.equal(expected, torch.where(kept, x * (1 / (1 - 0.4)), 0.0))
    splits = [Split()] * 3
    splits[dim] = split
    for rank in range(mesh.size):
        coordinates = mesh.coordinates(rank)
        region = Region.of(tuple(shape), tuple(splits), mesh, coordinates)
        index = torch.tensor([i for r in region.runs[dim] for i in range(*r)], dtype=torch.long)
        local = x.index_select(dim, index)
        for view in (local, local.transpose(0, 2).contiguous().transpose(0, 2)):
            leaf = view.clone(memory_format=torch.preserve_format).requires_grad_()
            y = dropout(leaf, 0.4, 11, 2, region)
            assert torch.equal(y, expected.index_select(dim, index))
            y.sum().backward()
            mine = kept.index_select(dim, index)
            assert torch.equal(leaf.grad, mine.double() * (1 / (1 - 0.4)))


def test_dropout_edges() -> None:
    x = torch.randn(100, requires_grad=True)
    assert torch.equal(dropout(x, 0.0, 1, 1, whole((100,))), x)
    y = dropout(x, 1.0, 1, 1, whole((100,)))
    assert not y.any()
    y.sum().backward()
    assert not x.grad.any()
    for dtype in (torch.bfloat16, torch.float16):
        y = dropout(torch.ones(100, dtype=dtype), 0.5, 1, 1, whole((100,)))
        assert y.dtype == dtype and set(y.tolist()) == {0.0, 2.0}
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout(x, 1.5, 1, 1, whole((100,)))
    with pytest.raises(ValueError, match="region"):
        dropout(x, 0.5, 1, 1, whole((10,)))


class Block(nn.Module):
    """Dropouts of several kinds, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.linear(x))
        h = F.dropout(h.tanh() * 2, 0.2, self.training, inplace=True)
        q = h.view(2, -1, 2, 4).transpose(1, 2)
        a = F.scaled_dot_product_attention(
            q, q, q, dropout_p=0.25 if self.training else 0.0, is_causal=True
        )
        return torch.dropout(a.transpose(1, 2).reshape_as(h), 0.1, self.training)


def run_block(block: nn.Module, x: Tensor, checkpoint: str, seed: int = 5) -> list[Tensor]:
    """Output and gradients of two blocks, the second and a nested third perhaps checkpointed."""
    block.zero_grad()

    def call(function: object, value: Tensor, nested: bool) -> Tensor:
        if checkpoint == "none":
            return function(value)
        reentrant = checkpoint == "reentrant"
        return torch.utils.checkpoint.checkpoint(function, value, use_reentrant=reentrant)

    def inner(value: Tensor) -> Tensor:
        return call(block, block(value) + value, True)

    x = x.clone().requires_grad_()
    with PartitionInvariantDropout(seed) as mode:
        y = block(call(inner, block(x), False))
        assert mode.calls == 16
    (y**2).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in block.parameters())]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("checkpoint", ["reentrant", "other"])
def test_mode_under_checkpointing(checkpoint: str) -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 8)
    expected = run_block(block, x, "none")
    for _ in range(2):  # the masks repeat from one forward to the next
        for got, want in zip(run_block(block, x, checkpoint), expected, strict=True):
            torch.testing.assert_close(got, want)
    other = run_block(block, x, checkpoint, seed=6)
    assert not torch.allclose(other[0], expected[0])


def test_mode_numbers_its_calls() -> None:
    x = torch.ones(4, 6)
    with PartitionInvariantDropout(9):
        first, off = F.dropout(x, 0.5), F.dropout(x, 0.5, training=False)
        nothing, second = nn.Dropout(0.0)(x), nn.Dropout(0.5)(x)
    assert torch.equal(off, x) and torch.equal(nothing, x)
    assert torch.equal(first, dropout(x, 0.5, 9, 0, whole((4, 6))))
    assert torch.equal(second, dropout(x, 0.5, 9, 1, whole((4, 6))))
    with pytest.raises(ValueError, match="between 0 and 1"), PartitionInvariantDropout(9):
        F.dropout(x, -0.1)
    torch.manual_seed(0)
    native = F.dropout(x, 0.5)
    torch.manual_seed(0)
    with PartitionInvariantDropout(9):
        pass
    assert torch.equal(F.dropout(x, 0.5), native), "the mode ends with its block"


def test_mode_reaches_into_multihead_attention() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 5, 8)
    for weights in (False, True):
        with PartitionInvariantDropout(1) as mode:
            first = attention(x, x, x, need_weights=weights)[0]
            assert mode.calls == 1
        torch.manual_seed(99)
        with PartitionInvariantDropout(1):
            assert torch.equal(attention(x, x, x, need_weights=weights)[0], first)
        with PartitionInvariantDropout(2):
            assert not torch.equal(attention(x, x, x, need_weights=weights)[0], first)


def test_other_dropouts_warn_and_stay_native() -> None:
    x = torch.ones(2, 8, 4, 4)
    with PartitionInvariantDropout(1) as mode, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        F.dropout2d(x, 0.5)
        F.alpha_dropout(x, 0.5, training=True)
        nn.Dropout2d(0.5).eval()(x)
        F.alpha_dropout(x, 0.5)
    assert mode.calls == 0
    assert len(caught) == 2
    assert "dropout2d" in str(caught[0].message) and "alpha_dropout" in str(caught[1].message)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention(mask: str, grouped: bool) -> None:
    """Without dropout it is torch's attention; with it, shards over heads and batch agree."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2 if grouped else 4, 5, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(k, requires_grad=True)
    given = {
        "none": None,
        "causal": None,
        "bool": torch.rand(5, 5) > 0.4,
        "float": torch.randn(2, 1, 5, 5, dtype=torch.float64),
    }[mask]
    if mask == "bool":
        given[2] = False  # attends to nothing
    causal = mask == "causal"
    mine = sdpa_with_dropout(q, k, v, given, 0.0, causal, 0.3, grouped, seed=1, call=0)
    theirs = F.scaled_dot_product_attention(
        q, k, v, given, is_causal=causal, scale=0.3, enable_gqa=grouped
    )
    torch.testing.assert_close(mine, theirs)
    g = torch.randn_like(mine)
    for a, b in zip(
        torch.autograd.grad(mine, (q, k, v), g),
        torch.autograd.grad(theirs, (q, k, v), g),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    dropped = sdpa_with_dropout(q, k, v, given, 0.5, causal, 0.3, grouped, seed=1, call=0)
    assert not torch.allclose(dropped, mine)
    region = Region((2, 4, 5, 5), (((1, 2),), ((2, 4),), ((0, 5),), ((0, 5),)))
    heads = slice(1, 2) if grouped else slice(2, 4)
    part = given if given is None or given.dim() == 2 else given[1:]
    shard = sdpa_with_dropout(
        q[1:, 2:], k[1:, heads], v[1:, heads], part, 0.5, causal, 0.3, grouped, 1, 0, region
    )
    torch.testing.assert_close(shard, dropped[1:, 2:])
