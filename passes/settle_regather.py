"""Keep gathered parameters that only some devices would gather again."""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx

from autopar.ir.graph import Graph, tensor_inputs, value_of, values_of
from autopar.ir.mesh import Mesh
from autopar.ir.sharding import Sharding

from .uneven import unlike_somewhere

Node = torch.fx.Node


def settle_regather(graph: Graph, mesh: Mesh) -> Graph:
    """Unmark parameters that are read where devices have nothing, one row and several.

    A parameter is gathered again in the backward when autograd wants it there, and what autograd
    saves is the same on all devices unless ops take other ways on some: with no rows they save
    nothing, and products of one row and of several are not the same kernels. The others would wait
    in the gather. Comes after `propagate`, before what looks at `meta["regather"]`.
    """
    new = graph.copy()
    for parameter in new.placeholders("param"):
        if parameter.meta["regather"]:
            parameter.meta["regather"] = not any(
                unlike_somewhere(shape, sharding, mesh)
                for reader in _readers(parameter)
                for shape, sharding in _works_on(reader)
            )
    return new


def _readers(parameter: Node) -> Iterator[Node]:
    """The ops that read a parameter, or what is made of parameters alone."""
    for user in parameter.users:
        if user.op != "call_function":
            continue
        if all(_is_of_parameters(source) for source in tensor_inputs(user)):
            yield from _readers(user)
        else:
            yield user


def _is_of_parameters(node: Node) -> bool:
    if node.op != "call_function":
        return node.op == "placeholder" and node.meta["role"] == "param"
    sources = tensor_inputs(node)
    return bool(sources) and all(_is_of_parameters(source) for source in sources)


def _works_on(reader: Node) -> Iterator[tuple[tuple[int, ...], Sharding]]:
    """Shapes and shardings of what an op takes, parameters left out, and of what it gives."""
    wants = zip(tensor_inputs(reader), reader.meta["wants"], strict=True)
    yield from ((value_of(n).int_shape(), w) for n, w in wants if not _is_of_parameters(n))
    for value in values_of(reader):
        if value.sharding is not None:
            yield value.int_shape(), value.sharding
