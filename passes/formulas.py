"""Cost formulas of ops, of edges and of whole steps, from a graph and what its nodes do.

The structure (which shardings, which collectives) is that of one assignment on one mesh; every
size in a formula is a symbol: the captured sizes and the mesh axes. `Pricer` computes the same
costs as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import sympy
import torch.fx

from autopar.cost.cluster import Device
from autopar.cost.compute import (
    LocalOp,
    accumulate_time,
    backward_time,
    forward_time,
    local_op,
    op_bytes,
    op_flops,
    optimizer_time,
)
from autopar.cost.families import op_family, op_name
from autopar.cost.formula import (
    Traced,
    axis_size,
    ceil,
    collective,
    expression,
    local_size,
    parts,
    sent_bytes,
    split_size,
    symbolic_device,
)
from autopar.cost.memory import saved, state_bytes
from autopar.ir.graph import Graph, Value, tensor_inputs, value_of, values_of
from autopar.ir.lowered import GATHER_VARY, PVARY
from autopar.ir.mesh import Mesh
from autopar.ir.reshard import reshard_steps
from autopar.ir.rule import Choice, Dims, ShardingRule, factor_sizes
from autopar.ir.sharding import Sharding

from .blocks import Blocks
from .formula_records import ZERO, CollectiveFormula, EdgeFormula, OpFormula, StoredFormula
from .gradient_sums import sum_time
from .kept import own_outputs
from .narrow_gathers import is_narrow, summed, travelling
from .own_formulas import own_messages

Node = torch.fx.Node
Chosen = tuple[tuple[str, Choice], ...]


class Formulas:
    """Formulas of the nodes of one graph on one mesh; each is made once.

    `symbolic` is the captured graph, `concrete` the same one at the sizes `hints` (with the same
    node names), `like` a device with the figures that all profiles have. An op costs what the one
    that stands for it in `blocks` does.
    """

    def __init__(
        self,
        symbolic: Graph,
        concrete: Graph,
        rules: Mapping[str, ShardingRule],
        hints: Mapping[sympy.Symbol, int],
        mesh: Mesh,
        like: Device,
        optimizer: str = "adamw",
        blocks: Blocks | None = None,
    ) -> None:
        self.concrete, self.rules, self.mesh, self.optimizer = concrete, rules, mesh, optimizer
        self.symbolic = symbolic
        self.hints = dict(hints)
        self.sizes = {**hints, **{axis_size(axis.name): axis.size for axis in mesh}}
        self._values = {n.name: values_of(n) for n in symbolic.fx.nodes}
        self._device = symbolic_device(like)
        self._stands_for = blocks.representative if blocks is not None else {}
        self._ops: dict[tuple[object, ...], OpFormula] = {}
        self._edges: dict[tuple[object, ...], EdgeFormula] = {}
        self._stored: dict[tuple[object, ...], StoredFormula] = {}
        self._kept: dict[Node, frozenset[int]] = {}
        self._number = lru_cache(maxsize=None)(self._find_number)

    # -- ops ----------------------------------------------------------------------------------

    def op(self, node: Node, chosen: Chosen) -> OpFormula:
        """An op of `concrete` under some choices."""
        node = self._stands_for.get(node, node)
        key = (self._signature(node), chosen)
        if key not in self._ops:
            self._ops[key] = self._find_op(node, dict(chosen))
        return self._ops[key]

    def _signature(self, node: Node) -> tuple[object, ...]:
        static = torch.fx.map_arg((node.args, node.kwargs), lambda n: _Type(str(self._types(n))))
        grads = [v.requires_grad for v in values_of(node)]
        rule = str(self.rules[node.name])
        return (
            op_name(node.target),
            str(static),
            str(self._types(node)),
            rule,
            *grads,
            _reads(node),
            own_outputs(node),
        )

    def _types(self, node: Node) -> list[tuple[object, ...]]:
        return [(v.shape, v.dtype, v.requires_grad) for v in self._values[node.name]]

    def _find_op(self, node: Node, chosen: Mapping[str, Choice]) -> OpFormula:
        rule = self.rules[node.name]
        sources = tensor_inputs(node)
        givens = [self._values[s.name][0] for s in sources]
        made = self._values[node.name]
        axes = axes_of(rule, self.mesh, chosen)
        factors = self._factors(node, rule)
        op = local_op(
            node,
            [self._local(d, v, axes, factors) for d, v in zip(rule.inputs, givens, strict=True)],
            [self._local(d, v, axes, factors) for d, v in zip(rule.outputs, made, strict=True)],
        )
        if "rows" in op.info:  # of a causal attention: a size, which a graph's meta has as a number
            op = replace(op, info={**op.info, "rows": self._size(made[0].shape[-2])})
        needed = any(v.requires_grad for v in made)
        backward: Any = backward_time(self._device, op) if needed else 0.0
        readers = _reads(node)
        value = node.meta["value"]
        if readers > 1 and isinstance(value, Value) and value.requires_grad:
            nbytes = op.outputs[0].bytes
            backward = backward + (readers - 1) * accumulate_time(self._device, nbytes)
        kept: Any = 0.0
        if needed:
            kept = saved(op).own_bytes + sum(op.outputs[i].bytes for i in own_outputs(node))
        return OpFormula(
            op_family(op.name),
            expression(op_flops(op)),
            expression(op_bytes(op)),
            expression(forward_time(self._device, op)),
            expression(backward),
            tuple(
                self._collective(kind, whole, axis, late)
                for kind, axis, late, whole in own_messages(op, rule, chosen)
            ),
            expression(kept),
        )

    def _factors(self, node: Node, rule: ShardingRule) -> dict[str, tuple[Any, int]]:
        """Symbolic size and size at the hints of every factor."""
        nodes = [*(s for s in tensor_inputs(node))]
        concrete = [values_of(s)[0] for s in nodes] + list(values_of(node))
        symbolic = [self._values[s.name][0] for s in nodes] + list(self._values[node.name])
        known = factor_sizes(rule, [v.int_shape() for v in concrete])
        found: dict[str, Any] = {}
        dims = [
            (dim, size)
            for tensor, value in zip((*rule.inputs, *rule.outputs), symbolic, strict=True)
            for dim, size in zip(tensor, value.shape, strict=True)
        ]
        for dim, size in dims:
            if len(dim) == 1:
                found.setdefault(dim[0], size)
        for _ in dims:
            for dim, size in dims:
                unknown = [f for f in dim if f not in found]
                if len(unknown) == 1:
                    rest = sympy.Mul(*(found[f] for f in dim if f in found))
                    found[unknown[0]] = sympy.sympify(size) / rest if rest != 0 else 0
        return {
            f: (found[f] if f in found and self._number(sympy.sympify(found[f])) == n else n, n)
            for f, n in known.items()
        }

    def _local(
        self,
        dims: Dims,
        value: Value,
        axes: Mapping[str, tuple[str, ...]],
        factors: Mapping[str, tuple[Any, int]],
    ) -> tuple[Any, ...]:
        """Local shape: numbers where nothing varies, traced sizes elsewhere."""
        shape = []
        for dim, size in zip(dims, value.shape, strict=True):
            split = [i for i, f in enumerate(dim) if f in axes]
            whole = sympy.sympify(size)
            local = whole
            if split:
                at = split[0]
                unit = sympy.Mul(*(factors[f][0] for i, f in enumerate(dim) if i != at))
                units = whole / unit
                if not self._is_whole(units):
                    units = sympy.floor(units)
                local = unit * split_size(units, axes[dim[at]])
            shape.append(self._size(local))
        return tuple(shape)

    def _size(self, size: Any) -> int | Traced:
        expr = sympy.sympify(size)
        return int(expr) if expr.is_Integer else Traced.of(expr, self._number(expr))

    def _is_whole(self, expr: sympy.Expr) -> bool:
        return bool(expr.is_integer) or float(self._number(expr)).is_integer()

    def _find_number(self, expr: sympy.Expr) -> float:
        value = expr.subs(self.sizes).replace(ceil, sympy.ceiling)
        return float(value)

    def _collective(
        self, kind: str, whole: sympy.Expr, axis: str, backward: bool, bucketed: bool = False
    ) -> CollectiveFormula:
        return CollectiveFormula(
            kind,
            axis,
            backward,
            collective(kind, whole, axis, bucketed),
            sent_bytes(kind, whole, axis),
        )

    # -- parameters ---------------------------------------------------------------------------

    def stored(self, node: Node, sharding: Sharding) -> StoredFormula:
        """A parameter stored at a sharding."""
        value = value_of(node)
        cast = travelling(node)
        key = (value.shape, value.dtype, value.requires_grad, value_of(cast).dtype, sharding)
        if key not in self._stored:
            sizes = zip(value.int_shape(), sharding.splits, strict=True)
            local = math.prod(local_size(size, split) for size, split in sizes)
            if not value.requires_grad:
                nbytes = expression(local * value.dtype.itemsize)
                self._stored[key] = StoredFormula(ZERO, nbytes)
            else:
                numel = local if isinstance(local, int) else Traced.of(local, self._number(local))
                seconds = optimizer_time(self._device, numel, value.dtype, self.optimizer)
                if cast is not node:
                    op = self._cast(cast, sharding)
                    seconds = seconds + forward_time(self._device, op)
                    if value_of(cast).requires_grad:
                        seconds = seconds + backward_time(self._device, op)
                self._stored[key] = StoredFormula(
                    expression(seconds),
                    expression(state_bytes(numel, value.dtype, self.optimizer).total),
                )
        return self._stored[key]

    def _cast(self, cast: Node, sharding: Sharding) -> LocalOp:
        """The cast of a parameter, on the shard that is stored."""
        sizes = zip(value_of(cast).int_shape(), sharding.splits, strict=True)
        shape = tuple(self._size(local_size(size, split)) for size, split in sizes)
        return local_op(cast, [shape], [shape])

    def sum_seconds(
        self, producer: Node, port: int, sharding: Sharding, regather: bool = False
    ) -> sympy.Expr:
        """Adding one micro-batch's gradient of a parameter to those of the ones before."""
        producer = summed(producer, regather)
        nbytes = self.gives_bytes(producer, port, sharding)
        traced = Traced.of(nbytes, self._number(nbytes))
        return expression(sum_time(self._device, traced, self._values[producer.name][port].dtype))

    # -- edges --------------------------------------------------------------------------------

    def edge(
        self, producer: Node, port: int, source: Sharding, want: Sharding, regather: bool = False
    ) -> EdgeFormula:
        """Resharding of a value for its readers, and of its gradient on the way back."""
        value = self._values[travelling(producer).name][port]
        role = producer.meta.get("role") if producer.op == "placeholder" else None
        nbytes = sympy.sympify(value.numel()) * value.dtype.itemsize
        key = (nbytes, value.requires_grad, role, is_narrow(producer), source, want, regather)
        if key not in self._edges:
            self._edges[key] = self._find_edge(*key)
        return self._edges[key]

    def _find_edge(
        self,
        nbytes: sympy.Expr,
        grad: bool,
        role: str | None,
        narrow: bool,
        source: Sharding,
        want: Sharding,
        regather: bool,
    ) -> EdgeFormula:
        found: list[CollectiveFormula] = []
        before = source
        for step in reshard_steps(source, want, self.mesh) if source != want else ():
            split = before if step.op.before == "S" else step.after
            whole = nbytes / _parts(split.without_axis(step.axis))
            bucketed = role is not None and step.op in (PVARY, GATHER_VARY)
            kinds = [(step.op.forward, False)]
            if grad:
                kinds.append((step.op.backward, True))
                if regather and step.op is GATHER_VARY:
                    kinds.append((step.op.forward, True))
            found += [
                self._collective(kind, whole, step.axis, backward, bucketed)
                for kind, backward in kinds
                if kind is not None
            ]
            before = step.after
        kept = nbytes / _parts(source if narrow and regather else want)
        if narrow:
            return EdgeFormula(tuple(found), kept)
        if role is not None and (role != "param" or regather or want.without_varying() == source):
            kept = ZERO
        return EdgeFormula(tuple(found), kept)

    def gives_bytes(self, node: Node, port: int, sharding: Sharding) -> sympy.Expr:
        """Bytes of one output of a node on the device that has most of it."""
        value = self._values[node.name][port]
        sizes = [
            split.outer * split.block * split_size(size / (split.outer * split.block), split.axes)
            if split
            else size
            for size, split in zip(map(sympy.sympify, value.shape), sharding.splits, strict=True)
        ]
        return sympy.Mul(value.dtype.itemsize, *sizes)

    def keeps_input(self, node: Node, slot: int) -> bool:
        """Whether autograd keeps tensor input `slot` of an op until the backward."""
        if node.op != "call_function":
            return False
        if node not in self._kept:
            needed = any(v.requires_grad for v in values_of(node))
            self._kept[node] = frozenset(saved(local_op(node)).inputs if needed else ())
        return slot in self._kept[node]


def axes_of(
    rule: ShardingRule, mesh: Mesh, chosen: Mapping[str, Choice]
) -> dict[str, tuple[str, ...]]:
    """The axes that split every factor, outermost first."""
    found: dict[str, tuple[str, ...]] = {}
    for axis in mesh.names:
        choice = chosen.get(axis)
        if choice is not None and choice.factor:
            for factor in rule.parts_of(choice.factor):
                found[factor] = (*found.get(factor, ()), axis)
    return found


class _Type(str):
    __slots__ = ()


def _reads(node: Node) -> int:
    return sum(1 for user in node.users if user.op == "call_function")


def _parts(sharding: Sharding) -> sympy.Expr:
    return sympy.Mul(*(parts(split.axes) for split in sharding.splits))
