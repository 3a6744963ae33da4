"""The lowered language: the typed collectives and sharded ops of one rank's program.

Per mesh axis a local tensor is `S` (a shard), `P` (partial), `R` (replicated, its gradient is
complete) or `V` (replicated, its gradient is still partial). Every collective moves one kind to
another, and its backward moves the gradient back along the dual kinds: the dual of S is S, of P is
R, of R is R, and of V is P. Passes put these targets into graphs; the runtime binds each name to an
implementation (`autopar.runtime`), so that neither imports the other.

Collectives come in two phases, so that they can be issued early and waited for late in *both*
directions. `open` issues the forward's communication; `close` waits for it. In the backward `close`
issues and `open` waits. Both take several tensors (a bucket) of one kind and group::

    *edges, pending = open(op, specs, group, *tensors)
    outputs         = close(op, specs, group, pending, *edges)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .sharding import Split


@dataclass(frozen=True)
class Collective:
    """One kind of collective: its type transition on the axis and what each direction sends."""

    name: str
    before: str
    after: str
    forward: str | None
    backward: str | None

    def __str__(self) -> str:
        return self.name


PVARY = Collective("pvary", "R", "V", None, "all_reduce")
PSUM = Collective("psum", "P", "R", "all_reduce", None)
PMAX = Collective("pmax", "P", "R", "all_reduce", None)
PMIN = Collective("pmin", "P", "R", "all_reduce", None)
GATHER_VARY = Collective("gather_vary", "S", "V", "all_gather", "reduce_scatter")
GATHER_INV = Collective("gather_inv", "S", "R", "all_gather", None)
SCATTER_SUM = Collective("scatter_sum", "P", "S", "reduce_scatter", "all_gather")
SLICE_INV = Collective("slice_inv", "R", "S", None, "all_gather")
SLICE_VARY = Collective("slice_vary", "V", "S", None, None)
SWAP = Collective("swap", "S", "S", "all_to_all", "all_to_all")
KEEP_FIRST = Collective("keep_first", "R", "P", None, None)

COLLECTIVES: dict[str, Collective] = {
    c.name: c
    for c in (
        PVARY,
        PSUM,
        PMAX,
        PMIN,
        GATHER_VARY,
        GATHER_INV,
        SCATTER_SUM,
        SLICE_INV,
        SLICE_VARY,
        SWAP,
        KEEP_FIRST,
    )
}


@dataclass(frozen=True)
class ShardSpec:
    """How one dim is divided among the members of a group.

    Seen from the group the dim has `outer * sum(lengths) * block` elements; member `i` holds, of
    every one of the `outer` repeats, `lengths[i] * block` consecutive elements.
    """

    dim: int
    lengths: tuple[int, ...]
    outer: int = 1
    block: int = 1

    @property
    def size(self) -> int:
        """Elements of the dim when gathered over the group."""
        return self.outer * sum(self.lengths) * self.block

    @property
    def is_even(self) -> bool:
        return len(set(self.lengths)) <= 1

    def local_size(self, member: int) -> int:
        return self.outer * self.lengths[member] * self.block

    def offset(self, member: int) -> int:
        """First unit of `member`."""
        return sum(self.lengths[:member])


@dataclass(frozen=True)
class SwapSpec:
    """A move of the split from one dim to another inside a group."""

    source: ShardSpec
    target: ShardSpec


@dataclass(frozen=True)
class GroupRef:
    """A communication group: the devices that differ only along `axes` (row-major over them).

    The runtime replaces it by a live group when a program is loaded.
    """

    axes: tuple[str, ...]

    def __str__(self) -> str:
        return "&".join(self.axes)

    def __repr__(self) -> str:
        return f"<{self}>"


@dataclass(frozen=True)
class LoweredOp:
    """A target of the lowered language; callable only once the runtime has bound it."""

    name: str

    @property
    def __name__(self) -> str:  # what FX names nodes after
        return self.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"lowered op {self.name!r} is not bound to a runtime")

    def __repr__(self) -> str:
        return self.name


# Before `localise_shapes`, the same for every rank. A reshard asks for a sharding
# (`reshard(x, sharding)`); a collective is one typed step on one axis (`collective(op, axis, x)`),
# its result's sharding in the node's value; a bucket is several of them in one message
# (`bucket(op, axis, [x, y])`).
RESHARD = LoweredOp("reshard")
COLLECTIVE = LoweredOp("collective")
BUCKET = LoweredOp("bucket")

# After `localise_shapes`, one rank's own program. An exchange is a collective on local tensors that
# waits at once (`exchange(op, spec, group, x)`); `overlap_collectives` splits it into its phases.
EXCHANGE = LoweredOp("exchange")
OPEN = LoweredOp("open")
CLOSE = LoweredOp("close")

# Ops whose shards need to know where they lie, or communicate by themselves. Signatures (tensors
# are local, groups are GroupRef | None):
#   dropout(x, p, seed, call, region)    mask is a function of seed, call and *global* element index
#   causal_attention(query, key, value, start, scale, enable_gqa)    rows [start, ...) of queries
#   masked_embedding(weight, ids, start, padding_idx)    rows [start, start + len) here; output P
#   cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing,
#                 vocab_start, vocab_size, vocab_group, token_group[, classes_last])
#   batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, group)
#   all_reduce_norm(x, residual, weight, eps, group[, epilogue, dtype])    psum of `x`, `residual`
#                 added, RMSNorm: (normalised, sum); put in by `fuse_all_reduce_norm`
#   prefix_sum(x, dim, group, dtype)    cumsum of a dim divided among the group in order
#   grouped_mm(op, x, weight, ends, rows, experts, group)    rows sorted by expert, divided
#   routed_gather(x, indices, route, group, padding_idx)    `x[indices]`, `x` divided by rows
#   routed_scatter(x, indices, values, route, group, accumulate, scale)    `x[indices] = values`
# In the program of one micro-batch, number `k`, `dropout` has `k` as a sixth argument, and a region
# for every micro-batch. Before `localise_shapes` the next two have no spec:
#   micro_slice(x, spec, k)    micro-batch `k`'s part of a value of the whole batch
#   micro_first(x, k)          the value in micro-batch 0, zeros in the others
DROPOUT = LoweredOp("dropout")
CAUSAL_ATTENTION = LoweredOp("causal_attention")
MASKED_EMBEDDING = LoweredOp("masked_embedding")
CROSS_ENTROPY = LoweredOp("cross_entropy")
BATCH_NORM = LoweredOp("batch_norm")
ALL_REDUCE_NORM = LoweredOp("all_reduce_norm")
PREFIX_SUM = LoweredOp("prefix_sum")
ROUTED_GATHER = LoweredOp("routed_gather")
ROUTED_SCATTER = LoweredOp("routed_scatter")
GROUPED_MM = LoweredOp("grouped_mm")
MICRO_SLICE = LoweredOp("micro_slice")
MICRO_FIRST = LoweredOp("micro_first")

LOWERED_OPS: dict[str, LoweredOp] = {
    op.name: op
    for op in (
        RESHARD,
        COLLECTIVE,
        BUCKET,
        EXCHANGE,
        OPEN,
        CLOSE,
        DROPOUT,
        CAUSAL_ATTENTION,
        MASKED_EMBEDDING,
        CROSS_ENTROPY,
        BATCH_NORM,
        ALL_REDUCE_NORM,
        PREFIX_SUM,
        ROUTED_GATHER,
        ROUTED_SCATTER,
        GROUPED_MM,
        MICRO_SLICE,
        MICRO_FIRST,
    )
}


@dataclass(frozen=True)
class Route:
    """Who owns what of the dims `dim`, `dim + 1`, ... of a tensor that index tensors index.

    `sizes` are the global sizes of the indexed dims. The first of them is divided: member `i` of
    the group holds `owned[i]` = (start, stop) of it. What no member holds reads as zero, and writes
    to it are dropped. `wraps` says that negative indices count from the end.
    """

    dim: int
    sizes: tuple[int, ...]
    owned: tuple[tuple[int, int], ...]
    wraps: bool = True


@dataclass(frozen=True)
class Region:
    """Where a local tensor lies in the global one: per dim the global size and the owned runs.

    `runs[d]` are (start, stop) pairs in order; a local index along the dim walks through them.
    """

    shape: tuple[int, ...]
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @staticmethod
    def of(
        shape: tuple[int, ...], splits: tuple[Split, ...], mesh: Any, coordinates: dict[str, int]
    ) -> Region:
        return Region(
            shape,
            tuple(
                tuple((r.start, r.stop) for r in split.runs(size, mesh, coordinates))
                for split, size in zip(splits, shape, strict=True)
            ),
        )
