"""Columns of a programme with what prices them: a variant's prices are a few array operations.

The prices are those of `accounts.Accounts`, on all meshes of a grid at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray

from autopar.ir.graph import value_of
from autopar.ir.sharding import Sharding

from .accounts import FULL, NONE, SELECTIVE, Regions, is_heavy
from .columns import Columns, Flow
from .gradient_sums import is_summed, sum_time, summed_as
from .grid import Grid
from .moves import MovePrices, Moves
from .narrow_gathers import is_narrow, travelling
from .narrow_gathers import summed as _summed
from .variant import Prices, Variant
from .wide_gradients import is_summed_apart
from .widening import widening

Node = torch.fx.Node
Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class PricedColumns:
    """Columns and their terms as arrays.

    `option` numbers the frame's options of the first columns, `calls` says which of those are
    calls'. `time_*` are the terms of the reshards that cost time, `bytes_*` of the flows that keep
    memory: the column, the pair or the value, and how often.
    """

    columns: Columns
    regions: Regions
    option: Ints
    calls: Flags
    time_column: Ints
    time_pair: Ints
    time_times: Array
    time_late: Flags
    time_again: Flags
    time_inside: Flags
    bytes_column: Ints
    bytes_flow: tuple[tuple[Flow, float], ...]
    bytes_value: Ints
    bytes_axes: tuple[tuple[str, ...], ...]
    bytes_saved: Array
    bytes_summed: Array
    sum_column: Ints
    sum_value: Ints
    sum_axes: tuple[tuple[str, ...], ...]
    sum_times: Array
    sum_widths: Array
    sum_dtypes: tuple[torch.dtype, ...]
    copies: dict[tuple[str, int], Array] = field(default_factory=dict)

    def prices(
        self,
        cost: Array,
        memory: Array,
        moved: MovePrices,
        value_bytes: Array,
        grid: Grid,
        variant: Variant,
        overlap: Array,
    ) -> Prices:
        """Prices of all columns; `cost` and `memory` are those of the frame's options."""
        shape, k = (self.columns.size, len(grid)), variant.micro_batches
        made = Prices(*(np.zeros(shape) for _ in range(4)))
        first = len(self.option)
        made.cost[:first], made.memory[:first] = cost[self.option], memory[self.option]
        if overlap.any():
            made.hides[:first][self.calls] = overlap * made.cost[:first][self.calls]
        if len(self.time_pair):
            seconds = self._seconds(moved, variant)
            late = self.time_late if overlap.any() else np.zeros(len(seconds), dtype=np.bool_)
            np.add.at(made.late, self.time_column[late], seconds[late])
            np.add.at(made.cost, self.time_column[~late], seconds[~late])
        if k > 1 and len(self.sum_value):
            np.add.at(made.cost, self.sum_column, (k - 1) * self._sums(value_bytes, grid))
        if len(self.bytes_value):
            factor = self.bytes_saved + (self.bytes_summed if k > 1 else 0.0)
            factor = factor * self._copies(variant) * value_bytes[self.bytes_value]
            split = {axes: grid.product(axes) for axes in set(self.bytes_axes)}
            parts = np.stack([split[axes] for axes in self.bytes_axes])
            np.add.at(made.memory, self.bytes_column, factor[:, None] / parts)
        return made

    def _seconds(self, moved: MovePrices, variant: Variant) -> Array:
        """Seconds per step of every reshard, as `Accounts.flow_time_s`."""
        k, pair = variant.micro_batches, self.time_pair
        forward = moved.forward_s[pair]
        once: Array = forward + moved.backward_s[pair]
        if self.time_again.any():
            once[self.time_again] += moved.gather_s[pair[self.time_again]]
        if variant.mode == FULL:
            twice = self.time_inside & ~self.time_late
            once[twice] += forward[twice]
        often = self.time_times * np.where(self.time_late & ~self.time_again, 1, k)
        return often[:, None] * once

    def _sums(self, value_bytes: Array, grid: Grid) -> Array:
        """Seconds to add one micro-batch's gradients of parameters, as `Accounts.sums_s`."""
        split = {axes: grid.product(axes) for axes in set(self.sum_axes)}
        whole = value_bytes[self.sum_value] * self.sum_widths
        nbytes = whole[:, None] / np.stack([split[axes] for axes in self.sum_axes])
        seconds = np.zeros_like(nbytes)
        for dtype in set(self.sum_dtypes):
            of = np.array([one == dtype for one in self.sum_dtypes])
            seconds[of] = sum_time(grid.cluster.device, nbytes[of], dtype)
        return self.sum_times[:, None] * seconds

    def _copies(self, variant: Variant) -> Array:
        key = (variant.mode, variant.in_flight)
        if key not in self.copies:
            self.copies[key] = np.array(
                [copies_kept(self.regions, flow, times, variant) for flow, times in self.bytes_flow]
            )
        return self.copies[key]


