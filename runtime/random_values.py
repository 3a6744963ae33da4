"""Random tensors in place of a program's parameters and inputs, with indices that are in range."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.fx
from torch import Tensor

from autopar.cost.families import canonical_name, op_family, op_name
from autopar.ir.graph import Graph, Value, tensor_inputs, value_of, values_of
from autopar.ir.rules.common import arguments

Node = torch.fx.Node

STD = 0.02  # of matrices: GPT-2's initialisation
UNKNOWN = 2  # integers that index nothing are 0 and 1: masks, flags
_KEEPS = ("view", "copy")  # families whose outputs hold values of their inputs


def index_bounds(graph: Graph) -> dict[str, int]:
    """Placeholder -> bound below which its integers are valid wherever they index something.

    `graph` has integer global sizes (`specialise`), before lowering. Integers are followed through
    views, copies and sums with constants; a placeholder that indexes nothing is not in the result.
    """
    bound: dict[Node, int] = {}

    def limit(node: Node, below: int) -> None:
        bound[node] = max(min(below, bound.get(node, below)), 1)

    for node in reversed(graph.fx.nodes):
        if node.op != "call_function":
            continue
        for index, size in _indexed(node):
            limit(index, size)
        if node in bound and _passes(node):
            for source in tensor_inputs(node):
                values = values_of(source)
                if len(values) == 1 and not values[0].dtype.is_floating_point:
                    limit(source, bound[node] - _added(node))
    return {n.name: size for n, size in bound.items() if n.op == "placeholder"}


def _indexed(node: Node) -> list[tuple[Node, int]]:
    """The integer tensors by which an op indexes, each with the size of what it indexes."""
    name = canonical_name(op_name(node.target))
    given = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    inputs = tensor_inputs(node)
    if name == "embedding":
        return [(inputs[1], value_of(inputs[0]).int_shape()[0])]
    if name in ("cross_entropy", "nll_loss", "nll_loss_nd", "nll_loss_forward"):
        shape, target = value_of(inputs[0]).int_shape(), inputs[1]
        classes = shape[0] if len(shape) == 1 else shape[1]
        return [] if value_of(target).dtype.is_floating_point else [(target, classes)]
    if name == "one_hot" and isinstance(given.get("num_classes"), int):
        return [(inputs[0], given["num_classes"])] if given["num_classes"] > 0 else []
    if name in ("index", "index_put", "_unsafe_index", "_unsafe_index_put"):
        sizes = value_of(inputs[0]).int_shape()
        places = given.get("indices") or ()
        return [(i, sizes[d]) for d, i in enumerate(places) if isinstance(i, torch.fx.Node)]
    index, dim = given.get("index"), given.get("dim")
    if isinstance(index, torch.fx.Node) and isinstance(dim, int) and value_of(inputs[0]).rank:
        return [(index, value_of(inputs[0]).int_shape()[dim])]
    return []


def _passes(node: Node) -> bool:
    values = values_of(node)
    if not values or values[0].dtype.is_floating_point or values[0].dtype == torch.bool:
        return False
    name = op_name(node.target)
    return op_family(name) in _KEEPS or name in ("where", "masked_fill", "clamp", "add")


def _added(node: Node) -> int:
    if op_name(node.target) != "add":
        return 0
    return sum(a for a in node.args if isinstance(a, int) and not isinstance(a, bool))


def random_tensor(
    value: Value, generator: torch.Generator, *, below: int | None = None, name: str = ""
) -> Tensor:
    """A tensor of a value's shape and dtype, on the generator's device.

    Integers are in [0, below). Floating values are normal: of parameters (those with a `name`) with
    a deviation of `STD`, vectors called weight around 1.
    """
    shape, device = value.int_shape(), generator.device
    if value.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, device=device).bool()
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        most = min(below or UNKNOWN, torch.iinfo(value.dtype).max)
        made = torch.randint(0, most, shape, generator=generator, device=device)
        return made.to(value.dtype)
    drawn = value.dtype if value.dtype.itemsize > 1 else torch.float32  # not of 8-bit formats
    x = torch.randn(shape, generator=generator, device=device, dtype=drawn)
    if name:
        x.mul_(STD)
        if value.rank == 1 and name.rpartition(".")[2] == "weight":
            x.add_(1.0)
    return x.to(value.dtype)


def given_or_random(
    given: Tensor | None,
    value: Value,
    generator: torch.Generator,
    bounds: Mapping[str, int],
    placeholder: str,
) -> Tensor:
    """A tensor that exists, on the generator's device, or a random one in place of a meta tensor.

    One of other sizes than the program's (a plan for another batch) counts as missing.
    """
    if given is not None and not given.is_meta and tuple(given.shape) == value.int_shape():
        return given.detach().to(generator.device)
    return random_tensor(value, generator, below=bounds.get(placeholder))
