"""What every node of a graph may do on a mesh, with its price: the planner's columns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch.fx

from autopar.cost.families import op_family, op_name
from autopar.ir.graph import tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.rule import Choice, Placed, ShardingRule, choices, factor_sizes, place
from autopar.ir.sharding import Sharding, Split

from .price import Pricer

Node = torch.fx.Node
Allowed = Callable[[Node, str, Choice], bool]


@dataclass(frozen=True)
class Option:
    """One thing a node may do: what it wants of its inputs, what it gives, and what it costs.

    `time_s` covers one step, forward and backward (for parameters: the optimizer's update);
    `memory_bytes` what the node itself keeps alive until its backward (for parameters: the stored
    shard with gradient and optimizer state); `forward_s` is the forward's share of `time_s`.
    """

    choices: tuple[tuple[str, Choice], ...]
    wants: tuple[Sharding, ...]
    gives: tuple[Sharding, ...]
    time_s: float
    memory_bytes: float
    regather: bool = False
    forward_s: float = 0.0


def place_call(
    node: Node,
    rule: ShardingRule,
    mesh: Mesh,
    chosen: Mapping[str, Choice],
    *,
    uneven: bool = False,
) -> Placed | None:
    """`place` for one node of a graph, with the varying axes of its differentiable inputs marked.

    If any input or output is split or partial on an axis, a replicated differentiable input gets
    only this device's share of its gradient there: it must be varying. None if illegal; `uneven`
    admits factors with fewer units than devices (some devices then hold nothing).
    """
    inputs = [value_of(source) for source in tensor_inputs(node)]
    outputs = values_of(node)
    shapes = [v.int_shape() for v in (*inputs, *outputs)]
    placed = place(rule, factor_sizes(rule, shapes), mesh, chosen, uneven=uneven)
    if placed is None or not any(v.requires_grad for v in outputs):
        return placed
    used = {axis for s in (*placed.inputs, *placed.outputs) for axis in s.used_axes()}
    wants = tuple(
        s.with_varying(*(a for a in mesh.names if a in used and s.kind(a) == "R"))
        if value.requires_grad
        else s
        for s, value in zip(placed.inputs, inputs, strict=True)
    )
    return Placed(wants, placed.outputs)


def call_options(
    node: Node, rule: ShardingRule, mesh: Mesh, pricer: Pricer, allowed: Allowed
) -> list[Option]:
    """All legal options of an op, the cheaper of any two that want and give the same."""
    # A product of a partial operand costs every device the whole product: reduce before it.
    heavy = op_family(op_name(node.target)) in ("matmul", "conv", "attention")
    per_axis = [
        [
            (axis, c)
            for c in choices(rule)
            if c.is_replicate or (allowed(node, axis, c) and not (c.linear >= 0 and heavy))
        ]
        for axis in mesh.names
    ]
    best: dict[tuple[object, object], Option] = {}
    for combination in itertools.product(*per_axis):
        placed = place_call(node, rule, mesh, dict(combination))
        if placed is None or any(_doubled(s) for s in (*placed.inputs, *placed.outputs)):
            continue
        chosen = tuple((axis, c) for axis, c in combination if not c.is_replicate)
        forward, backward = pricer.op_times_s(node, rule, placed, dict(chosen))
        option = Option(
            chosen,
            placed.inputs,
            placed.outputs,
            forward + backward,
            pricer.saved_output_bytes(node, placed),
            forward_s=forward,
        )
        key = (option.wants, option.gives)
        if key not in best or option.time_s < best[key].time_s:
            best[key] = option
    return list(best.values())


def _doubled(sharding: Sharding) -> bool:
    used = list(sharding.used_axes())
    return len(used) != len(set(used))


def priced_on(
    node: Node, rule: ShardingRule | None, option: Option, pricer: Pricer
) -> Option | None:
    """An option that was made on a mesh of the same axes, at the prices of the pricer's.

    None where that mesh does not have it. `rule` is an op's.
    """
    mesh = pricer.mesh
    if node.op == "placeholder" and node.meta.get("role") == "param":
        value, (stored,) = value_of(node), option.gives
        if not storable(stored, value.int_shape(), mesh):
            return None
        time_s = pricer.update_time_s(node, stored) + 1e-9 * option.regather
        return replace(option, time_s=time_s, memory_bytes=pricer.stored_bytes(value, stored))
    if rule is None:
        return option
    chosen = dict(option.choices)
    placed = place_call(node, rule, mesh, chosen)
    if placed is None or placed != Placed(option.wants, option.gives):
        return None
    forward, backward = pricer.op_times_s(node, rule, placed, chosen)
    kept = pricer.saved_output_bytes(node, placed)
    return replace(option, time_s=forward + backward, memory_bytes=kept, forward_s=forward)


def param_options(
    node: Node,
    wanted: Iterable[Sharding],
    mesh: Mesh,
    pricer: Pricer,
) -> list[Option]:
    """Ways to store a parameter: whole, as its users want it, or split further and gathered (ZeRO).

    Axes that the users do not split may shard the storage of any dim that has room (the outermost
    dim, then the largest); the stored copy may be kept gathered or gathered anew in the backward.
    """
    value = value_of(node)
    shape = value.int_shape()
    bases = {Sharding.replicated(value.rank)}
    for sharding in wanted:
        if not sharding.partial:
            bases.add(sharding.without_varying())
    found: dict[Sharding, None] = {}
    for base in sorted(bases, key=str):
        found.setdefault(base)
        free = [a for a in mesh.names if a not in set(base.used_axes())]
        for n in range(1, len(free) + 1):
            for axes in itertools.combinations(free, n):
                extended = _extend(base, shape, mesh, axes)
                if extended is not None:
                    found.setdefault(extended)
    options = []
    for sharding in found:
        if not storable(sharding, shape, mesh):
            continue
        time_s = pricer.update_time_s(node, sharding)
        memory = pricer.stored_bytes(value, sharding)
        options.append(Option((), (), (sharding,), time_s, memory))
        if any(sharding.splits):
            # A nanosecond more, so that nothing is gathered anew without a gain in memory.
            options.append(Option((), (), (sharding,), time_s + 1e-9, memory, regather=True))
    return options


def storable(sharding: Sharding, shape: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether DTensor's placements can say it: contiguous pieces, or an even strided shard."""
    return all(
        split.block == 1
        and (split.outer == 1 or (split.is_even(size, mesh) and len(split.axes) == 1))
        for split, size in zip(sharding.splits, shape, strict=True)
    )


def _extend(
    base: Sharding, shape: tuple[int, ...], mesh: Mesh, axes: tuple[str, ...]
) -> Sharding | None:
    """Split one more dim of a stored parameter over `axes`; None if no dim has room."""
    order = sorted(range(len(shape)), key=lambda d: (bool(base.splits[d]), d != 0, -shape[d]))
    for dim in order:
        split = base.splits[dim]
        if split.outer != 1 or split.block != 1:
            continue
        merged = tuple(a for a in mesh.names if a in split.axes or a in axes)
        if merged[: len(split.axes)] != split.axes and split.axes:
            continue
        if shape[dim] >= Split(merged).parts(mesh):
            return base.with_split(dim, merged)
    return None