def copies_kept(regions: Regions, flow: Flow, times: float, variant: Variant) -> float:
    """How many copies of a saved flow are kept, as `Accounts.flow_memory`."""
    mode = variant.mode
    if flow.producer.op == "placeholder":
        return times
    inside = all(regions.block(e.consumer) >= 0 for e in flow.readers)
    if mode == NONE or not inside or regions.block(flow.producer) < 0:
        return variant.in_flight * times
    leaves = bool(regions.leaving.get(flow.producer, 0))
    kept = leaves or (mode == SELECTIVE and is_heavy(flow.producer))
    return 0.0 if kept and flow.source == flow.want else 1.0


def priceable(
    columns: Columns, regions: Regions, moves: Moves, option: Mapping[Node, Ints]
) -> PricedColumns:
    """The terms of columns; `option[node]` are the frame's numbers of its options."""
    time = [
        (column, columns.flows[item], times)
        for column, item, times in columns.time.triples()
        if columns.flows[item].source != columns.flows[item].want
    ]
    held = [
        (column, flow, times, saved, summed)
        for column, item, times in columns.memory.triples()
        for flow in (columns.flows[item],)
        for saved, summed in (_held(flow),)
        if saved or summed
    ]
    summed = [
        (column, columns.flows[item], times)
        for column, item, times in columns.time.triples()
        if is_summed(columns.flows[item].producer, columns.flows[item].port)
    ]
    numbers = [option[node] for node in columns.options]
    calls = [
        np.full(len(o), node.op == "call_function")
        for node, o in zip(columns.options, numbers, strict=True)
    ]
    return PricedColumns(
        columns,
        regions,
        np.concatenate(numbers),
        np.concatenate(calls),
        np.array([column for column, _, _ in time], dtype=np.int64),
        np.array(
            [moves.pair_of(f.producer, f.port, f.source, f.want) for _, f, _ in time],
            dtype=np.int64,
        ),
        np.array([times for _, _, times in time], dtype=np.float64),
        np.array([_is_param(f) for _, f, _ in time], dtype=np.bool_),
        np.array([f.regather and _is_param(f) for _, f, _ in time], dtype=np.bool_),
        np.array(
            [any(regions.block(e.consumer) >= 0 for e in f.readers) for _, f, _ in time],
            dtype=np.bool_,
        ),
        np.array([column for column, *_ in held], dtype=np.int64),
        tuple((f, times) for _, f, times, _, _ in held),
        np.array([moves.values[f.producer, f.port] for _, f, *_ in held], dtype=np.int64),
        tuple(_axes(f, saved) for _, f, _, saved, _ in held),
        np.array([float(saved) for *_, saved, _ in held]),
        np.array([float(summed) for *_, summed in held]),
        np.array([column for column, *_ in summed], dtype=np.int64),
        np.array([moves.values[f.producer, f.port] for _, f, _ in summed], dtype=np.int64),
        tuple(_axes_of(summed_as(f.source, f.want, f.regather)) for _, f, _ in summed),
        np.array([times for *_, times in summed], dtype=np.float64),
        np.array([_width(f) for _, f, _ in summed], dtype=np.float64),
        tuple(value_of(_summed(f.producer, f.regather)).dtype for _, f, _ in summed),
    )


def _is_param(flow: Flow) -> bool:
    return flow.producer.op == "placeholder" and flow.producer.meta.get("role") == "param"


def _held(flow: Flow) -> tuple[bool, int]:
    """Whether what arrives is kept, and how often as much the sum of its gradient takes.

    The former as `Pricer.saved_input_bytes`, the latter, under several micro-batches, as
    `Accounts.flow_memory`.
    """
    if flow.producer.op != "placeholder":
        return True, 0
    if not _is_param(flow):
        return False, 0
    value = value_of(_summed(flow.producer, flow.regather))
    apart = is_summed_apart(flow.producer, flow.source, flow.want, flow.regather)
    return apart or is_narrow(flow.producer), (apart + widening(value.dtype)) * value.requires_grad


def _width(flow: Flow) -> float:
    """How much wider what is summed of a parameter is than what travels."""
    moved, held = travelling(flow.producer), _summed(flow.producer, flow.regather)
    return value_of(held).dtype.itemsize / value_of(moved).dtype.itemsize


def _axes(flow: Flow, saved: bool) -> tuple[str, ...]:
    """The axes that split what is kept; of a sum beside a stored gradient, the gradient's."""
    shard = is_narrow(flow.producer) and flow.regather
    return _axes_of(flow.want if saved and not shard else flow.source)


def _axes_of(sharding: Sharding) -> tuple[str, ...]:
    return tuple(sorted(axis for split in sharding.splits for axis in split.axes))
