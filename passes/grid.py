"""Prices of one programme on many meshes at once: every price is an array with one entry per mesh.

The same formulas as `price.Pricer` (which prices one mesh exactly), on arrays. Local sizes are
fractions of the whole where a micro-batch divides what the options were made for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import sympy
import torch.fx
from numpy.typing import NDArray

from autopar.cost.cluster import Cluster, group_span
from autopar.cost.comm import collective_time
from autopar.cost.compute import (
    accumulate_time,
    backward_time,
    forward_time,
    local_op,
    optimizer_time,
)
from autopar.cost.families import op_name
from autopar.cost.memory import saved, state_bytes
from autopar.ir.graph import Value, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Dim, Dims, Placed, ShardingRule, factor_sizes
from autopar.ir.sharding import Sharding, Split

from .kept import own_outputs
from .narrow_gathers import travelling, travelling_value
from .options import Option
from .price import message_bytes
from .route_costs import GROUPED, SCATTERS, route_messages

Node = torch.fx.Node
Array = NDArray[np.float64]
Sizes = Mapping[str, int]
Span = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Meshes that share their axis names, and the sizes of the captured symbols on all of them."""

    cluster: Cluster
    meshes: tuple[Mesh, ...]
    symbols: Mapping[sympy.Symbol, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.meshes)

    @cached_property
    def sizes(self) -> Mapping[str, Array]:
        """Axis -> size on every mesh."""
        return {
            name: np.array([mesh[name].size for mesh in self.meshes], dtype=np.float64)
            for name in self.meshes[0].names
        }

    @cached_property
    def spans(self) -> Mapping[str, list[tuple[Span, NDArray[np.int64]]]]:
        """Axis -> (span of its groups, the meshes that have it)."""
        found: dict[str, list[tuple[Span, NDArray[np.int64]]]] = {}
        for name in self.meshes[0].names:
            where: dict[Span, list[int]] = defaultdict(list)
            for i, mesh in enumerate(self.meshes):
                where[group_span(self.cluster, mesh, (name,))].append(i)
            found[name] = [(span, np.array(at)) for span, at in where.items()]
        return found

    def product(self, axes: Sequence[str]) -> Array:
        made = np.ones(len(self))
        for axis in axes:
            made = made * self.sizes[axis]
        return made


@dataclass(frozen=True)
class Layout:
    """Shardings of one tensor: per dim the distinct splits, and which one each sharding has."""

    count: int
    dims: tuple[tuple[tuple[Split, ...], NDArray[np.int64]], ...]


Layouts = tuple[list[Layout], list[Layout]]  # of inputs, of outputs


def layout_of(shardings: Sequence[Sharding]) -> Layout:
    """The shardings of one tensor, dim by dim."""
    dims = []
    for d in range(shardings[0].rank):
        at: dict[Split, int] = {}
        which = [at.setdefault(s.splits[d], len(at)) for s in shardings]
        dims.append((tuple(at), np.array(which, dtype=np.int64)))
    return Layout(len(shardings), tuple(dims))


@dataclass(frozen=True)
class OptionPrices:
    """Prices of the options of one node, [options, meshes]: seconds, bytes, and what is legal."""

    forward_s: Array
    backward_s: Array
    kept_bytes: Array
    made_bytes: Array
    legal: NDArray[np.bool_]


