"""Runs a call whole and on the shards of a simulated mesh, and says whether they agree.

This is what a sharding rule claims, tried out: it tests every hand-written rule, and discovers the
rules of ops that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor

from .graph import tensor_inputs
from .localise import Call, local_call
from .mesh import Mesh
from .rule import Placed
from .sharding import Sharding

Localise = Callable[
    [torch.fx.Node, Sequence[Sequence[int]], Sequence[Sequence[int]]],
    Call,
]


def unchanged(
    node: torch.fx.Node, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> Call:
    """The node's own call, for ops that carry no sizes."""
    del inputs, outputs
    if not callable(node.target):
        raise TypeError(f"%{node.name} calls {node.target!r}")
    return node.target, node.args, dict(node.kwargs)


@dataclass(frozen=True)
class Oracle:
    """A call on concrete tensors, its outputs, and its gradients for random output gradients.

    `tensors` are in `tensor_inputs` order; `leaf` says which of them are differentiated.
    `gradients` has one entry per input, None where no gradient flows; it is empty if the call is
    not differentiable.
    """

    node: torch.fx.Node
    tensors: tuple[Tensor, ...]
    leaf: tuple[bool, ...]
    outputs: tuple[Tensor, ...]
    seeds: tuple[Tensor | None, ...]
    gradients: tuple[Tensor | None, ...]
    localise: Localise

    @staticmethod
    def of(
        node: torch.fx.Node,
        tensors: Sequence[Tensor],
        *,
        localise: Localise = local_call,
        leaves: Collection[int] | None = None,
    ) -> Oracle:
        """Run the call whole; raises what the op raises.

        `leaves` are the inputs whose gradients count; all floating-point inputs by default.
        """
        inputs = [x.detach().clone() for x in tensors]
        wanted = range(len(inputs)) if leaves is None else leaves
        leaf = tuple(i in wanted and differentiable(x) for i, x in enumerate(inputs))
        for x, requires_grad in zip(inputs, leaf, strict=True):
            x.requires_grad_(requires_grad)
        target, args, kwargs = unchanged(node, (), ())
        outputs = flat(target(*substitute(node, args, inputs), **substitute(node, kwargs, inputs)))
        generator = torch.Generator().manual_seed(0)
        seeds = tuple(
            torch.randn(y.shape, generator=generator, dtype=y.dtype) if y.requires_grad else None
            for y in outputs
        )
        gradients = gradients_of(outputs, seeds, inputs)
        detached = tuple(y.detach() for y in outputs)
        return Oracle(node, tuple(tensors), leaf, detached, seeds, gradients, localise)

    def disagreement(self, placed: Placed, mesh: Mesh) -> str | None:
        """What differs when every device of `mesh` runs its part of the call, or None."""
        devices = [mesh.coordinates(rank) for rank in range(mesh.size)]
        held = [
            pieces(x, sharding, mesh, devices)
            for x, sharding in zip(self.tensors, placed.inputs, strict=True)
        ]
        made: list[list[Tensor]] = []
        found: list[tuple[Tensor | None, ...]] = []
        for rank, at in enumerate(devices):
            inputs = [parts[rank] for parts in held]
            for x, leaf in zip(inputs, self.leaf, strict=True):
                x.requires_grad_(leaf and bool(self.gradients))
            shapes = [
                s.local_shape(tuple(y.shape), mesh, at)
                for s, y in zip(placed.outputs, self.outputs, strict=True)
            ]
            outputs = self.run_local(inputs, shapes)
            if [tuple(y.shape) for y in outputs] != shapes:
                return f"output shapes {[tuple(y.shape) for y in outputs]}, not {shapes}"
            seeds = [
                None if g is None else shard(g, s, mesh, at)
                for g, s in zip(self.seeds, placed.outputs, strict=True)
            ]
            if self.gradients:
                found.append(gradients_of(outputs, seeds, inputs))
            made.append([y.detach() for y in outputs])
        for i, (y, sharding) in enumerate(zip(self.outputs, placed.outputs, strict=True)):
            rebuilt = recombine([parts[i] for parts in made], y, sharding, mesh, devices)
            if rebuilt is None or not close(rebuilt, y):
                return f"output {i} @ {sharding} differs"
        for i, (g, sharding) in enumerate(zip(self.gradients, placed.inputs, strict=False)):
            if g is None:
                continue
            if any(reduction != "sum" for out in placed.outputs for _, reduction in out.partial):
                return "gradient of a partial maximum"
            parts = [gradients[i] for gradients in found]
            local = [
                torch.zeros_like(held[i][rank]) if part is None else part
                for rank, part in enumerate(parts)
            ]
            rebuilt = recombine(local, g, dual(sharding, placed.outputs), mesh, devices)
            if rebuilt is None or not close(rebuilt, g):
                return f"gradient of input {i} @ {sharding} differs"
        return None

    def run_local(self, inputs: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """One device's outputs."""
        call = self.localise(self.node, [tuple(x.shape) for x in inputs], shapes)
        target, args, kwargs = call
        return flat(
            target(*substitute(self.node, args, inputs), **substitute(self.node, kwargs, inputs))
        )


def differentiable(x: Tensor) -> bool:
    """Whether autograd can track x."""
    return x.is_floating_point() or x.is_complex()


def flat(result: Any) -> list[Tensor]:
    """The tensors of an op's result."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [y for y in result if isinstance(y, Tensor)]
    return []


def substitute(node: torch.fx.Node, tree: Any, tensors: Sequence[Tensor]) -> Any:
    """`tree`, arguments of (a local form of) the node, with tensors for its inputs.

    The node must not use an input twice: the two uses may be sharded in two ways.
    """
    by_node = dict(zip(tensor_inputs(node), tensors, strict=True))
    return torch.fx.node.map_arg(tree, by_node.__getitem__)


def gradients_of(
    outputs: Sequence[Tensor], seeds: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradient of every input, None where it needs none; empty if no output has a gradient."""
    pairs = [
        (y, g) for y, g in zip(outputs, seeds, strict=True) if g is not None and y.requires_grad
    ]
    leaves = [x for x in inputs if x.requires_grad]
    if not pairs or not leaves:
        return tuple(None for _ in inputs) if any(g is not None for g in seeds) else ()
    found = iter(
        torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    )
    return tuple(next(found) if x.requires_grad else None for x in inputs)


def shard(x: Tensor, sharding: Sharding, mesh: Mesh, at: Mapping[str, int]) -> Tensor:
    """The part of x that the device at `at` owns; partial axes are ignored."""
    for dim, split in enumerate(sharding.splits):
        if split:
            runs = split.runs(x.shape[dim], mesh, at)
            rows = torch.tensor([i for run in runs for i in run], dtype=torch.long)
            x = x.index_select(dim, rows)
    return x.detach().clone()


def pieces(
    x: Tensor, sharding: Sharding, mesh: Mesh, devices: Sequence[Mapping[str, int]]
) -> list[Tensor]:
    """What every device holds of x: random summands of it on the axes where it is partial."""
    parts: dict[tuple[int, ...], Tensor] = {(): x}
    for axis in sharding.partial_axes:
        parts = {
            (*key, i): piece
            for key, part in parts.items()
            for i, piece in enumerate(summands(part, mesh[axis].size))
        }
    return [
        shard(parts[tuple(at[a] for a in sharding.partial_axes)], sharding, mesh, at)
        for at in devices
    ]


def summands(x: Tensor, n: int) -> list[Tensor]:
    """`n` tensors, deterministic noise but for the last, that add up to x."""
    generator = torch.Generator().manual_seed(n)
    parts = [
        torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if differentiable(x)
        else torch.randint(-5, 5, x.shape, generator=generator, dtype=x.dtype)
        for _ in range(n - 1)
    ]
    rest = x.clone()
    for part in parts:
        rest -= part
    return [*parts, rest]


def dual(sharding: Sharding, outputs: Sequence[Sharding]) -> Sharding:
    """Sharding of an input's gradient.

    Split as the input. On an axis where the input is replicated it is a partial sum if the op's
    work is divided on that axis, else complete; where the input is partial it is complete.
    """
    used = set(sharding.used_axes())
    found = Sharding(sharding.splits)
    for axis in {axis for output in outputs for axis in output.used_axes()} - used:
        found = found.with_partial(axis, "sum")
    return found


def recombine(
    parts: Sequence[Tensor],
    whole: Tensor,
    sharding: Sharding,
    mesh: Mesh,
    devices: Sequence[Mapping[str, int]],
) -> Tensor | None:
    """The tensor, shaped like `whole`, whose parts lie on the devices; None if copies differ."""
    axes = [axis for axis in mesh.names if sharding.dim_of(axis) is None]
    found: dict[tuple[int, ...], Tensor] = {}
    for part, at in zip(parts, devices, strict=True):
        key = tuple(at[axis] for axis in axes)
        place_part(found.setdefault(key, torch.zeros_like(whole)), part, sharding, mesh, at)
    reductions = dict(sharding.partial)
    for position, axis in reversed(list(enumerate(axes))):
        groups: dict[tuple[int, ...], list[Tensor]] = {}
        for key in sorted(found):
            groups.setdefault(key[:position], []).append(found[key])
        if axis not in reductions and not all(
            close(x, group[0]) for group in groups.values() for x in group
        ):
            return None
        found = {key: reduced(group, reductions.get(axis)) for key, group in groups.items()}
    return found[()]


def place_part(
    whole: Tensor, part: Tensor, sharding: Sharding, mesh: Mesh, at: Mapping[str, int]
) -> None:
    """Write a device's part to its place in `whole`."""
    if not whole.dim():
        whole.copy_(part)
        return
    rows = [
        torch.tensor([i for run in split.runs(size, mesh, at) for i in run], dtype=torch.long)
        for split, size in zip(sharding.splits, whole.shape, strict=True)
    ]
    whole[torch.meshgrid(*rows, indexing="ij")] = part


def reduced(parts: Sequence[Tensor], reduction: str | None) -> Tensor:
    """Parts of a partial value put together; the first of copies."""
    if reduction is None:
        return parts[0]
    stacked = torch.stack(list(parts))
    if reduction == "sum":
        return stacked.sum(0, dtype=stacked.dtype)
    return stacked.amax(0) if reduction == "max" else stacked.amin(0)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding in the dtype."""
    if a.shape != b.shape:
        return False
    if not differentiable(b):
        return torch.equal(a, b)
    tolerance = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4}.get(
        b.dtype, 2e-2
    )
    return torch.allclose(a, b, tolerance, tolerance, equal_nan=True)