class GridPricer:
    """Prices on a grid; `sizes_of` gives the whole shape of every value of the reference graph.

    `symbolic[node]` has the captured shapes, in symbols; the options were made at `reference`.
    """

    def __init__(
        self,
        grid: Grid,
        symbolic: Mapping[str, Any],
        reference: Mapping[sympy.Symbol, int],
        optimizer: str,
        layouts: dict[Node, Layouts],
    ) -> None:
        self.grid, self.optimizer = grid, optimizer
        self.device = grid.cluster.device
        self._symbolic = symbolic
        self._reference = reference
        self._fractions: dict[tuple[int, tuple[str, ...]], tuple[Array, Array]] = {}
        self._split_dims: dict[object, tuple[Array, NDArray[np.bool_]]] = {}
        self._sizes: dict[object, int] = {}
        self._known_layouts = layouts

    # -- sizes --------------------------------------------------------------------------------

    def shape(self, node: Node, port: int = 0) -> tuple[int, ...]:
        """The whole shape of a value for the grid's symbols."""
        value = self._symbolic.get(node.name)
        if isinstance(value, tuple):
            value = [v for v in value if isinstance(v, Value)][port]
        if not isinstance(value, Value):
            return values_of(node)[port].int_shape()
        return tuple(self._number(size) for size in value.shape)

    def _number(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            self._sizes[size] = int(size.subs(self.grid.symbols))
        return self._sizes[size]

    def _share(self, units: int, axes: tuple[str, ...]) -> tuple[Array, Array]:
        """Of a dim of so many units: (largest shard's fraction, units per device)."""
        key = (units, axes)
        if key not in self._fractions:
            left = np.full(len(self.grid), float(units))
            for axis in axes:
                left = np.ceil(left / self.grid.sizes[axis])
            self._fractions[key] = (left / units, units / self.grid.product(axes))
        return self._fractions[key]

    def _factors(self, node: Node, rule: ShardingRule) -> tuple[Sizes, Sizes]:
        """Sizes of the factors of an op's rule: at the reference, and on the grid."""
        read = [(source, 0) for source in tensor_inputs(node)]
        tensors = read + [(node, port) for port, _ in enumerate(values_of(node))]
        was = factor_sizes(rule, [values_of(n)[port].int_shape() for n, port in tensors])
        return was, factor_sizes(rule, [self.shape(n, port) for n, port in tensors])

    def local(
        self,
        node: Node,
        port: int,
        shardings: Layout,
        factors: Dims | None = None,
        sizes: tuple[Sizes, Sizes] = ({}, {}),
    ) -> tuple[list[Any], Any]:
        """Local dims, each [shardings, meshes], and whether every device gets a unit of each.

        `factors` of the dims and their `sizes`, at the reference and on the grid, say which part of
        a dim is divided where the grid's batch is not the reference's.
        """
        whole = self.shape(node, port)
        legal = np.ones((shardings.count, len(self.grid)), dtype=np.bool_)
        dims: list[Any] = []
        for d, (size, (splits, which)) in enumerate(zip(whole, shardings.dims, strict=True)):
            if not any(splits):
                dims.append(np.full((shardings.count, 1), float(size)))
                continue
            dim = factors[d] if factors else ()
            units = tuple(_units(size, s, dim, *sizes) for s in splits)
            parts, has = self._parts(size, splits, units)
            dims.append(parts[which])
            legal &= has[which]
        return dims, legal

    def _parts(
        self, size: int, splits: tuple[Split, ...], units: tuple[int, ...]
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Of a dim, [splits, meshes]: the largest shards, and whether every device has a unit."""
        key = (size, tuple(s.axes for s in splits), units)
        if key not in self._split_dims:
            shares = [self._share(n, s.axes) for n, s in zip(units, splits, strict=True)]
            has = np.stack([per_device >= 1 for _, per_device in shares])
            has[[not split for split in splits]] = True
            self._split_dims[key] = (np.stack([size * part for part, _ in shares]), has)
        return self._split_dims[key]

    def bytes_of(self, node: Node, port: int, shardings: Layout) -> Array:
        dims, _ = self.local(node, port, shardings)
        made = np.full(
            (shardings.count, len(self.grid)), 1.0 * values_of(node)[port].dtype.itemsize
        )
        for dim in dims:
            made = made * dim
        return made

    def _layouts(self, node: Node, options: Sequence[Option]) -> Layouts:
        """How the options lay out every input and every output."""
        if node not in self._known_layouts:
            self._known_layouts[node] = (
                [layout_of(column) for column in zip(*(o.wants for o in options), strict=True)],
                [layout_of(column) for column in zip(*(o.gives for o in options), strict=True)],
            )
        return self._known_layouts[node]

    # -- options ------------------------------------------------------------------------------

    def call(self, node: Node, rule: ShardingRule, options: Sequence[Option]) -> OptionPrices:
        """Prices of an op's options: what `Pricer.op_time_s` and `saved_output_bytes` say."""
        full = (len(options), len(self.grid))
        legal = np.ones(full, dtype=np.bool_)
        inputs, outputs = [], []
        wants, gives = self._layouts(node, options)
        sizes = self._factors(node, rule)
        for slot, (source, layout) in enumerate(zip(tensor_inputs(node), wants, strict=True)):
            dims, ok = self.local(source, 0, layout, rule.inputs[slot], sizes)
            inputs.append(tuple(dims))
            legal &= ok
        made: Any = 0.0
        for port, layout in enumerate(gives):
            dims, ok = self.local(node, port, layout, rule.outputs[port], sizes)
            outputs.append(tuple(dims))
            legal &= ok
            made = made + math.prod(dims, start=1.0) * values_of(node)[port].dtype.itemsize
        made = _full(made, full)
        op = local_op(node, inputs, outputs)
        needs = any(v.requires_grad for v in values_of(node))
        forward = _full(forward_time(self.device, op), full)
        backward = _full(backward_time(self.device, op) if needs else 0.0, full)
        readers = sum(1 for user in node.users if user.op == "call_function")
        value = node.meta["value"]
        if readers > 1 and isinstance(value, Value) and value.requires_grad:
            backward = backward + (readers - 1) * accumulate_time(self.device, made)
        kept: Any = 0.0
        if needs:
            kept = saved(op).own_bytes + sum(op.outputs[i].bytes for i in own_outputs(node))
        for i, option in enumerate(options if rule.comm or rule.routes else ()):
            first, second = self._own_times(node, rule, option)
            forward[i] += first
            backward[i] += second
        return OptionPrices(forward, backward, _full(kept, full), made, legal)

    def _own_times(self, node: Node, rule: ShardingRule, option: Option) -> tuple[Any, Any]:
        """What `Pricer.own_times_s` says."""
        forward: Any = 0.0
        backward: Any = 0.0
        placed = Placed(option.wants, option.gives)
        own = [(axis, c) for axis, c in option.choices if rule.communicates_over(c.factor)]
        if not own:
            return forward, backward
        routed = self._routed(node)
        for axis, choice in own:
            if choice.factor in rule.comm:
                sizes = _own_messages(node, axis, placed, self._local_of(node, rule))
                forward = forward + self._collective_s("all_reduce", axis, sizes[0])
                backward = backward + self._collective_s("all_reduce", axis, sizes[1])
            sent = [
                route_messages(node, rule, placed, choice.factor, axis, mesh)
                for mesh in self.grid.meshes
            ]
            for same in zip(*sent, strict=True):
                nbytes = np.array([m.nbytes for m in same]) * routed ** same[0].power
                seconds = self._collective_s(same[0].kind, axis, nbytes)
                if same[0].backward:
                    backward = backward + seconds
                else:
                    forward = forward + seconds
        return forward, backward

    def _routed(self, node: Node) -> float:
        """How many times the rows of the reference a routed op exchanges on the grid."""
        name = op_name(node.target)
        rows = (
            node if name not in (*SCATTERS, *GROUPED) else tensor_inputs(node)[-(name in SCATTERS)]
        )
        was = max(math.prod(values_of(rows)[0].int_shape()), 1)
        return math.prod(self.shape(rows)) / was

    def _local_of(self, node: Node, rule: ShardingRule) -> Any:
        sources, sizes = tensor_inputs(node), self._factors(node, rule)
        slot = {id(value_of(source)): i for i, source in enumerate(sources)}

        def local(value: Value, sharding: Sharding) -> tuple[Any, ...]:
            i = slot.get(id(value), -1)
            owner, factors = (node, rule.outputs[0]) if i < 0 else (sources[i], rule.inputs[i])
            dims, _ = self.local(owner, 0, layout_of([sharding]), factors, sizes)
            return tuple(dim[0] for dim in dims)

        return local

    def _collective_s(self, kind: str, axis: str, nbytes: Any) -> Array:
        sizes = np.broadcast_to(np.asarray(nbytes, dtype=np.float64), (len(self.grid),))
        made = np.zeros(len(self.grid))
        for span, at in self.grid.spans[axis]:
            made[at] = collective_time(self.grid.cluster, kind, sizes[at], span)
        return made

    def stored(self, node: Node, options: Sequence[Option]) -> OptionPrices:
        """Prices of ways to store a parameter: the optimizer's time, the state's bytes."""
        value, shardings = value_of(node), self._layouts(node, options)[1][0]
        nbytes = self.bytes_of(node, 0, shardings)
        _, legal = self.local(node, 0, shardings)
        zero = np.zeros_like(nbytes)
        if node.meta.get("role") != "param":
            return OptionPrices(zero, zero, zero, nbytes, legal)
        if not value.requires_grad:
            return OptionPrices(zero, zero, nbytes, nbytes, legal)
        elements = nbytes / value.dtype.itemsize
        seconds = optimizer_time(self.device, elements, value.dtype, self.optimizer)
        cast = travelling(node)
        if cast is not node:
            dims, _ = self.local(node, 0, shardings)
            op = local_op(cast, [tuple(dims)], [tuple(dims)])
            seconds = seconds + forward_time(self.device, op)
            if value_of(cast).requires_grad:
                seconds = seconds + backward_time(self.device, op)
        extra = np.array([[1e-9 if o.regather else 0.0] for o in options])
        held = state_bytes(elements, value.dtype, self.optimizer).total
        return OptionPrices(zero, _full(seconds, zero.shape) + extra, held, nbytes, legal)

    def whole_bytes(self, node: Node, port: int) -> float:
        """Bytes of a whole value as it travels."""
        made = float(travelling_value(node, port).dtype.itemsize)
        for size in self.shape(node, port):
            made *= size
        return made


def _own_messages(
    node: Node, axis: str, placed: Placed, local: Callable[[Value, Sharding], tuple[Any, ...]]
) -> tuple[Any, Any]:
    """What `Pricer.own_messages` says, of local shapes that are arrays."""
    if op_name(node.target) != "cumsum":
        return message_bytes(node, placed, local)
    value, dim = values_of(node)[0], placed.outputs[0].dim_of(axis) or 0
    shape = local(value, placed.outputs[0])
    rest = math.prod((*shape[:dim], *shape[dim + 1 :]), start=1.0 * value.dtype.itemsize)
    return rest, rest * value.requires_grad


def _units(size: int, split: Split, dim: Dim, was: Sizes, now: Sizes) -> int:
    """Units that a split divides in a dim of `size`; the split was made at the sizes `was`."""
    if split.outer == split.block == 1:
        return max(size, 1)
    for i, factor in enumerate(dim):
        outer, block = (math.prod(was[f] for f in part) for part in (dim[:i], dim[i + 1 :]))
        if (outer, block) == (split.outer, split.block):
            return max(now[factor], 1)
    return max(size // (split.outer * split.block), 1)


def _full(value: Any, shape: tuple[int, int]) -> Array:
    return np.array(np.broadcast_to(np.asarray(value, dtype=np.float64), shape))
